"""Losses for deep supervision."""

from trm_fast.losses.halting import HaltingLoss, halting_loss
from trm_fast.losses.supervision import supervision_weights

__all__ = ["HaltingLoss", "halting_loss", "supervision_weights"]
