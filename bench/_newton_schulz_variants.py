"""What is timed and judged as Newton-Schulz: torch's, and ours by backend, method and dtype."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from trm_fast._dispatch import ORDER
from trm_fast.ops import OPS, newton_schulz_
from trm_fast.ops._newton_schulz_sets import restarts_of

from ._tables import Unavailable

KELLER = (3.4445, -4.7750, 2.0315)  # torch's own, so that all take the same steps
STEPS = 5
TORCH = "torch.optim.Muon"
GEMM = "bf16 product of 1024 x 1024"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Variant:
    """One way to take the steps, in place on a list of matrices."""

    name: str
    run: Callable[[Sequence[Tensor]], object]


def _torch(matrices: Sequence[Tensor]) -> None:
    """The loop of ``torch.optim.Muon``, which returns new matrices."""
    for matrix in matrices:
        matrix.copy_(_zeropower_via_newtonschulz(matrix, KELLER, STEPS, 1e-7))


def torch_alone(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The same without the copy into place, which torch is not charged for."""
    return [_zeropower_via_newtonschulz(matrix, KELLER, STEPS, 1e-7) for matrix in matrices]


def our_names(device: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns names of ours on a device, and of those that are left out by default."""
    found = [
        f"trm_fast {backend} {method} {label}"
        for label in DTYPES
        for backend in ORDER[device]
        # "standard" only where it differs.
        for method in ("standard" if backend == "reference" else "symmetric", "gram")
    ]
    fast = tuple(name for name in found if "reference" not in name and name.endswith("bf16"))
    return fast, tuple(name for name in found if name not in fast)


def variant(name: str, device: str) -> Variant:
    """Returns a variant by its name.

    Raises:
        Unavailable: it cannot run here.
    """
    if name == TORCH:
        return Variant(TORCH, _torch)
    backend, method, label = name.split()[1:]
    reason = OPS["newton_schulz"].reason(backend, device, frozenset({DTYPES[label]}))
    if reason is not None:
        raise Unavailable(reason)
    return _ours(backend, method, label)


def _ours(backend: str, method: str, label: str) -> Variant:
    def run(matrices: Sequence[Tensor]) -> None:
        dtype = DTYPES[label]
        newton_schulz_(matrices, STEPS, KELLER, method, dtype=dtype, backend=backend)

    return Variant(f"trm_fast {backend} {method} {label}", run)


def flops(shape: tuple[int, int], variant: str) -> float:
    """Returns two for each multiply-add of the formula, with dense or triangular products."""
    n, m = sorted(shape)
    dense = "reference" in variant or variant == TORCH
    if "gram" in variant:
        dtype = DTYPES[variant.split()[-1]]
        restarts = len(restarts_of((KELLER,) * STEPS, dtype))
        parts = (restarts + 1, 4 * STEPS - 3 * (restarts + 1))
    else:
        parts = (STEPS, STEPS)
    symmetric, square = (4, 2) if dense else (3, 1)
    return float(parts[0] * symmetric * n * n * m + parts[1] * square * n**3)
