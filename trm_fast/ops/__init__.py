"""The ops: one page each, with formula, checks, reference and implementations."""

from trm_fast._dispatch import OPS, backends
from trm_fast.ops._adaptive_settings import Settings
from trm_fast.ops._adaptive_tensors import AdaptiveStep
from trm_fast.ops.adaptive_step import adaptive_step_
from trm_fast.ops.filter_sums import FilterSums, filter_sums
from trm_fast.ops.newton_schulz import newton_schulz, newton_schulz_

__all__ = [
    "OPS",
    "AdaptiveStep",
    "FilterSums",
    "Settings",
    "adaptive_step_",
    "backends",
    "filter_sums",
    "newton_schulz",
    "newton_schulz_",
]
