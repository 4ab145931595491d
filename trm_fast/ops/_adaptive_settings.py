"""The scalars of an adaptive step; their meaning is in trm_fast/ops/adaptive_step.py."""

from dataclasses import dataclass, field
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

RULES = ("adamw", "adam", "atan2", "sgd", "momentum", "filter")
FILTERS = ("none", "ema", "highpass", "projection", "cosine_gate", "ma")
REDUCING = ("projection", "cosine_gate")  # filters that look at sums over a tensor
Scalar = float | Tensor

# The arguments of the native op, in the order of ``Settings.arguments``.
SCHEMA = (
    "int rule, int filter, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, float alpha, float lamb, "
    "int after_step, bool maximize, float weight_ema, "
    "float dampening, bool nesterov, bool warmup, float proj_eps, "
    "Tensor? lr_at, Tensor? weight_decay_at, Tensor? lamb_at, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor? clip"
)


@dataclass(slots=True)
class Settings:
    """The scalars of one call.

    Args:
        lr: learning rate, >= 0.
        beta1: decay of the first moment, in [0, 1); the momentum of "sgd" and "momentum".
        beta2: decay of the second moment, in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decay of the weights per unit of learning rate, >= 0.
        rule: "adamw", "adam", "atan2", "sgd", "momentum" or "filter".
        filter: "none", "ema", "highpass", "projection", "cosine_gate" or "ma".
        alpha: decay of the filter state mu, in [0, 1].
        lamb: weight of the filter state, >= 0; > 0 for "cosine_gate".
        after_step: number of first steps without filter.
        maximize: whether gradients are negated.
        weight_ema: decay of the weight average, in [0, 1].
        grad_scale: what the gradients were multiplied by, a tensor of one element, or None.
        found_inf: not zero if the step must be skipped, a tensor of one element, or None.
        clip: factor of the gradients, a tensor of one element, or None.
        dampening: share of the gradient that "sgd" keeps out of its momentum, in [0, 1].
        nesterov: whether "sgd" and "momentum" look ahead.
        warmup: whether "ma" leaves gradients alone until its window is full.
        proj_eps: "projection" leaves a tensor alone whose ||mu||^2 is not above this, >= 0.

    Raises:
        ValueError: a number is out of range or not finite, or a name is unknown. Tensors are not
            looked into, because the host would have to wait for them.
    """

    lr: Scalar
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: Scalar = 0.0
    rule: str = "adamw"
    filter: str = "none"
    alpha: float = 0.98
    lamb: Scalar = 0.0
    after_step: int = 0
    maximize: bool = False
    weight_ema: float = 0.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    clip: Tensor | None = None
    dampening: float = 0.0
    nesterov: bool = False
    warmup: bool = True
    proj_eps: float = 1e-10
    owner: str = "adaptive_step_"  # who speaks in an error
    # What ``arguments`` returned last, as long as no tensor is among it.
    _numbers: tuple[Any, ...] | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._require(self.rule in RULES, "rule", f"one of {', '.join(RULES)}")
        self._require(self.filter in FILTERS, "filter", f"one of {', '.join(FILTERS)}")
        for name in ("lr", "weight_decay", "lamb"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                self._require(value.numel() == 1, name, "a number or a tensor of one element")
                setattr(self, name, value.reshape(()))
            else:
                self._require(0 <= self._number(name) < inf, name, "finite and >= 0")
        if self.filter == "cosine_gate":
            gated = isinstance(self.lamb, Tensor) or self.lamb > 0
            self._require(gated, "lamb", "> 0 for filter 'cosine_gate', which divides by it")
        for name in ("grad_scale", "found_inf", "clip"):
            self.scale(name, getattr(self, name))
        for name in ("eps", "proj_eps"):
            self._require(0 <= self._number(name) < inf, name, "finite and >= 0")
        if not isinstance(self.after_step, int):
            raise TypeError(f"{self.owner}: after_step must be an int; got {self.after_step!r}")
        self._require(self.after_step >= 0, "after_step", ">= 0")
        for name in ("beta1", "beta2"):
            self._require(0 <= self._number(name) < 1, name, "in [0, 1)")
        for name in ("alpha", "weight_ema", "dampening"):
            self._require(0 <= self._number(name) <= 1, name, "in [0, 1]")

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if name != "_numbers":
            object.__setattr__(self, "_numbers", None)

    def scale(self, name: str, value: Tensor | None) -> None:
        """Sets "grad_scale", "found_inf" or "clip", checked."""
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{self.owner}: {name} must be a tensor or None; got {value!r}")
        if value is not None or getattr(self, name) is not None:
            setattr(self, name, value)
        if value is not None:
            self._require(value.numel() == 1, name, "a tensor of one element")
            setattr(self, name, value.reshape(()))

    @property
    def reduces(self) -> bool:
        """Whether the step needs sums over whole tensors first."""
        return self.filter in REDUCING

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) and not isinstance(value, Real):
            raise TypeError(f"{self.owner}: {name} must be a number; got {value!r}")
        return value  # type: ignore[return-value]

    def _require(self, holds: bool, name: str, required: str) -> None:
        if not holds:
            came = getattr(self, name)
            raise ValueError(f"{self.owner}: {name} must be {required}; got {came!r}")

    def arguments(self, device: torch.device) -> tuple[Any, ...]:
        """Returns the scalars in the order of the schema, for tensors on ``device``."""
        if self._numbers is not None:
            return self._numbers
        lr, lr_at = _split(self.lr, device)
        weight_decay, weight_decay_at = _split(self.weight_decay, device)
        lamb, lamb_at = _split(self.lamb, device)
        optional = (self.grad_scale, self.found_inf, self.clip)
        arguments = (
            RULES.index(self.rule), FILTERS.index(self.filter),
            lr, self.beta1, self.beta2, self.eps, weight_decay, self.alpha, lamb,
            self.after_step, self.maximize, self.weight_ema,
            self.dampening, self.nesterov, self.warmup, self.proj_eps,
            lr_at, weight_decay_at, lamb_at,
            *(None if tensor is None else tensor.to(device, torch.float32) for tensor in optional),
        )  # fmt: skip
        tensors = (self.lr, self.weight_decay, self.lamb, *optional)
        if not any(isinstance(value, Tensor) for value in tensors):
            self._numbers = arguments if not torch.compiler.is_compiling() else None
        return arguments

    @classmethod
    def from_arguments(cls, *arguments: Any) -> "Settings":
        """Reverses ``arguments``."""
        rule, filter, lr, beta1, beta2, eps, weight_decay, alpha, lamb, *rest = arguments
        after_step, maximize, weight_ema, dampening, nesterov, warmup, proj_eps, *rest = rest
        lr_at, weight_decay_at, lamb_at, grad_scale, found_inf, clip = rest
        return cls(
            lr if lr_at is None else lr_at, beta1, beta2, eps,
            weight_decay if weight_decay_at is None else weight_decay_at,
            RULES[rule], FILTERS[filter], alpha, lamb if lamb_at is None else lamb_at,
            after_step, maximize, weight_ema, grad_scale, found_inf, clip,
            dampening, nesterov, warmup, proj_eps,
        )  # fmt: skip


def _split(value: Scalar, device: torch.device) -> tuple[float, Tensor | None]:
    """Returns a number, or a tensor for the device to read, because the host must not wait."""
    if torch.compiler.is_compiling():
        # A number would be burnt into the graph, and each new learning rate would compile again.
        if not isinstance(value, Tensor):
            return 0.0, torch.full((), value, dtype=torch.float32, device=device)
    elif not isinstance(value, Tensor):
        return value, None
    elif value.device.type == "cpu":
        return float(value), None
    return 0.0, value.to(device, torch.float32)
