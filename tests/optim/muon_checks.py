"""Muon's formula, written again in float64, and the matrices that its tests step on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from trm_fast import Muon

from .torch_checks import make_grads, train

Triple = tuple[float, float, float]

KELLER: Triple = (3.4445, -4.7750, 2.0315)
# Everything in float64, so that what is left is the formula.
EXACT: dict[str, Any] = {"ns_dtype": torch.float64}
SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7), "row": (1, 9), "column": (9, 1)}
# Rounding in float64: singular values are lifted at most 3.4445^5 = 485 times, and 40 steps of
# some twenty roundings each add up; this is a thousand times more.
RTOL = 1e-9


def orthogonal(u: Tensor, triples: Sequence[Triple] = (KELLER,) * 5, eps: float = 1e-7) -> Tensor:
    """By singular values, which nothing under test computes."""
    left, s, right = torch.linalg.svd(u.double(), full_matrices=False)
    s = s / max(float(u.double().norm()), eps)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return (left * s) @ right


def ratio(rows: int, columns: int, adjust: str | None = None) -> float:
    if adjust == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    share: float = rows / columns
    return (share if adjust == "spectral" else max(1.0, share)) ** 0.5


def filtered(grads: Sequence[Tensor], kind: str | None, alpha: float, lamb: float) -> list[Tensor]:
    """The gradients of all steps behind a filter that starts at the first."""
    results, mean = [], grads[0].double()
    for t, grad in enumerate(grads):
        g = grad.double()
        mean = alpha * mean + (1 - alpha) * g if t else g
        results.append(g + lamb * {None: 0 * g, "ema": mean, "highpass": g - mean}[kind])
    return results


def formula(
    start: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    triples: Sequence[Triple] = (KELLER,) * 5,
    eps: float = 1e-7,
    adjust_lr_fn: str | None = None,
    maximize: bool = False,
    filter: str | None = None,
    alpha: float = 0.98,
    lamb: float = 2.0,
    weight_ema: float | None = None,
) -> dict[str, Tensor]:
    """One matrix after a step along each gradient, and its states."""
    p = start.detach().double()
    buf, average = torch.zeros_like(p), p
    rate = ratio(*p.shape, adjust_lr_fn)
    for g in filtered(grads, filter, alpha, lamb):
        g = -g if maximize else g
        buf = momentum * buf + (1 - momentum) * g
        u = momentum * buf + (1 - momentum) * g if nesterov else buf
        p = (1 - lr * weight_decay) * p - lr * rate * orthogonal(u, triples, eps)
        average = average if weight_ema is None else weight_ema * average + (1 - weight_ema) * p
    states = {"param": p, "momentum_buffer": buf}
    return states if weight_ema is None else states | {"weight_ema": average}


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Parameter:
    generator = torch.Generator().manual_seed(seed)
    return Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def matrices(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [matrix(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES.values())]


def assert_near(actual: Tensor, truth: Tensor, what: str = "", rtol: float = RTOL) -> None:
    """Within ``rtol`` of the largest value."""
    assert actual.shape == truth.shape, what
    if not truth.numel():
        return
    error = (actual.detach().double() - truth.double()).abs().max().item()
    largest = truth.abs().max().item()
    assert error <= rtol * largest, f"{what}: {error:.3g} off, of {largest:.3g}"


def trained(
    params: Sequence[Parameter], steps: int = 3, seed: int = 100, **options: Any
) -> tuple[Muon, list[list[Tensor]]]:
    """An optimizer that has taken some steps, and the gradients of these."""
    optimizer = Muon(params, **options)
    rows = make_grads(params, steps, seed)
    train(optimizer, rows)
    return optimizer, rows


def found(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """A parameter and its states, by name."""
    return {"param": param.detach(), **optimizer.state[param]}
