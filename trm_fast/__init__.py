"""Fast training of tiny recursive models: fused optimizers, kernels and recipes for PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING

from trm_fast._version import __version__

if TYPE_CHECKING:
    from trm_fast._dispatch import use_backend
    from trm_fast._errors import BackendError
    from trm_fast.ops import backends
    from trm_fast.optim import GrokFastAdamW

__all__ = ["BackendError", "GrokFastAdamW", "__version__", "backends", "use_backend"]

# Resolved on first use, so that `trm-fast --help` and a bare import do not pay for torch.
_HOME = {
    "BackendError": "trm_fast._errors",
    "GrokFastAdamW": "trm_fast.optim",
    "backends": "trm_fast.ops",
    "use_backend": "trm_fast._dispatch",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'trm_fast' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
