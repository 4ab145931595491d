"""Every way to take a GrokFast AdamW step that ``bench_adaptive_step.py`` compares."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

import trm_fast
from trm_fast._dispatch import ORDER

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2
ALPHA, LAMB = 0.98, 2.0
ADAMW = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
BF16 = {"exp_avg": torch.bfloat16, "grok_exp_avg": torch.bfloat16}

FORMS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
}
FUSED, FOREACH_FUSED = "AdamW fused", "foreach filter + AdamW fused"
OFFICIAL_FUSED = "official filter + AdamW fused"

# Bytes per parameter and step. In one pass over float32: param 8, grad 4, and 8 for each state. A
# chain of operators: 4 for each operand that one of them reads or writes.
ONE_PASS, ONE_PASS_BF16, ONE_PASS_PLAIN = 36, 28, 28
ADAMW_BYTES = {"fused": 28, "foreach": 80, "for-loop": 80}
OFFICIAL_BYTES, FOREACH_BYTES = 48, 24

Params = Sequence[Tensor]


@dataclass(eq=False)
class Variant:
    """A way to take a step of given parameters.

    Args:
        name: its row in the table.
        step: takes the step; the gradients are in place, and may be written or replaced.
        states: returns the states and filter states as they are after a step.
        bytes_per_param: what one step moves, or None.
        one_pass: ``bytes_per_param`` is the least that the algorithm can move.
        filtered: the gradient passes through the filter.
        bf16: the first moment and the mean are stored in bfloat16.
        foreign: it comes from a package that is neither ours nor torch.
    """

    name: str
    step: Callable[[], object]
    states: Callable[[], list[Tensor]]
    bytes_per_param: float | None
    one_pass: bool = True
    filtered: bool = True
    bf16: bool = False
    foreign: bool = False


@dataclass(frozen=True)
class Missing:
    """A variant that cannot run, and why."""

    name: str
    reason: str


def variants(params: Params, device: str) -> Iterator[Variant | Missing]:
    """Makes all variants, each with states of its own, for the same parameters."""
    yield from _ours(params, device)
    for form, options in FORMS.items():
        adamw = AdamW(params, **ADAMW, **options)
        name, size = f"AdamW {form}", ADAMW_BYTES[form]
        yield _variant(name, adamw, size, one_pass=form == "fused", filtered=False)
    for form, options in FORMS.items():
        adamw = AdamW(params, **ADAMW, **options)
        name, size = f"official filter + AdamW {form}", OFFICIAL_BYTES + ADAMW_BYTES[form]
        yield _behind_filter(name, OfficialFilter(params), adamw, size)
    adamw = AdamW(params, **ADAMW, fused=True)
    size = FOREACH_BYTES + ADAMW_BYTES["fused"]
    yield _behind_filter(FOREACH_FUSED, ForeachFilter(params), adamw, size)
    yield _grokfast_pytorch(params)
    yield _pytorch_optimizer(params)


def our_name(backend: str, detail: str = "") -> str:
    return f"trm_fast {backend}" + (f", {detail}" if detail else "")


def _ours(params: Params, device: str) -> Iterator[Variant | Missing]:
    states = trm_fast.backends()["adaptive_step"][device]
    usable = [backend for backend in ORDER[device] if states[backend] in ("usable", "chosen")]
    fast = [backend for backend in usable if backend != "reference"]
    for backend in ORDER[device]:
        if backend in usable:
            # The reference is a chain of operators that nobody has counted.
            one_pass = backend != "reference"
            yield _our(params, backend, "", ONE_PASS if one_pass else None, one_pass=one_pass)
        else:
            yield Missing(our_name(backend), states[backend])
    for backend in fast:
        yield _our(params, backend, "bf16 states", ONE_PASS_BF16, bf16=True, state_dtype=BF16)
    for backend in fast:
        yield _our(params, backend, "lamb=0", ONE_PASS_PLAIN, filtered=False, lamb=0.0)


def _our(
    params: Params,
    backend: str,
    detail: str,
    size: float | None,
    one_pass: bool = True,
    filtered: bool = True,
    bf16: bool = False,
    **options: Any,
) -> Variant:
    options = {"alpha": ALPHA, "lamb": LAMB} | options
    optimizer = trm_fast.GrokFastAdamW(params, **ADAMW, **options, backend=backend)
    facts = {"one_pass": one_pass, "filtered": filtered, "bf16": bf16}
    return _variant(our_name(backend, detail), optimizer, size, **facts)


def _variant(name: str, optimizer: Optimizer, size: float | None, **facts: bool) -> Variant:
    return Variant(name, optimizer.step, lambda: _states(optimizer), size, **facts)


def _behind_filter(name: str, filter_: Any, optimizer: Optimizer, size: float) -> Variant:
    def step() -> None:
        filter_()
        optimizer.step()

    def states() -> list[Tensor]:
        return [*filter_.means.values(), *_states(optimizer)]

    return Variant(name, step, states, size, one_pass=False)


def _states(optimizer: Optimizer) -> list[Tensor]:
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor)]


class OfficialFilter:
    """The published EMA filter: one operator after the other, and a new gradient for each tensor.

    As in ironjr/grokfast at 93b2248; the first mean is the first gradient.
    """

    def __init__(self, params: Params) -> None:
        self.params = {f"{index}": param for index, param in enumerate(params)}
        self.means: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> None:
        if not self.means:
            self.means = {name: param.grad.data for name, param in self.params.items()}
        for name, param in self.params.items():
            self.means[name] = self.means[name] * ALPHA + param.grad.data * (1 - ALPHA)
            param.grad.data = param.grad.data + self.means[name] * LAMB


class ForeachFilter:
    """The same filter in two calls for all tensors together, on the gradients where they lie."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.means: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> None:
        grads = [param.grad for param in self.params]
        if not self.means:
            self.means = {index: grad.clone() for index, grad in enumerate(grads)}
        means = list(self.means.values())
        torch._foreach_lerp_(means, grads, 1 - ALPHA)
        torch._foreach_add_(grads, means, alpha=LAMB)


def _grokfast_pytorch(params: Params) -> Variant | Missing:
    # It multiplies the decay by lr over the first lr, where AdamW multiplies by lr.
    options = {"weight_decay": LR * WEIGHT_DECAY, "grokfast_alpha": ALPHA, "grokfast_lamb": LAMB}
    return _foreign("grokfast-pytorch", "grokfast_pytorch", params, 128, options)


def _pytorch_optimizer(params: Params) -> Variant | Missing:
    options = {"weight_decay": WEIGHT_DECAY, "grokfast_alpha": ALPHA, "grokfast_lamb": LAMB}
    return _foreign("pytorch-optimizer", "pytorch_optimizer", params, 104, options)


def _foreign(
    package: str, module: str, params: Params, size: float, options: dict[str, Any]
) -> Variant | Missing:
    try:
        optimizer_class = import_module(module).GrokFastAdamW
    except ImportError as error:
        return Missing(package, f"{error}: pip install {package}")
    # Without this the learning rate would be divided by 1 + lamb.
    options = ADAMW | options | {"normalize_lr": False}
    return _variant(package, optimizer_class(params, **options), size, one_pass=False, foreign=True)
