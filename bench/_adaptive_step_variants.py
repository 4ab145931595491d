"""Every way to take a GrokFast AdamW step that ``bench_adaptive_step.py`` compares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

import trm_fast
from trm_fast._dispatch import ORDER

from ._tables import Unavailable

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2
ALPHA, LAMB = 0.98, 2.0
FILTER = {"grokfast_alpha": ALPHA, "grokfast_lamb": LAMB}
ADAMW = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
BF16 = {"exp_avg": torch.bfloat16, "grok_exp_avg": torch.bfloat16}

FORMS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
}
FUSED, FOREACH_FUSED = "AdamW fused", "foreach filter + AdamW fused"
OFFICIAL_FUSED = "official filter + AdamW fused"
OURS = "trm_fast "

# Bytes per parameter and step. In one pass over float32: param 8, grad 4, and 8 for each state. A
# chain of operators: 4 for each operand that one of them reads or writes.
ONE_PASS, ONE_PASS_BF16, ONE_PASS_PLAIN = 36, 28, 28
ADAMW_BYTES = {"fused": 28, "foreach": 80, "for-loop": 80}
OFFICIAL_BYTES, FOREACH_BYTES = 48, 24
# Other packages: bytes per parameter and step, and options.
FOREIGN = {
    # It multiplies the decay by lr over the first lr, where AdamW multiplies by lr.
    "grokfast-pytorch": (128, {"weight_decay": LR * WEIGHT_DECAY, **FILTER}),
    "pytorch-optimizer": (104, {"weight_decay": WEIGHT_DECAY, **FILTER}),
}

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


def variant(name: str, params: Params, device: str) -> Variant:
    """Makes one variant, with states of its own, for given parameters.

    Raises:
        Unavailable: it cannot run here.
    """
    if name.startswith(OURS):
        backend, _, detail = name.removeprefix(OURS).partition(", ")
        return _our(params, device, backend, detail)
    if name in FOREIGN:
        return _foreign(name, params)
    front, _, form = name.rpartition("AdamW ")
    adamw = AdamW(params, **ADAMW, **FORMS[form])
    size = ADAMW_BYTES[form]
    if front == "":
        return _variant(name, adamw, size, one_pass=form == "fused", filtered=False)
    if front == "official filter + ":
        return _behind_filter(name, OfficialFilter(params), adamw, OFFICIAL_BYTES + size)
    return _behind_filter(name, ForeachFilter(params), adamw, FOREACH_BYTES + size)


def names(device: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of all variants on a device, and those that are left out by default."""
    fast = [f"{OURS}{backend}" for backend in ORDER[device] if backend != "reference"]
    first = [name + detail for detail in ("", ", bf16 states", ", lamb=0") for name in fast]
    first += [FUSED, FOREACH_FUSED, OFFICIAL_FUSED, "grokfast-pytorch"]
    plain = [f"AdamW {form}" for form in FORMS if form != "fused"]
    official = [f"official filter + {name}" for name in plain]
    return tuple(first), (f"{OURS}reference", *plain, *official, "pytorch-optimizer")


def _our(params: Params, device: str, backend: str, detail: str) -> Variant:
    reason = trm_fast.backends()["adaptive_step"][device][backend]
    if reason not in ("usable", "chosen"):
        raise Unavailable(reason)
    size: float | None = ONE_PASS
    options: dict[str, Any] = {"alpha": ALPHA, "lamb": LAMB}
    if detail == "bf16 states":
        size, options["state_dtype"] = ONE_PASS_BF16, BF16
    elif detail == "lamb=0":
        size, options["lamb"] = ONE_PASS_PLAIN, 0.0
    if backend == "reference":
        # A chain of operators that nobody has counted.
        size = None
    optimizer = trm_fast.GrokFastAdamW(params, **ADAMW, **options, backend=backend)
    filtered, bf16 = options["lamb"] != 0, "state_dtype" in options
    return _variant(
        f"{OURS}{backend}" + (f", {detail}" if detail else ""),
        optimizer,
        size,
        one_pass=size is not None,
        filtered=filtered,
        bf16=bf16,
    )


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


def _foreign(package: str, params: Params) -> Variant:
    size, options = FOREIGN[package]
    try:
        optimizer_class = import_module(package.replace("-", "_")).GrokFastAdamW
    except ImportError as error:
        raise Unavailable(f"{error}: pip install {package}") from error
    # Without this the learning rate would be divided by 1 + lamb.
    options = ADAMW | options | {"normalize_lr": False}
    return _variant(package, optimizer_class(params, **options), size, one_pass=False, foreign=True)
