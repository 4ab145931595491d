"""The grokking benchmark: every filter at equal weight decay, in many runs that can be resumed."""
