"""Which form of Newton-Schulz runs: the measured choice of method "auto".

The meaning of the forms is in trm_fast/ops/newton_schulz.py.
"""

from collections.abc import Sequence

import torch

METHODS = ("auto", "standard", "symmetric", "gram")


def has_amx() -> bool:
    """Returns whether torch finds AMX, with which its own products beat all that AVX-512 can do."""
    found = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(found())


# Backend and type of device to the m / n from which the Gram form is taken, and the form below;
# docs/newton_schulz.md has the numbers. With dense products it wins from 1.5 to 2 on. With
# triangles it wins by multiply-adds as soon as m > n, but until 1.5 by at most a tenth, and its
# error in bfloat16 is up to twice that of the other form.
_GRAM_FROM = {
    ("reference", "cpu"): (2.0, "standard"),
    ("cpp", "cpu"): (1.5, "symmetric"),
    ("triton", "cuda"): (1.5, "symmetric"),
}
_ELSEWHERE = (2.0, "standard")


def form_of(method: str, shape: Sequence[int], backend: str, device_type: str) -> str:
    """Returns "standard", "symmetric" or "gram" for one matrix."""
    if method != "auto":
        return method
    least, below = _GRAM_FROM.get((backend, device_type), _ELSEWHERE)
    n, m = sorted(shape)
    return "gram" if m >= least * n else below
