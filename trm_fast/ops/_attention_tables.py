"""What attention looks up in every call: cosines and sines of the positions, and visible pairs.

Each table is made once for its sizes and device, and never dropped: a CUDA graph that was captured
with it holds its address.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trm_fast import _native
from trm_fast._autograd import is_transformed

_kept: dict[tuple[object, ...], Tensor] = {}


def rotary_tables(
    length: int, dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Returns cosines and signed sines, [2, length, 1, dim], of the half-split rotation.

    With angle(l, i) = l * theta^(-2i / dim) for i < dim / 2: cos(angle) in both halves, then
    -sin(angle) in the first half and sin(angle) in the second. The angles are computed in float64.
    """
    if torch.compiler.is_compiling():
        # An operator, or the compiler would compute a cosine anew for every element that it turns.
        arguments = (length, dim, theta, dtype, device)
        return torch.ops.trm_fast.rotary_tables(*arguments)  # type: ignore[no-any-return]

    def make() -> Tensor:
        # Not every device has float64; a copy from the host would break a capture of a CUDA graph.
        where = device if device.type == "cuda" else torch.device("cpu")
        pairs = torch.arange(0, dim, 2, dtype=torch.float64, device=where)
        positions = torch.arange(length, dtype=torch.float64, device=where)
        angles = torch.outer(positions, theta ** (-pairs / dim))
        cos, sin = angles.cos(), angles.sin()
        tables = torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))
        return tables.unsqueeze(2).to(device, dtype)

    return _once(("rotary", length, dim, theta, dtype, device), make)


def visible_pairs(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """Returns bool [length, length]: whether query i sees key j, that is |i - j| < window and, with
    ``causal``, j <= i."""

    def make() -> Tensor:
        position = torch.arange(length, device=device)
        apart = position[:, None] - position
        return (apart < window) & (apart >= 0 if causal else apart > -window)

    if torch.compiler.is_compiling():
        return make()
    return _once(("visible", length, window, causal, device), make)


def _once(key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
    if key in _kept:
        return _kept[key]
    # What is made in inference mode could not be saved for a backward pass later.
    with torch.inference_mode(False), torch.no_grad():
        made = make()
    if _is_computed(made):
        _kept[key] = made
    return made


def _is_computed(table: Tensor) -> bool:
    """Returns False for what has no values yet, in a graph under capture or in a trace, and for a
    wrapper that ends with its transform."""
    capturing = table.is_cuda and torch.cuda.is_current_stream_capturing()
    return type(table) is Tensor and not capturing and not is_transformed()


def _from_dispatcher(
    length: int, dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if length < 0 or dim < 0 or dim % 2:
        raise ValueError(
            f"rotary_tables: length must be >= 0, and dim even; got {length} and {dim}"
        )
    if not 0 < theta < float("inf"):
        raise ValueError(f"rotary_tables: theta must be finite and > 0; got {theta}")
    if not dtype.is_floating_point:
        raise TypeError(f"rotary_tables: dtype must be a floating point type; got {dtype}")
    # A copy, since the caller may overwrite the result of an operator.
    return rotary_tables(length, dim, theta, dtype, device).clone()


def _fake(length: int, dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(2, length, 1, dim, dtype=dtype, device=device)


_native.LIBRARY.define(
    "rotary_tables(SymInt length, SymInt dim, float theta, ScalarType dtype, Device device)"
    " -> Tensor"
)
_native.LIBRARY.impl("rotary_tables", _from_dispatcher, "BackendSelect")
_native.register_fake("rotary_tables", _fake)
