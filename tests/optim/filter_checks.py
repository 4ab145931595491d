"""The filters and the optimizers behind them in float64, and the cases that several tests share."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import trm_fast
from trm_fast.optim import AdamATan2, GrokFastAdamW, GrokFastSGD

from .torch_checks import Options, assert_within, make_params, randn

# At most 40 roundings of 2**-53 per step and value, relative to terms no larger than the largest
# value: after 200 steps below 200 * 40 * 2**-53 = 8.9e-13.
RTOL = 1e-12


class Filter:
    """The filter of one tensor, as it is published: one gradient in, the filtered one out.

    "ma" is a deque and Python's sum; the options are attributes, to be changed between gradients.
    """

    def __init__(
        self,
        filter: str | None = "ema",
        alpha: float = 0.98,
        lamb: float = 2.0,
        after_step: int = 0,
        window: int = 100,
        warmup: bool = True,
        proj_eps: float = 1e-10,
    ) -> None:
        self.filter, self.alpha, self.lamb, self.after_step = filter, alpha, lamb, after_step
        self.warmup, self.proj_eps = warmup, proj_eps
        self.mean: Tensor | None = None
        self.last: deque[Tensor] = deque(maxlen=window)
        self.t = 0

    def __call__(self, grad: Tensor) -> Tensor:
        self.t += 1
        held_back = self.t <= self.after_step
        if self.filter is None:
            return grad
        if self.filter == "ma":
            self.last.append(grad)
            full = len(self.last) == self.last.maxlen
            if held_back or (self.warmup and not full):
                return grad
            return grad + self.lamb * sum(self.last) / len(self.last)
        if held_back:
            return grad
        if self.mean is None:
            self.mean = grad
        else:
            self.mean = self.alpha * self.mean + (1 - self.alpha) * grad
        return self._amplified(grad, self.mean)

    def _amplified(self, grad: Tensor, mean: Tensor) -> Tensor:
        if self.filter == "ema":
            return grad + self.lamb * mean
        if self.filter == "highpass":
            return grad + self.lamb * (grad - mean)
        dot, square = (grad * mean).sum().item(), (mean * mean).sum().item()
        if self.filter == "projection":
            return grad + self.lamb * dot / square * mean if square > self.proj_eps else grad
        norms = math.sqrt(square) * grad.norm().item()
        aligned = norms > 0 and dot / norms > 0.5
        return self.lamb * grad if aligned else grad / self.lamb


Row = Sequence[Tensor | None]


def filtered(rows: Sequence[Row], **options: Any) -> list[list[Tensor | None]]:
    """The gradients behind the filter, which each parameter has for itself."""
    filters = [Filter(**options) for _ in rows[0]]
    return [
        [None if grad is None else f(grad) for f, grad in zip(filters, row, strict=True)]
        for row in rows
    ]


class ATan2(torch.optim.Optimizer):
    """Adam-atan2 as its authors print it, one operation after the other."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), weight_decay: float = 1e-2
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for param in (param for param in group["params"] if param.grad is not None):
                state = self.state[param]
                t = state["step"] = state.get("step", 0) + 1
                m = beta1 * state.get("exp_avg", torch.zeros_like(param)) + (1 - beta1) * param.grad
                v = beta2 * state.get("exp_avg_sq", torch.zeros_like(param))
                v = v + (1 - beta2) * param.grad**2
                state["exp_avg"], state["exp_avg_sq"] = m, v
                param.mul_(1 - lr * group["weight_decay"])
                angle = torch.atan2(m, (v / (1 - beta2**t)).sqrt())
                param.sub_(lr / (1 - beta1**t) * angle)


class Family(NamedTuple):
    """An optimizer with a filter inside, what it is without one, and options that both take."""

    ours: Any
    truth: Any
    options: Options


FAMILIES = {
    "adamw": Family(
        GrokFastAdamW,
        torch.optim.AdamW,
        {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1},
    ),
    "sgd": Family(
        GrokFastSGD,
        torch.optim.SGD,
        {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    ),
    "atan2": Family(AdamATan2, ATan2, {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}),
}
FILTERS: dict[str, Options] = {
    "ema": {"filter": "ema", "alpha": 0.9},
    "highpass": {"filter": "highpass", "lamb": 0.1},
    "projection": {"filter": "projection", "alpha": 0.8},
    "cosine_gate": {"filter": "cosine_gate", "alpha": 0.5, "lamb": 3.0},
    "ma": {"filter": "ma", "window": 7, "lamb": 5.0},
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
each_filter = pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)


NO_CPP = trm_fast.backends()["adaptive_step"]["cpu"]["cpp"] not in ("usable", "chosen")
needs_cpp = pytest.mark.skipif(NO_CPP, reason="the C++ library is not built")
each_backend = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpp", marks=needs_cpp)]
)


def few_params(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    """A matrix, a strided view, a permuted tensor and a scalar."""
    params = make_params(dtype)
    return [params[0], params[2], params[3], params[4]]


def in_other_order(grad: Tensor) -> Tensor:
    """The same gradient in another order of memory, as a transposed product leaves it."""
    return grad.t().contiguous().t() if grad.dim() == 2 else grad


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for index, (ours, truth) in enumerate(zip(actual, expected, strict=True)):
        largest = truth.detach().abs().max().item() if truth.numel() else 0.0
        assert_within(ours, truth, RTOL * largest, f"tensor {index}")


def two_linear(seed: int = 0) -> torch.nn.Sequential:
    """A small model whose weights do not depend on the global generator."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            param.copy_(0.5 * randn(*param.shape, seed=seed + index))
    return model
