"""What the tests of newton_schulz share: inputs, the truth in float64 and the error it allows."""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Triples = tuple[tuple[float, float, float], ...]

METHODS = ("standard", "symmetric", "gram")
KELLER = ((3.4445, -4.7750, 2.0315),) * 5


@functools.cache
def make(shape: tuple[int, ...], condition: float | None = None, seed: int = 0) -> Tensor:
    """Random matrices in float64: Gaussian, or with singular values from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if condition is None:
        return x
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    values = condition ** -torch.linspace(0, 1, s.shape[-1], dtype=torch.float64)
    return (u * values) @ v


def truth(x: Tensor, triples: Triples, eps: float = 1e-7) -> Tensor:
    """The polynomials of the singular values over the norm, in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True).clamp(min=eps)
    for a, b, c in triples:
        s = s * (a + b * s**2 + c * s**4)
    return (u * s.unsqueeze(-2)) @ v


def polar(x: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ v


def error(found: Tensor, expected: Tensor) -> float:
    """In the Frobenius norm, which no rounding error of a product exceeds."""
    return float((found.double() - expected).norm())


@functools.cache
def allowed(
    shape: tuple[int, ...],
    condition: float | None,
    triples: Triples,
    restarts: tuple[int, ...],
    dtype: torch.dtype,
    seed: int = 0,
) -> float:
    """How far from ``truth`` rounding leads ``make`` of these arguments, in the Frobenius norm.

    The steps are taken in float64, with each stored number off by u, half of eps, and each product
    by v ||A|| ||B||, what random signs leave of the worst case of its sums; both with random signs.
    Roundings are mostly smaller than u, but no two sets of them lead to the same place: twice the
    largest of six draws.
    """
    x = make(shape, condition, seed)
    generator = torch.Generator().manual_seed(1)
    draws = [perturbed(x, triples, restarts, dtype, generator) for _ in range(6)]
    exact = truth(x, triples)
    return 2 * max(error(draw, exact) for draw in draws)


def perturbed(
    x: Tensor,
    triples: Triples,
    restarts: Sequence[int],
    dtype: torch.dtype,
    random: torch.Generator,
) -> Tensor:
    """The formula of the page, with Q kept whole only where a segment has more than one step."""
    u = torch.finfo(dtype).eps / 2
    v = 2.0**-53 if dtype == torch.float64 else 2.0**-24

    def stored(c: Tensor, *factors: Tensor) -> Tensor:
        sums = v * math.prod(float(factor.norm()) for factor in factors) if factors else 0.0
        noise = torch.randn(c.shape, generator=random, dtype=c.dtype)
        return c * (1 + u * noise.sign()) + sums / c.numel() ** 0.5 * noise

    if x.size(0) > x.size(1):
        return perturbed(x.mT, triples, restarts, dtype, random).mT
    x = stored(x / x.norm())
    cuts = [0, *restarts, len(triples)]
    for segment in (triples[i:j] for i, j in itertools.pairwise(cuts)):
        r, q = stored(x @ x.mT, x, x), None
        for a, b, c in segment:
            z = stored(b * r + c * r @ r, r, r)
            q = (
                z + a * torch.eye(len(r), dtype=r.dtype)
                if q is None
                else stored(a * q + q @ z, q, z)
            )
            q = stored(q) if len(segment) > 1 else q
            t = stored(a * r + r @ z, r, z)
            r = stored(a * t + z @ t, z, t)
        x = stored(q @ x, q, x)
    return x
