"""Inputs of vector_latent_update, and its formula in float64, for the tests."""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

# In multiples of hidden; 0 is a vector.
SHAPES = (3, 0, 1, 0, 0, 0, 2, 0, 1, 0, 0, 0)
NAMES = (
    "x", "y", "z",
    "A1", "a1", "A2", "a2", "w_z", "b_z", "C1", "c1", "C2", "c2", "w_y", "b_y",
)  # fmt: skip


def make(
    batch: int, hidden: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns x, y, z and 12 weights as leaves of ``dtype``, and gradients of both results.

    Products have variance about 1, and gains of the norms lie around 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    leaves = [draw(batch, hidden) for _ in range(3)]
    for index, parts in enumerate(SHAPES):
        if parts:
            leaves.append(draw(hidden, parts * hidden) / sqrt(parts * hidden))
        else:
            leaves.append(0.3 * draw(hidden) + (index % 6 == 4))
    grads = [draw(batch, hidden) for _ in range(2)]
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], [g.to(dtype) for g in grads]


def truth(
    leaves: Sequence[Tensor],
    *,
    n: int,
    T: int,
    grad_cycles: int = 1,
    y_every_step: bool = False,
    step_scales: Sequence[float] | None = None,
    recompute: bool = True,
) -> tuple[Tensor, Tensor]:
    """The formula, literally; ``recompute`` means nothing to it."""
    x, y, z, *w = [leaf.double() for leaf in leaves]
    for level in range(T):
        scale = 1.0 if step_scales is None else step_scales[level]
        if level < T - grad_cycles or not torch.is_grad_enabled():
            y, z = y.detach(), z.detach()
        for step in range(n):
            z = z + scale * network(torch.cat((x, y, z), 1), *w[:6])
            if y_every_step or step == n - 1:
                y = y + scale * network(torch.cat((y, z), 1), *w[6:])
        if level < T - grad_cycles:
            y, z = y.detach(), z.detach()
    return y, z


def network(
    v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gain: Tensor, shift: Tensor
) -> Tensor:
    v = v @ w1.T + b1
    p = (v * 0.5 * torch.special.erfc(-v / sqrt(2))) @ w2.T + b2
    p = p - p.mean(1, keepdim=True)
    return p / (p.square().mean(1, keepdim=True) + 1e-5).sqrt() * gain + shift


def gradients(
    out: tuple[Tensor, Tensor], leaves: list[Tensor], grads: list[Tensor]
) -> list[Tensor]:
    """Returns the gradients of all leaves; zeros where there is none."""
    return list(torch.autograd.grad(out, leaves, grads, materialize_grads=True))


def tolerance(dtype: torch.dtype, updates: int) -> float:
    """Bound on the norm of an error over the norm of the truth.

    An update rounds about six times, and its backward pass as often; each time the error is at most
    the unit roundoff eps / 2 and independent of the others, so errors add up as a root. What an
    error in a state becomes in later updates is with these weights less than 4 times as much.
    """
    return 4 * sqrt(2 * 6 * updates) * torch.finfo(dtype).eps / 2


def assert_close(
    found: Sequence[Tensor], true: Sequence[Tensor], bound: float, names: Sequence[str]
) -> None:
    wrong = {}
    for name, value, expected in zip(names, found, true, strict=True):
        error = float((value.detach().double() - expected.detach()).norm())
        size = float(expected.detach().norm())
        if not error <= bound * size:
            wrong[name] = error / (size or 1.0)
    assert not wrong, f"relative errors above {bound:.2g}: {wrong}"
