"""GrokFastSGD without filter is torch.optim.SGD, and their state dicts go both ways."""

import io
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import OneCycleLR

from trm_fast.optim import GrokFastSGD

from .filter_checks import assert_close, filtered
from .torch_checks import (
    Options,
    assert_same,
    assert_within,
    clone_params,
    make_grads,
    make_params,
    one,
    randn,
    set_grads,
    snapshot,
    step_with,
    train,
)

OPTIONS: dict[str, Options] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "maximize": {"momentum": 0.5, "maximize": True, "weight_decay": 0.1},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
WITHOUT: list[Options] = [{"lamb": 0.0}, {"filter": None}, {"filter": "ma", "lamb": 0.0}]
without_filter = pytest.mark.parametrize("off", WITHOUT, ids=str)
FLAGS: list[Options] = [{}, {"foreach": True}, {"fused": True}, {"foreach": False}]


def with_pauses(rows: list[list[Tensor]]) -> list[list[Tensor | None]]:
    """The first parameter gets its first gradient late, and the second pauses once."""
    paused: list[list[Tensor | None]] = [list(row) for row in rows]
    paused[0][0] = paused[1][0] = paused[4][1] = None
    return paused


@without_filter
@each_option
def test_without_filter_it_is_torch_sgd(options: Options, off: Options) -> None:
    params = make_params(torch.float64)
    truth = torch.optim.SGD(clone_params(params), lr=0.05, **options)
    rows = with_pauses(make_grads(params, 40))
    train(GrokFastSGD(params, lr=0.05, **options, **off), rows)
    train(truth, rows)
    assert_close(params, truth.param_groups[0]["params"])


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@each_option
def test_float32_is_torch_sgd_to_its_roundings(options: Options, flags: Options) -> None:
    """Both against float64: a step rounds the gradient with its decay, the momentum with its
    product, and the weight with its update, 2**-24 each of at most the largest value; the momentum
    adds up to 10 of those."""
    params, lr, steps = make_params(), 0.05, 40
    theirs, exact = clone_params(params), [Parameter(p.detach().double()) for p in params]
    rows = make_grads(params, steps)
    train(GrokFastSGD(params, lr=lr, lamb=0.0, **options, **flags), rows)
    train(torch.optim.SGD(theirs, lr=lr, **options, **flags), rows)
    train(torch.optim.SGD(exact, lr=lr, **options), [[g.double() for g in row] for row in rows])
    for index, (param, twin, truth) in enumerate(zip(params, theirs, exact, strict=True)):
        grad = max((row[index].abs().max().item() for row in rows if param.numel()), default=0.0)
        size = truth.detach().abs() + 10 * lr * grad * steps
        bound = steps * 2**-24 * (2 * size + lr * 10 * 6 * (grad + 0.1 * size))
        assert_within(param, truth, bound, "ours")
        assert_within(twin, truth, bound, "torch")


def test_filter_is_in_front_of_decay_and_momentum() -> None:
    params = make_params(torch.float64)
    options: Options = {"lr": 0.05, **OPTIONS["nesterov"]}
    truth = torch.optim.SGD(clone_params(params), **options)
    rows = make_grads(params, 30)
    train(GrokFastSGD(params, **options), rows)
    train(truth, filtered(rows, alpha=0.98, lamb=2.0))
    assert_close(params, truth.param_groups[0]["params"])


def test_no_momentum_keeps_no_buffer() -> None:
    param = one(1.0)
    optimizer = GrokFastSGD([param], filter=None)
    step_with(optimizer, torch.ones(1))
    assert optimizer.state[param].keys() == {"step"}


def test_momentum_may_be_switched_on_and_off() -> None:
    """As in torch.optim.SGD: the buffer rests, and a new one starts at the gradient."""
    params = make_params(torch.float64)
    ours = GrokFastSGD(params, lr=0.1, lamb=0.0)
    truth = torch.optim.SGD(clone_params(params), lr=0.1)
    rows = make_grads(params, 12)
    for momentum, part in ((0.0, rows[:3]), (0.9, rows[3:6]), (0.0, rows[6:9]), (0.9, rows[9:])):
        for optimizer in (ours, truth):
            optimizer.param_groups[0]["momentum"] = momentum
            train(optimizer, part)
    assert_close(params, truth.param_groups[0]["params"])


def test_one_cycle_moves_momentum_as_in_torch() -> None:
    params = make_params(torch.float64)
    options: Options = {"lr": 0.1, "momentum": 0.9}
    ours, truth = (
        kind(each, **options, **more)
        for kind, each, more in (
            (GrokFastSGD, params, {"lamb": 0.0}),
            (torch.optim.SGD, clone_params(params), {}),
        )
    )
    schedulers = [OneCycleLR(o, 0.2, total_steps=20, cycle_momentum=True) for o in (ours, truth)]
    for row in make_grads(params, 19):
        for optimizer, scheduler in zip((ours, truth), schedulers, strict=True):
            train(optimizer, [row])
            scheduler.step()
    assert_close(params, truth.param_groups[0]["params"])
    assert ours.param_groups[0]["momentum"] != 0.9


