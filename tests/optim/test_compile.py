"""GrokFastAdamW inside torch.compile: the same step, one graph, no recompilation per number."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import Parameter

from trm_fast import GrokFastAdamW
from trm_fast._dispatch import unusable

from .torch_checks import (
    assert_same,
    assert_within,
    clone_params,
    make_grads,
    make_params,
    needs_cpp,
    set_grads,
    snapshot,
)

COMPILER = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"inductor needs a C++ compiler; {COMPILER} is missing"
)
each_compiler = pytest.mark.parametrize(
    "compiler", ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)]
)
HAS_CPP = unusable("cpp", "cpu") is None
FILTERS = [{}, {"filter": "highpass"}, {"lamb": 0.0}, {"normalize_lr": True, "weight_ema": 0.9}]
MOMENTS = ("step", "grok_step", "exp_avg", "exp_avg_sq", "grok_exp_avg")


def compiled(optimizer: GrokFastAdamW, compiler: Any) -> Callable[[], None]:
    return torch.compile(lambda: optimizer.step(), backend=compiler, fullgraph=True)


def run(
    step: Callable[[], None], optimizer: GrokFastAdamW, rows: list[list[Tensor]], lrs: Any = None
) -> None:
    """One step for each row of gradients, each at its own learning rate if some are given."""
    group = optimizer.param_groups[0]
    for row, lr in zip(rows, lrs or [group["lr"]] * len(rows), strict=True):
        set_grads(group["params"], row)
        group["lr"] = lr
        step()


def two_params() -> list[Parameter]:
    """A matrix and a permuted one; each more costs the compiler its time."""
    return make_params()[:4:3]


def both(
    compiler: Any, lrs: Any, params: list[Parameter], **options: Any
) -> tuple[GrokFastAdamW, GrokFastAdamW]:
    """An optimizer that ran compiled and one that ran eagerly, from the same start."""
    ours, eager = (GrokFastAdamW(ps, **options) for ps in (params, clone_params(params)))
    rows = make_grads(params, len(lrs))
    run(compiled(ours, compiler), ours, rows, lrs)
    run(eager.step, eager, rows, lrs)
    return ours, eager


@needs_cpp
@each_compiler
def test_compiled_step_equals_eager(compiler: str) -> None:
    """Bit for bit, where lr, weight decay and lamb are numbers that float32 holds."""
    options = {"weight_decay": 2.0**-3, "lamb": 2.0, "weight_ema": 0.9}
    ours, eager = both(compiler, [2.0**-6] * 3, make_params(), **options)
    assert_same(snapshot(ours), snapshot(eager))


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_compiled_step_follows_eager_at_any_learning_rate(options: dict[str, Any]) -> None:
    """Moments bit for bit with the same implementation, as neither lr nor weight decay enters them.

    As float32, lr and weight decay are wrong by 2**-24 of their size each. A step moves a weight by
    at most lr * (|m / vhat| + |weight_decay * weight|) < 0.1, because |m / vhat| <= sqrt(5) in five
    steps. Both runs then round the product, the quotient and the stored weight, 2**-24 each of at
    most the largest weight.
    """
    ours, eager = both("aot_eager", [1e-3, 3e-3, 7e-3, 2e-3, 1e-2], two_params(), **options)
    for mine, theirs in zip(snapshot(ours), snapshot(eager), strict=True):
        largest = max(theirs["param"].abs().max().item(), 1.0)
        bound = 5 * (0.1 * 2**-23 + 2 * 3 * 2**-24) * largest
        assert_within(mine["param"], theirs["param"], bound, "param")
        names = [name for name in MOMENTS if name in theirs and HAS_CPP]
        assert_same([mine[name] for name in names], [theirs[name] for name in names])


@pytest.mark.parametrize("options", [{}, {"normalize_lr": True}], ids=["plain", "normalized"])
def test_five_learning_rates_compile_at_most_twice(options: dict[str, Any]) -> None:
    counter = CompileCounter()
    params = two_params()
    optimizer = GrokFastAdamW(params, **options)
    lrs = [1e-3, 2e-3, 3e-3, 5e-3, 8e-3]
    run(compiled(optimizer, counter), optimizer, make_grads(params, 5), lrs)
    assert counter.frame_count <= 2


def test_learning_rate_in_a_tensor_compiles_once() -> None:
    counter = CompileCounter()
    params = two_params()
    lr = torch.tensor(1e-3)
    optimizer = GrokFastAdamW(params, lr=lr)
    step = compiled(optimizer, counter)
    for row in make_grads(params, 5):
        run(step, optimizer, [row])
        lr.mul_(2)
    assert counter.frame_count == 1


def test_learning_rate_in_a_tensor_is_read_at_each_step() -> None:
    params = two_params()
    twins = clone_params(params)
    lr, twin_lr = torch.tensor(2.0**-6), torch.tensor(2.0**-6)
    ours, eager = GrokFastAdamW(params, lr=lr), GrokFastAdamW(twins, lr=twin_lr)
    step = compiled(ours, "aot_eager")
    for row in make_grads(params, 3):
        run(step, ours, [row])
        run(eager.step, eager, [row])
        lr.mul_(0.5)
        twin_lr.mul_(0.5)
    # Equal but for the weight decay of 0.01, which passes as float32.
    assert_same([ours.state[p]["step"] for p in params], [eager.state[p]["step"] for p in twins])
    for ours_now, eager_now in zip(params, twins, strict=True):
        largest = max(eager_now.abs().max().item(), 1.0) if eager_now.numel() else 1.0
        assert_within(ours_now, eager_now, 3 * 2 * 2**-24 * largest, "param")


def test_thawed_parameter_joins_a_compiled_step() -> None:
    rows = [[torch.ones(2), None], [torch.ones(2), torch.ones(1)]]
    results = []
    for compiler in (None, "aot_eager"):
        early, late = Parameter(torch.ones(2)), Parameter(torch.ones(1), requires_grad=False)
        optimizer = GrokFastAdamW([early, late], lr=2.0**-6, weight_decay=2.0**-3)
        step = compiled(optimizer, compiler) if compiler else optimizer.step
        run(step, optimizer, rows[:1])
        late.requires_grad_(True)
        run(step, optimizer, rows[1:])
        results.append(snapshot(optimizer))
    assert_same(results[1], results[0])


def test_parameters_with_and_without_a_mean_step_together() -> None:
    """One met the filter before lamb became 0, the other was frozen until then."""
    results = []
    for compiler in (None, "aot_eager"):
        early, late = Parameter(torch.ones(2)), Parameter(torch.ones(1), requires_grad=False)
        optimizer = GrokFastAdamW([early, late], lr=2.0**-6, weight_decay=2.0**-3)
        run(optimizer.step, optimizer, [[torch.ones(2), None]])
        optimizer.param_groups[0]["lamb"] = 0.0
        late.requires_grad_(True)
        step = compiled(optimizer, compiler) if compiler else optimizer.step
        run(step, optimizer, [[torch.ones(2), torch.ones(1)]])
        results.append(snapshot(optimizer))
    assert_same(results[1], results[0])


@needs_cpp
def test_compiled_and_eager_steps_may_alternate() -> None:
    options = {"lr": 2.0**-6, "weight_decay": 2.0**-3}
    params = two_params()
    ours, eager = (GrokFastAdamW(ps, **options) for ps in (params, clone_params(params)))
    rows = make_grads(params, 4)
    step = compiled(ours, "aot_eager")
    for index, row in enumerate(rows):
        run(step if index % 2 else ours.step, ours, [row])
    run(eager.step, eager, rows)
    assert_same(snapshot(ours), snapshot(eager))


def test_compiled_step_refuses_a_bad_option_by_name() -> None:
    params = two_params()
    optimizer = GrokFastAdamW(params)
    optimizer.param_groups[0]["lr"] = -1.0
    set_grads(params, make_grads(params, 1)[0])
    with pytest.raises(Exception, match="lr must be finite and >= 0"):
        compiled(optimizer, "eager")()


def test_complex_parameters_are_refused_with_the_way_out() -> None:
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    optimizer = GrokFastAdamW([param])
    torch._dynamo.reset()
    with pytest.raises(Exception, match="leave step\\(\\) uncompiled"):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
