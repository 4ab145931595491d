"""Optimizers made of several passes, beside the same written as separate torch code.

One table for the gradient filters, with 100 gradients in every window, and one for the step of
official TRM training: filter, clipping, AdamATan2 and weight average. A row is measured after it
has arrived where the formula in float64 does.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import AdamW

import trm_fast
from trm_fast.ops import FILTERS

from ._adaptive_step_variants import (
    ADAMW,
    ALPHA,
    BETAS,
    EPS,
    FUSED,
    LAMB,
    LR,
    WEIGHT_DECAY,
    OfficialFilter,
    Params,
)
from ._tables import DEVICES, Row, rows_of
from ._tables import Case as Table
from ._workload import CACHES, COPY, SIZES, Workload, copy_row

WINDOW, CLIP, AVERAGE = 100, 1.0, 0.999
OFFICIAL_MA, OFFICIAL_EMA = "official window filter + AdamW fused", "official EMA + AdamW fused"
ALL_IN_ONE = "trm_fast AdamATan2, all in one"
STEPS = 3
BYTES = {"ma": 46, "projection": 44, "cosine_gate": 44}  # per parameter; 36 with a mean alone
Grads = list[Tensor]
Filter = Callable[[Grads, list[Grads]], Grads]


@dataclass(frozen=True)
class Case:
    """A way to take a step.

    Args:
        name: its row in the table.
        step: takes a step of the parameters, whose gradients are in place.
        truth: what the formula gives after the first steps; None for rows that only compare.
        bytes_per_param: what one step moves, or None if nobody has counted it.
        one_pass: ``bytes_per_param`` is the least that the algorithm can move.
        fill: brings windows to their full length after the check.
        keeps: holds on to gradients, so that each step needs new ones.
    """

    name: str
    step: Callable[[], object]
    truth: list[Tensor] | None
    bytes_per_param: float | None
    one_pass: bool = True
    fill: Callable[[], None] = lambda: None
    keeps: bool = False


class OfficialWindow:
    """The published window filter: a deque of gradients for each tensor, summed anew each time.

    As in ironjr/grokfast at 93b2248 with warmup=False.
    """

    def __init__(self, params: Params) -> None:
        self.params = params
        self.windows = [deque(maxlen=WINDOW) for _ in params]

    @torch.no_grad()
    def __call__(self) -> None:
        for param, window in zip(self.params, self.windows, strict=True):
            window.append(param.grad.data.detach())
            param.grad.data = param.grad.data + sum(window) / len(window) * LAMB

    def fill(self) -> None:
        for param, window in zip(self.params, self.windows, strict=True):
            while len(window) < WINDOW:
                window.append(torch.ones_like(param))


class SeparateStep:
    """Filter, clipping, AdamATan2 and weight average one after the other.

    ``form`` is "published", tensor by tensor and operator by operator, with the average as official
    TRM writes it; "in place", tensor by tensor with the operators that torch fuses; or "foreach",
    one call per operation for all tensors.
    """

    def __init__(self, params: Params, form: str) -> None:
        self.params, self.t = list(params), 0
        forms = {"published": self._published, "in place": self._in_place, "foreach": self._foreach}
        self.update = forms[form]
        self.filter = OfficialFilter(params)
        self.m = [torch.zeros_like(param) for param in params]
        self.v = [torch.zeros_like(param) for param in params]
        self.average = [param.detach().clone() for param in params]

    @torch.no_grad()
    def __call__(self) -> None:
        self.t += 1
        torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        self.filter()
        bias1, bias2 = 1 - BETAS[0] ** self.t, 1 - BETAS[1] ** self.t
        self.update(bias1, bias2)

    def _published(self, bias1: float, bias2: float) -> None:
        for i, param in enumerate(self.params):
            grad = param.grad
            param.mul_(1 - LR * WEIGHT_DECAY)
            self.m[i].lerp_(grad, 1 - BETAS[0])
            self.v[i].lerp_(grad * grad, 1 - BETAS[1])
            angle = torch.atan2(self.m[i], (self.v[i] / bias2).sqrt())
            param.add_(-LR / bias1 * angle)
            self.average[i] = (1 - AVERAGE) * param + AVERAGE * self.average[i]

    def _foreach(self, bias1: float, bias2: float) -> None:
        grads = [param.grad for param in self.params]
        torch._foreach_mul_(self.params, 1 - LR * WEIGHT_DECAY)
        torch._foreach_lerp_(self.m, grads, 1 - BETAS[0])
        torch._foreach_mul_(self.v, BETAS[1])
        torch._foreach_addcmul_(self.v, grads, grads, 1 - BETAS[1])
        roots = torch._foreach_sqrt(self.v)
        torch._foreach_div_(roots, bias2**0.5)
        angles = [torch.atan2(m, root) for m, root in zip(self.m, roots, strict=True)]
        torch._foreach_add_(self.params, angles, alpha=-LR / bias1)
        torch._foreach_lerp_(self.average, self.params, 1 - AVERAGE)

    def _in_place(self, bias1: float, bias2: float) -> None:
        states = zip(self.params, self.m, self.v, self.average, strict=True)
        for param, m, v, average in states:
            param.mul_(1 - LR * WEIGHT_DECAY)
            m.lerp_(param.grad, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(param.grad, param.grad, value=1 - BETAS[1])
            root = v.sqrt().div_(bias2**0.5)
            param.add_(torch.atan2(m, root), alpha=-LR / bias1)
            average.mul_(AVERAGE).add_(param, alpha=1 - AVERAGE)


def _filtered(name: str | None, grads: list[Grads]) -> list[Grads]:
    """Returns what a filter makes of the gradients of the first steps, by its formula."""
    results, means = [], grads[0]
    for t, now in enumerate(grads, 1):
        means = [ALPHA * mean + (1 - ALPHA) * grad for mean, grad in zip(means, now, strict=True)]
        if name == "ma":
            means = [sum(past) / t for past in zip(*grads[:t], strict=True)]
        results.append([_one(name, grad, mean) for grad, mean in zip(now, means, strict=True)])
    return results


def _one(name: str | None, grad: Tensor, mean: Tensor) -> Tensor:
    if name == "highpass":
        return grad + LAMB * (grad - mean)
    if name == "projection":
        return grad + LAMB * (grad * mean).sum() / (mean * mean).sum() * mean
    if name == "cosine_gate":
        aligned = (grad * mean).sum() > 0.5 * grad.norm() * mean.norm()
        return grad * LAMB if aligned else grad / LAMB
    if name in ("ema", "ma"):
        return grad + LAMB * mean
    if name is None:
        return grad
    raise NotImplementedError(f"the formula of filter {name!r}")


@torch.no_grad()
def _truth(workload: Workload, name: str | None, angle: bool, clip: bool) -> list[Tensor]:
    """Returns the parameters after the first steps, by the formula in float64."""
    grads = [[grad.double() for grad in workload.grads[t % 2]] for t in range(STEPS)]
    if clip:
        norms = [torch.stack([grad.norm() for grad in now]).norm() for now in grads]
        factors = [min(1.0, CLIP / float(norm)) for norm in norms]
        grads = [[g * f for g in now] for now, f in zip(grads, factors, strict=True)]
    rows = _filtered(name, grads)
    results = []
    for index, start in enumerate(workload.start):
        param, m, v = start.double(), 0.0, 0.0
        for t, row in enumerate(rows, 1):
            m = BETAS[0] * m + (1 - BETAS[0]) * row[index]
            v = BETAS[1] * v + (1 - BETAS[1]) * row[index] ** 2
            mhat, root = m / (1 - BETAS[0] ** t), (v / (1 - BETAS[1] ** t)).sqrt()
            update = torch.atan2(m, root) / (1 - BETAS[0] ** t) if angle else mhat / (root + EPS)
            param = param * (1 - LR * WEIGHT_DECAY) - LR * update
        results.append(param)
    return results


# As FLOAT32_BOUND of bench_adaptive_step.py: 3 steps, each rounding at most 4 numbers of the size
# of a parameter and 16 of the size of an update. An update is at most 30 LR: clipped gradients are
# as small as 1e-4, where eps still counts for nothing.
BOUND = STEPS * torch.finfo(torch.float32).eps / 2 * (4 * 1.1 + 16 * 30 * LR)


def _backward(workload: Workload, case: Case) -> Callable[[], None]:
    return workload.backward_into_new if case.keeps else workload.backward


def _check(workload: Workload, case: Case) -> None:
    workload.reset()
    for _ in range(STEPS):
        _backward(workload, case)()
        case.step()
    if case.truth is not None:
        pairs = zip(workload.params, case.truth, strict=True)
        worst = max(float((param.detach() - true).abs().max()) for param, true in pairs)
        # Written so that NaN fails.
        if not worst <= BOUND:
            raise AssertionError(
                f"{case.name}: must be within {BOUND:.1e} of the formula; got {worst:.1e}"
            )
    case.fill()


def _ours(workload: Workload, name: str | None, size: float) -> Case:
    options = {"filter": name, "alpha": ALPHA, "lamb": LAMB, "window": WINDOW, "warmup": False}
    optimizer = trm_fast.GrokFastAdamW(workload.params, **ADAMW, **options)

    @torch.no_grad()
    def fill() -> None:
        for state in optimizer.state.values():
            if "grok_ring" in state:
                state["grok_ring"].fill_(1.0)
                state["grok_sum"].fill_(WINDOW)
                state["grok_step"].fill_(WINDOW)

    return Case(
        f"trm_fast {name}", optimizer.step, _truth(workload, name, False, False), size, fill=fill
    )


def _behind(workload: Workload, name: str, filter_: Callable[[], None], known: str) -> Case:
    optimizer = AdamW(workload.params, **ADAMW, fused=True)

    def step() -> None:
        filter_()
        optimizer.step()

    fill = getattr(filter_, "fill", lambda: None)
    keeps = isinstance(filter_, OfficialWindow)
    return Case(name, step, _truth(workload, known, False, False), None, fill=fill, keeps=keeps)


class OptimizerTable:
    """Cases on shared parameters, made by name."""

    baselines = (FUSED,)
    floor = COPY
    unit = "B"
    cases: Mapping[str, Callable[[Workload], Case]]

    def __init__(self, device: str, caches: str) -> None:
        self.device = device
        self.workload = Workload(SIZES["TRM 7M"], device, caches)

    def row(self, name: str) -> Row:
        if name == COPY:
            return copy_row(self.workload)
        case = self.cases[name](self.workload)
        _check(self.workload, case)
        size = case.bytes_per_param
        work = None if size is None else size * self.workload.size
        return Row(case.step, _backward(self.workload, case), work=work, least=case.one_pass)


def _fused(workload: Workload) -> Case:
    adamw = AdamW(workload.params, **ADAMW, fused=True)
    return Case(FUSED, adamw.step, _truth(workload, None, False, False), 28)


class Filters(OptimizerTable):
    """Every filter of gradients, and the published ones."""

    cases: ClassVar = {
        **{
            f"trm_fast {name}": partial(_ours, name=name, size=BYTES.get(name, 36))
            for name in FILTERS
            if name != "none"
        },
        FUSED: _fused,
        OFFICIAL_EMA: lambda workload: _behind(
            workload, OFFICIAL_EMA, OfficialFilter(workload.params), "ema"
        ),
        OFFICIAL_MA: lambda workload: _behind(
            workload, OFFICIAL_MA, OfficialWindow(workload.params), "ma"
        ),
    }


def _all_in_one(workload: Workload) -> Case:
    optimizer = trm_fast.AdamATan2(
        workload.params, LR, BETAS, WEIGHT_DECAY,
        filter="ema", alpha=ALPHA, lamb=LAMB, clip_norm=CLIP, weight_ema=AVERAGE,
    )  # fmt: skip
    return Case(ALL_IN_ONE, optimizer.step, _truth(workload, "ema", True, True), 48)


def _separate(workload: Workload, form: str) -> Case:
    step = SeparateStep(workload.params, form)
    return Case(f"separate, {form}", step, _truth(workload, "ema", True, True), None)


class OfficialStep(OptimizerTable):
    """The step of official TRM training: filter, clipping, AdamATan2 and weight average."""

    cases: ClassVar = {
        ALL_IN_ONE: _all_in_one,
        **{
            f"separate, {form}": partial(_separate, form=form)
            for form in ("published", "in place", "foreach")
        },
        FUSED: _fused,
    }


def _tables(kind: type[OptimizerTable], what: str) -> Iterator[Table]:
    for device in DEVICES:
        for caches in CACHES:
            yield Table(
                f"{device}-{caches}", f"{what}, TRM 7M, {caches} caches, {device}",
                partial(kind, device, caches), (*kind.cases, COPY),
            )  # fmt: skip


test_filters = rows_of(_tables(Filters, f"Filters, window {WINDOW}"))
test_official_trm_step = rows_of(
    _tables(OfficialStep, "Filter, clipping, AdamATan2, weight average")
)
