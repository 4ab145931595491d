"""The ops: one page each, with formula, checks, reference and implementations."""

from trm_fast.ops.adaptive_step import AdaptiveStep, Settings, adaptive_step_

__all__ = ["AdaptiveStep", "Settings", "adaptive_step_"]
