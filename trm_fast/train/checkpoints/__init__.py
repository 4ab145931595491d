"""Checkpoints: what a run keeps, written so that no kill damages it."""
