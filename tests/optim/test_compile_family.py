"""The family inside torch.compile: every rule and filter in one graph, and none per number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import Parameter

from trm_fast.optim import AdamATan2, GradFilter

from .filter_checks import FAMILIES, FILTERS, Family, each_family, each_filter
from .torch_checks import (
    Options,
    assert_same,
    assert_within,
    clone_params,
    make_grads,
    make_params,
    set_grads,
    snapshot,
)

# Numbers that float32 holds, as a compiled step hands its numbers over in tensors.
EXACT: Options = {"lr": 2.0**-6, "weight_decay": 2.0**-3}


def compiled(optimizer: Any, compiler: Any = "eager") -> Callable[[], None]:
    return torch.compile(lambda: optimizer.step(), backend=compiler, fullgraph=True)


def run(step: Callable[[], None], optimizer: Any, rows: list[list[Tensor]]) -> None:
    for row in rows:
        set_grads(optimizer.param_groups[0]["params"], row)
        step()


def both(family: Family, options: Options) -> tuple[Any, Any, list[list[Tensor]]]:
    """Two optimizers over equal parameters, and gradients for 5 steps."""
    params = two_params()
    ours, eager = (family.ours(each, **options) for each in (params, clone_params(params)))
    return ours, eager, make_grads(params, 5)


def two_params() -> list[Parameter]:
    """A matrix and a permuted one; each more costs the compiler its time."""
    return make_params()[:4:3]


@each_family
@each_filter
def test_compiled_step_equals_eager(family: Family, options: Options) -> None:
    """Bit for bit: parameters, moments, means, rings, counters and averages."""
    more = {"weight_ema": 0.75, "window": 2, "lamb": 2.0}
    ours, eager, rows = both(family, options | EXACT | more)
    run(compiled(ours), ours, rows)
    run(eager.step, eager, rows)
    assert_same(snapshot(ours), snapshot(eager))


@each_family
@pytest.mark.parametrize("filter", [None, "ema", "projection", "ma"])
def test_compiled_step_clips_alike(family: Family, filter: str | None) -> None:
    """Two ways to take the norm, in float32 and in float64: 2**-22 of each of 5 clipped gradients,
    whose momentum is at most 5 of them and whose gain at most 3."""
    ours, eager, rows = both(family, EXACT | {"filter": filter, "clip_norm": 0.5, "window": 2})
    run(compiled(ours), ours, rows)
    run(eager.step, eager, rows)
    assert ours.grad_norm.item() == pytest.approx(eager.grad_norm.item(), rel=2**-20)
    for mine, theirs in zip(snapshot(ours), snapshot(eager), strict=True):
        bound = 5 * 2.0**-6 * 15 * 2**-20 + 5 * 2**-23 * theirs["param"].abs()
        assert_within(mine["param"], theirs["param"], bound, "param")


# A rule has its numbers and a filter has its own; not each with each.
RECOMPILED = [
    *((family, FILTERS["ema"]) for family in FAMILIES.values()),
    *((FAMILIES["sgd"], options) for name, options in FILTERS.items() if name != "ema"),
    (FAMILIES["atan2"], {"filter": None}),
]


@pytest.mark.parametrize(("family", "options"), RECOMPILED)
def test_other_numbers_compile_at_most_once_more(family: Family, options: Options) -> None:
    """Once with numbers that are constants, and once with numbers that are not."""
    counter = CompileCounter()
    optimizer, _, rows = both(family, options | {"window": 2})
    step = compiled(optimizer, counter)
    for row, lr in zip(rows, (1e-3, 2e-3, 3e-3, 5e-3, 8e-3), strict=True):
        optimizer.param_groups[0].update(lr=lr, lamb=100 * lr)
        run(step, optimizer, [row])
    assert counter.frame_count <= 2


@each_family
def test_numbers_in_tensors_compile_once(family: Family) -> None:
    counter = CompileCounter()
    lr, lamb = torch.tensor(1e-3), torch.tensor(2.0)
    optimizer, _, rows = both(family, {"lr": lr, "lamb": lamb, "filter": "ema"})
    step = compiled(optimizer, counter)
    for row in rows:
        run(step, optimizer, [row])
        lr.mul_(2)
        lamb.mul_(0.5)
    assert counter.frame_count == 1


def test_lr_0_at_construction_and_a_schedule_of_floats() -> None:
    """As official TRM trains."""
    counter = CompileCounter()
    params = two_params()
    ours, eager = (
        AdamATan2(each, lr=0, betas=(0.9, 0.95)) for each in (params, clone_params(params))
    )
    step = compiled(ours, counter)
    for t, row in enumerate(make_grads(params, 6)):
        for optimizer, move in ((ours, step), (eager, eager.step)):
            optimizer.param_groups[0]["lr"] = 2.0**-10 * (t + 1)
            run(move, optimizer, [row])
    assert counter.frame_count <= 3  # the whole number 0, one float, any float
    for mine, theirs in zip(snapshot(ours), snapshot(eager), strict=True):
        # The weight decay of 0.01 passes as float32: 2**-24 of at most lr * 0.01 of a weight.
        bound = 6 * (2**-24 + 2**-23) * theirs["param"].abs()
        assert_within(mine["param"], theirs["param"], bound, "param")


def test_clipping_compiles_once() -> None:
    counter = CompileCounter()
    params = two_params()
    optimizer = AdamATan2(params, lr=torch.tensor(1e-3), clip_norm=0.5)
    run(compiled(optimizer, counter), optimizer, make_grads(params, 4))
    assert counter.frame_count == 1


@pytest.mark.parametrize("fullgraph", [True, False])
def test_filter_around_an_optimizer_stays_outside(fullgraph: bool) -> None:
    """With a word where a graph may not break, and with the steps it would have taken elsewhere."""
    params = two_params()
    twins = clone_params(params)
    ours, eager = (GradFilter(torch.optim.SGD(each, lr=0.1)) for each in (params, twins))
    step = torch.compile(lambda: ours.step(), backend="eager", fullgraph=fullgraph)
    rows = make_grads(params, 2)
    if fullgraph:
        with pytest.raises(Exception, match="_filtered"):
            run(step, ours, rows)
        return
    run(step, ours, rows)
    run(eager.step, eager, rows)
    assert_same(params, twins)