# State dicts


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("steps", [0, 1, 10])
@each_option
def test_run_of_torch_continues(options: Options, steps: int) -> None:
    """Before its first step a run of torch has no buffer; ours then starts at the gradient too."""
    params = make_params(torch.float64)
    theirs = torch.optim.SGD(params, lr=0.05, **options)
    rows = make_grads(params, 30)
    train(theirs, rows[:steps])
    ours = GrokFastSGD(clone_params(params), lamb=0.0)
    ours.load_state_dict(through_file(theirs.state_dict()))
    train(theirs, rows[steps:])
    train(ours, rows[steps:])
    assert_close(ours.param_groups[0]["params"], params)


def test_buffers_that_are_none_start_at_the_gradient() -> None:
    """As a dict of torch has them for parameters without gradients so far."""
    params = make_params(torch.float64)
    options: Options = {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}
    theirs = torch.optim.SGD(params, **options)
    rows: Any = make_grads(params, 10)
    train(theirs, [[None, *row[1:]] for row in rows[:4]])
    state_dict = deepcopy(theirs.state_dict())
    state_dict["state"][0] = {"momentum_buffer": None}
    ours = GrokFastSGD(clone_params(params), lamb=0.0)
    ours.load_state_dict(state_dict)
    train(theirs, rows[4:])
    train(ours, rows[4:])
    assert_close(ours.param_groups[0]["params"], params)


@each_option
def test_run_continues_in_torch(options: Options) -> None:
    """torch takes the options it knows and the buffer; what it does not know it keeps aside."""
    params = make_params(torch.float64)
    ours = GrokFastSGD(params, lr=0.05, lamb=0.0, **options)
    rows = make_grads(params, 30)
    train(ours, rows[:10])
    state_dict = through_file(ours.state_dict())
    for state in state_dict["state"].values():
        for key in [key for key in state if key.startswith("grok")]:
            del state[key]
    theirs = torch.optim.SGD(clone_params(params))
    theirs.load_state_dict(state_dict)
    train(theirs, rows[10:])
    train(ours, rows[10:])
    assert_close(theirs.param_groups[0]["params"], params)


@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_filter_of_a_torch_run_starts_at_the_next_gradient(filter: str) -> None:
    params = make_params(torch.float64)
    theirs = torch.optim.SGD(params, lr=0.05, momentum=0.9)
    rows = make_grads(params, 12)
    train(theirs, rows[:5])
    ours = GrokFastSGD(clone_params(params), filter=filter, window=3)
    ours.load_state_dict(deepcopy(theirs.state_dict()))
    train(ours, rows[5:])
    train(theirs, filtered(rows[5:], filter=filter, window=3))
    assert_close(ours.param_groups[0]["params"], params)


# Options that cannot be

BAD: dict[str, tuple[str, Options]] = {
    f"{name}={value}": (name, {name: value})
    for name, value in [
        *product(("lr", "weight_decay", "dampening"), (-0.1, float("nan"), "1", None)),
        *product(("momentum",), (-0.1, 1.0, float("nan"), "1", None)),
        ("dampening", 1.5),
    ]
}
BAD["nesterov without momentum"] = ("nesterov", {"nesterov": True})
BAD["nesterov with dampening"] = (
    "nesterov",
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
)
each_bad = pytest.mark.parametrize(("named", "options"), BAD.values(), ids=BAD)


@each_bad
def test_bad_option_is_refused_by_name(named: str, options: Options) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^GrokFastSGD: {named}"):
        GrokFastSGD([one(1.0)], **options)


@each_bad
def test_bad_option_between_steps_changes_nothing(named: str, options: Options) -> None:
    optimizer = GrokFastSGD([one(1.0), one(2.0)], momentum=0.9)
    step_with(optimizer, torch.ones(1), torch.ones(1))
    before = snapshot(optimizer)
    optimizer.param_groups[0].update({"momentum": 0.0, **options})
    with pytest.raises((ValueError, TypeError), match=rf"^GrokFastSGD: {named}"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("weight_ema", [None, 0.9])
def test_states_are_stepped_where_they_lie_now(weight_ema: float | None) -> None:
    """Without momentum and filter there are no others that would tell."""
    results = []
    for move in (False, True):
        param = Parameter(randn(5))
        optimizer = GrokFastSGD([param], filter=None, weight_ema=weight_ema)
        for _ in range(2):
            step_with(optimizer, torch.ones(5))
            for value in optimizer.state[param].values() if move else ():
                value.data = value.data.clone()
        results.append(snapshot(optimizer))
    assert_same(results[1], results[0])


def test_bad_option_of_a_later_group_is_seen_first() -> None:
    params = [one(1.0), one(2.0)]
    optimizer = GrokFastSGD([{"params": [param]} for param in params])
    set_grads(params, [torch.ones(1)] * 2)
    before = snapshot(optimizer)
    optimizer.param_groups[1]["momentum"] = 2.0
    with pytest.raises(ValueError, match="momentum must be in"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
