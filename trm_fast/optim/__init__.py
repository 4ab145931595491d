"""Optimizers: drop-ins for those of ``torch.optim`` on the fused ops."""

from trm_fast.optim.adam_atan2 import AdamATan2
from trm_fast.optim.attention_logits import max_logits
from trm_fast.optim.grad_filter import GradFilter
from trm_fast.optim.grokfast_adamw import GrokFastAdamW
from trm_fast.optim.grokfast_sgd import GrokFastSGD
from trm_fast.optim.groups import component_groups, describe, split_params
from trm_fast.optim.interop import from_lucidrains, load_official_ema
from trm_fast.optim.mugrokfast import PRESETS, MuGrokfast
from trm_fast.optim.muon import Muon
from trm_fast.optim.options import FilterOptions, StepOptions
from trm_fast.optim.qk_clip import QKClip, QKRows
from trm_fast.optim.schedules import (
    OptionSchedule,
    Schedule,
    stages,
    warmup_constant,
    warmup_cosine,
)
from trm_fast.optim.sparse_sign_sgd import SparseSignSGD
from trm_fast.optim.weight_ema import WeightEMA

__all__ = [
    "PRESETS",
    "AdamATan2",
    "FilterOptions",
    "GradFilter",
    "GrokFastAdamW",
    "GrokFastSGD",
    "MuGrokfast",
    "Muon",
    "OptionSchedule",
    "QKClip",
    "QKRows",
    "Schedule",
    "SparseSignSGD",
    "StepOptions",
    "WeightEMA",
    "component_groups",
    "describe",
    "from_lucidrains",
    "load_official_ema",
    "max_logits",
    "split_params",
    "stages",
    "warmup_constant",
    "warmup_cosine",
]
