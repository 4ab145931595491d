"""Losses for deep supervision, and the cost of a recursion."""

from trm_fast.losses.complexity import PHI, complexity, expected_complexity
from trm_fast.losses.halting import HaltingLoss, halting_loss
from trm_fast.losses.supervision import supervision_weights

__all__ = [
    "PHI",
    "HaltingLoss",
    "complexity",
    "expected_complexity",
    "halting_loss",
    "supervision_weights",
]
