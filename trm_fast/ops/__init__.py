"""The ops: one page each, with formula, checks, reference and implementations."""

from trm_fast._dispatch import OPS, backends
from trm_fast.ops._adaptive_tensors import AdaptiveStep
from trm_fast.ops.adaptive_step import Settings, adaptive_step_

__all__ = ["OPS", "AdaptiveStep", "Settings", "adaptive_step_", "backends"]
