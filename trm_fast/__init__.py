"""Fast training of tiny recursive models: fused optimizers, kernels and recipes for PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING

from trm_fast._version import __version__

if TYPE_CHECKING:
    from trm_fast import data, losses, nn, ops, optim, train
    from trm_fast._dispatch import use_backend
    from trm_fast._errors import BackendError
    from trm_fast.nn import TinyRecursiveModel
    from trm_fast.ops import backends
    from trm_fast.ops.newton_schulz import newton_schulz
    from trm_fast.optim import (
        AdamATan2,
        GradFilter,
        GrokFastAdamW,
        GrokFastSGD,
        MuGrokfast,
        Muon,
        QKClip,
        SparseSignSGD,
        WeightEMA,
    )

__all__ = [
    "AdamATan2",
    "BackendError",
    "GradFilter",
    "GrokFastAdamW",
    "GrokFastSGD",
    "MuGrokfast",
    "Muon",
    "QKClip",
    "SparseSignSGD",
    "TinyRecursiveModel",
    "WeightEMA",
    "__version__",
    "backends",
    "data",
    "losses",
    "newton_schulz",
    "nn",
    "ops",
    "optim",
    "train",
    "use_backend",
]

# Resolved on first use, so that `trm-fast --help` and a bare import do not pay for torch.
_OPTIMIZERS = (
    "AdamATan2", "GradFilter", "GrokFastAdamW", "GrokFastSGD", "MuGrokfast", "Muon", "QKClip",
    "SparseSignSGD", "WeightEMA",
)  # fmt: skip
_MODULES = ("data", "losses", "nn", "ops", "optim", "train")
_HOME = {
    "BackendError": "trm_fast._errors",
    "TinyRecursiveModel": "trm_fast.nn",
    "backends": "trm_fast.ops",
    "newton_schulz": "trm_fast.ops.newton_schulz",
    "use_backend": "trm_fast._dispatch",
    **dict.fromkeys(_OPTIMIZERS, "trm_fast.optim"),
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"trm_fast.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'trm_fast' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
