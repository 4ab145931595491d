"""What ``torch.utils.flop_counter`` counts for the ops of native code: the products of the
reference, whatever a fused form saves. As there, attention on a CPU counts none but those with
weights."""

import sys
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from trm_fast._compiler import constant_result

_COUNTER = "torch.utils.flop_counter"
_Shape = tuple[int, ...]


@constant_result
def register_flops() -> None:
    """Gives torch's counter the formulas, if a program has imported it; else nothing counts.

    Importing it here would import Triton, which takes longer than the rest of the package.
    """
    counter = sys.modules.get(_COUNTER)
    ops = torch.ops.trm_fast
    if counter is None or ops.latent_update_forward_ in counter.flop_registry:
        return
    register = counter.register_flop_formula
    register(ops.latent_update_forward_)(_latent_forward)
    register(ops.latent_update_backward_)(_latent_backward)
    register(ops.vector_latent_update_forward_)(_vector_forward)
    register(ops.vector_latent_update_backward_)(_vector_backward)
    register(ops.newton_schulz_rows_, get_raw=True)(_newton_schulz)
    # A counter copies the registry when it is made, which may have been a moment ago.
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            mode.counter.flop_registry = {**counter.flop_registry, **mode.counter.flop_registry}


def _network(x: _Shape, weights: list[_Shape], heads: int) -> int:
    """Of one call of the network of ``latent_update``."""
    batch, length, width = x
    # Without heads the first two weights of a layer multiply each channel, all others each token.
    times = [batch * (length if heads or i % 4 > 1 else width) for i in range(len(weights))]
    return sum(2 * count * prod(weight) for count, weight in zip(times, weights, strict=True))


def _latent_forward(
    x: _Shape, y: _Shape, z: _Shape, weights: list[_Shape], rope: _Shape, states: _Shape,
    scales: _Shape, kept: _Shape, heads: int, eps: float, n: int, T: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return T * (n + 1) * _network(x, weights, heads)


def _latent_backward(
    x: _Shape, weights: list[_Shape], rope: _Shape, states: _Shape, scales: _Shape, kept: _Shape,
    dx: _Shape, dy: _Shape, dz: _Shape, dweights: list[_Shape], heads: int, eps: float, n: int,
    grad_cycles: int, **_: Any,
) -> int:  # fmt: skip
    passes = 2 if kept[-1] else 3  # the third computes once more
    return passes * grad_cycles * (n + 1) * _network(x, weights, heads)


def _rounds(x: _Shape, rounds: int, steps: int) -> int:
    """Of some rounds of ``vector_latent_update``, the formula read literally."""
    batch, hidden = x
    return 2 * batch * hidden**2 * rounds * (4 * steps + 3)


def _vector_forward(
    x: _Shape, y: _Shape, z: _Shape, weights: list[_Shape], scales: list[float], steps: int,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _rounds(x, len(scales), steps)


def _vector_backward(
    x: _Shape, weights: list[_Shape], scales: list[float], steps: int, grad_rounds: int,
    states: _Shape, kept: _Shape, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return (2 if kept[0] else 3) * _rounds(x, grad_rounds, steps)


def _newton_schulz(
    table: Tensor, coefficients: list[float], restarts: list[int], eps: float, **_: Any
) -> int:
    steps = len(coefficients) // 3
    quadratics = sum(c != 0 for c in coefficients[2::3])
    segments = [last - first for first, last in pairwise((0, *restarts, steps))]
    total = 0
    for rows, columns in table[:, 1:3].tolist():
        short, long = sorted((rows, columns))
        # Within a segment each later step multiplies Q and R in place of X.
        small = quadratics + 3 * sum(length - 1 for length in segments)
        total += 4 * len(segments) * short**2 * long + 2 * small * short**3
    return total
