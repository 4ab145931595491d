"""The ops: one page each, with formula, checks, reference and implementations."""

from trm_fast._dispatch import OPS, backends
from trm_fast.ops._adaptive_filters import FILTERS, Filter
from trm_fast.ops._adaptive_settings import RULES, Settings
from trm_fast.ops._adaptive_tensors import AdaptiveStep, States
from trm_fast.ops._latent_arguments import Network
from trm_fast.ops.adaptive_step import adaptive_step_
from trm_fast.ops.filter_sums import FilterSums, filter_sums
from trm_fast.ops.latent_update import latent_update
from trm_fast.ops.newton_schulz import newton_schulz, newton_schulz_
from trm_fast.ops.rms_norm_residual import rms_norm_residual
from trm_fast.ops.rope_attention import rope_attention
from trm_fast.ops.stablemax_cross_entropy import TokenLoss, stablemax_cross_entropy
from trm_fast.ops.swiglu import swiglu
from trm_fast.ops.token_mixer import token_mixer
from trm_fast.ops.vector_latent_update import vector_latent_update

__all__ = [
    "FILTERS",
    "OPS",
    "RULES",
    "AdaptiveStep",
    "Filter",
    "FilterSums",
    "Network",
    "Settings",
    "States",
    "TokenLoss",
    "adaptive_step_",
    "backends",
    "filter_sums",
    "latent_update",
    "newton_schulz",
    "newton_schulz_",
    "rms_norm_residual",
    "rope_attention",
    "stablemax_cross_entropy",
    "swiglu",
    "token_mixer",
    "vector_latent_update",
]
