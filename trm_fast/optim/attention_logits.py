"""The largest attention logit of each head, for modules whose attention does not report it."""

from trm_fast.ops._attention_logits import max_logits

__all__ = ["max_logits"]
