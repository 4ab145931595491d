"""Muon and MuGrokfast inside torch.compile: the same step, one graph, no new one per number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import Parameter

from trm_fast import MuGrokfast, Muon

from .muon_checks import assert_near, matrix
from .torch_checks import assert_same, make_grads, set_grads, snapshot

SHAPES = [(16, 4), (4, 12), (8, 8), (12, 2, 3, 2)]


def muon(**options: Any) -> Muon:
    return Muon([matrix(*shape, seed=i) for i, shape in enumerate(SHAPES)], **options)


def fused(**options: Any) -> Muon:
    """Splits with two ratios, and a float64 matrix among them."""
    params = [matrix(12, 4), matrix(12, 7, seed=1), matrix(12, 5, seed=2, dtype=torch.float64)]
    return Muon(params, row_splits=(8, 2, 2), **options)


def experts(**options: Any) -> Muon:
    return Muon([matrix(3, 8, 5), matrix(2, 8, 4, seed=1)], batch_dims=1, row_splits=2, **options)


def mugrokfast(**options: Any) -> MuGrokfast:
    hidden = {"params": [matrix(8, 8), matrix(4, 12, seed=1)], "algorithm": "muon"}
    rest = {"params": [matrix(9, 3, seed=2), matrix(7, seed=3)], "algorithm": "adamw"}
    if "lr" in options:
        options["muon_lr"] = options["lr"]
    return MuGrokfast([hidden, rest], **options)


MAKERS: dict[str, Callable[..., Muon]] = {
    "muon": muon,
    "fused": fused,
    "experts": experts,
    "mugrokfast": mugrokfast,
}
# Numbers that float32 holds, as the compiled step takes them; all ratios of these shapes are 1 or 2
# but for those of the fused ones.
EXACT = {"lr": 2.0**-5, "weight_decay": 2.0**-3}


def params_of(optimizer: Muon) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def run(step: Callable[[], Any], optimizer: Muon, rows: Any, lrs: Any = None) -> None:
    for index, row in enumerate(rows):
        set_grads(params_of(optimizer), row)
        if lrs is not None:
            for group in optimizer.param_groups:
                group["lr"] = lrs[index]
        step()


def compiled(optimizer: Muon, compiler: Any) -> Callable[[], None]:
    return torch.compile(lambda: optimizer.step(), backend=compiler, fullgraph=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged, filtered": {"weight_ema": 0.9, "filter": "ema", "lamb": 0.5},
    "no nesterov, in float32": {"nesterov": False, "ns_dtype": torch.float32},
}


# Each takes a second, so no full product.
CASES = [(maker, "averaged, filtered", "aot_eager") for maker in MAKERS]
CASES += [(maker, "plain", "eager") for maker in MAKERS]
CASES += [("muon", "no nesterov, in float32", "aot_eager")]


@pytest.mark.parametrize(("maker", "options", "compiler"), CASES)
def test_compiled_step_equals_eager(maker: str, options: str, compiler: str) -> None:
    make = MAKERS[maker]
    ours, eager = (make(**EXACT, **OPTIONS[options]) for _ in range(2))
    rows = make_grads(params_of(ours), 3)
    run(compiled(ours, compiler), ours, rows)
    run(eager.step, eager, rows)
    if make in (muon, mugrokfast):
        # (12, 2, 3, 2) is [12, 12]; (16, 4) has the ratio 2.
        assert_same(snapshot(ours), snapshot(eager))
        return
    for mine, theirs in zip(snapshot(ours), snapshot(eager), strict=True):
        for name, value in theirs.items():
            # lr * ratio and the decay over it, rounded to float32: 2^-24 each, in each step.
            exact = name not in ("param", "weight_ema")
            assert_near(mine[name], value, name, 0.0 if exact else 3 * 2 * 2**-23)


@pytest.mark.parametrize("make", [muon, mugrokfast])
def test_five_learning_rates_compile_at_most_twice(make: Callable[..., Muon]) -> None:
    counter = CompileCounter()
    optimizer = make()
    rows = make_grads(params_of(optimizer), 5)
    run(compiled(optimizer, counter), optimizer, rows, [1e-3, 2e-3, 3e-3, 5e-3, 8e-3])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("make", [muon, mugrokfast])
def test_learning_rate_in_a_tensor_compiles_once_and_is_read(make: Callable[..., Muon]) -> None:
    counter = CompileCounter()
    lr, twin_lr = torch.tensor(2.0**-4), torch.tensor(2.0**-4)
    optimizer, eager = make(lr=lr, weight_decay=2.0**-3), make(lr=twin_lr, weight_decay=2.0**-3)
    step = compiled(optimizer, counter)
    for row in make_grads(params_of(optimizer), 4):
        run(step, optimizer, [row])
        run(eager.step, eager, [row])
        lr.mul_(0.5)
        twin_lr.mul_(0.5)
    assert counter.frame_count == 1
    assert_same(snapshot(optimizer), snapshot(eager))


def test_compiled_and_eager_steps_may_alternate() -> None:
    ours, eager = (muon(weight_ema=0.9, **EXACT) for _ in range(2))
    rows = make_grads(params_of(ours), 4)
    step = compiled(ours, "aot_eager")
    for index, row in enumerate(rows):
        run(step if index % 2 else ours.step, ours, [row])
    run(eager.step, eager, rows)
    assert_same(snapshot(ours), snapshot(eager))


def test_missing_gradients_are_skipped_and_thawed_ones_join() -> None:
    results = []
    for compiler in (None, "aot_eager"):
        optimizer = muon(**EXACT)
        rows = [[*row[:2], None, row[3]] for row in make_grads(params_of(optimizer), 2)]
        rows += make_grads(params_of(optimizer), 1, seed=5)
        run(compiled(optimizer, compiler) if compiler else optimizer.step, optimizer, rows)
        results.append(snapshot(optimizer))
    assert_same(results[1], results[0])


def test_clipped_compiled_step_is_near_the_eager_one() -> None:
    options = {"clip_norm": 0.5, "ns_dtype": torch.float32, **EXACT}
    ours, eager = (mugrokfast(**options) for _ in range(2))
    rows = make_grads(params_of(ours), 3)
    run(compiled(ours, "aot_eager"), ours, rows)
    run(eager.step, eager, rows)
    for mine, theirs in zip(snapshot(ours), snapshot(eager), strict=True):
        # The norm is summed in another order, 2^-20 of it; small singular values lift that.
        assert_near(mine["param"], theirs["param"], "param", 485 * 2**-20)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", -1.0, "lr must be finite and >= 0"),
        ("row_splits", 5, "row_splits=5 divides"),
        ("ns_steps", 0, "steps must be >= 1"),
    ],
)
def test_compiled_step_refuses_bad_options_by_name(name: str, value: Any, message: str) -> None:
    optimizer = muon()
    optimizer.param_groups[0][name] = value
    set_grads(params_of(optimizer), make_grads(params_of(optimizer), 1)[0])
    before = snapshot(optimizer)
    with pytest.raises(Exception, match=message):
        compiled(optimizer, "eager")()
    assert_same(snapshot(optimizer), before)
