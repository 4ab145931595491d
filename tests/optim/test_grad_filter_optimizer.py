"""GradFilter as an optimizer: schedulers, scalers, hooks, closures, groups, states and copies."""

import pickle
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from trm_fast.optim import GradFilter

from .filter_checks import assert_close, each_filter, few_params, filtered
from .inner_optimizers import INNER, SGD, dense_params, each_inner
from .torch_checks import (
    Options,
    assert_same,
    clone_params,
    make_grads,
    make_params,
    one,
    set_grads,
    snapshot,
    step_with,
    train,
)

# An optimizer for schedulers, scalers, hooks and closures


@each_inner
def test_scheduler_of_the_filter_moves_the_optimizer_inside(inner: Any) -> None:
    params = dense_params()
    optimizer, truth = GradFilter(inner(params), lamb=1.0), inner(clone_params(params))
    schedulers = [LambdaLR(o, lambda t: 1 / (1 + t)) for o in (optimizer, truth)]
    rows = make_grads(params, 6)
    for row, expected in zip(rows, filtered(rows, lamb=1.0), strict=True):
        for each, grads, scheduler in zip(
            (optimizer, truth), (row, expected), schedulers, strict=True
        ):
            train(each, [grads])
            scheduler.step()
    assert_close(params, truth.param_groups[0]["params"])


@pytest.mark.parametrize("inner", [SGD, INNER["adamw"]], ids=["momentum", "betas"])
def test_one_cycle_moves_momentum(inner: Any) -> None:
    params = few_params()
    optimizer, truth = GradFilter(inner(params), filter=None), inner(clone_params(params))
    schedulers = [
        OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=True) for o in (optimizer, truth)
    ]
    for row in make_grads(params, 7):
        for each, scheduler in zip((optimizer, truth), schedulers, strict=True):
            train(each, [row])
            scheduler.step()
    assert_same(params, truth.param_groups[0]["params"])
    name = "betas" if "betas" in truth.defaults else "momentum"
    assert optimizer.param_groups[0][name] == truth.param_groups[0][name] != truth.defaults[name]


AMP = {"with_amp": partial(SGD, fused=True), "without_amp": SGD}


@pytest.mark.parametrize("inner", AMP.values(), ids=AMP)
@pytest.mark.parametrize("unscale", [False, True])
@each_filter
def test_scaler_skips_and_unscales(inner: Any, unscale: bool, options: Options) -> None:
    """A step with an inf changes neither weights nor any state, and the others are as without."""
    params = dense_params(torch.float32)
    twins = clone_params(params)
    optimizer, plain = GradFilter(inner(params), **options), GradFilter(inner(twins), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=1)
    rows = make_grads(params, 4)
    for t, row in enumerate(rows):
        scale = scaler.scale(torch.ones(())).item()
        set_grads(params, [grad * scale for grad in row])
        if t == 2:
            params[1].grad[3] = torch.inf
        before = deepcopy((list(params), optimizer.state_dict()))
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if t == 2:
            assert_same((list(params), optimizer.state_dict()), before)
        else:
            train(plain, [row])
    assert_same(params, twins)
    assert_same(optimizer.state_dict(), plain.state_dict())


def test_closure_runs_once_with_gradients_enabled() -> None:
    param = one(1.0, 2.0)
    optimizer = GradFilter(SGD([param]))
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 5.0
    assert calls == [True]
    assert_same(param.grad, torch.tensor([2.0, 4.0]))


def test_hooks_of_both_run_in_order() -> None:
    calls: list[str] = []
    inner = SGD([one(1.0)])
    optimizer = GradFilter(inner)
    for name, each in (("filter", optimizer), ("inside", inner)):
        each.register_step_pre_hook(lambda *_, name=name: calls.append(f"before {name}"))
        each.register_step_post_hook(lambda *_, name=name: calls.append(f"after {name}"))
    step_with(optimizer, torch.ones(1))
    assert calls == ["before filter", "before inside", "after inside", "after filter"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_reaches_all_parameters(set_to_none: bool) -> None:
    params = make_params()
    optimizer = GradFilter(SGD(params))
    set_grads(params, make_grads(params, 1)[0])
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [param.grad for param in params]
    assert grads == [None] * 6 if set_to_none else not any(grad.any() for grad in grads)


# Groups


def test_added_group_is_seen_by_both() -> None:
    params = few_params()
    twins = clone_params(params)
    inner = SGD(params[:2])
    optimizer, truth = GradFilter(inner, lamb=1.0), SGD(twins[:2])
    rows = make_grads(params, 6)
    train(optimizer, [row[:2] for row in rows[:3]])
    train(truth, filtered([row[:2] for row in rows[:3]], lamb=1.0))
    optimizer.add_param_group({"params": params[2:], "lr": 0.5, "lamb": 3.0})
    assert optimizer.param_groups is inner.param_groups
    assert "grok_exp_avg" in optimizer.state[params[2]]
    train(optimizer, rows[3:])
    late = filtered([row[2:] for row in rows[3:]], lamb=3.0)
    train(SGD(twins[2:], lr=0.5), late)
    early = filtered([row[:2] for row in rows], lamb=1.0)
    train(truth, early[3:])
    assert_close(params, twins)


@pytest.mark.parametrize(
    "group",
    [{"params": [one(3.0)], "lamb": -1.0}, {"params": [one(3.0)], "filter": "x"}, {"params": "x"}],
    ids=["lamb", "filter", "params"],
)
def test_group_that_is_refused_leaves_both_as_they_were(group: Options) -> None:
    inner = SGD([one(1.0)])
    optimizer = GradFilter(inner)
    before = deepcopy(optimizer.state_dict())
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group(group)
    assert optimizer.param_groups is inner.param_groups
    assert_same(optimizer.state_dict(), before)


def test_group_added_inside_gets_the_defaults_of_the_filter() -> None:
    params = few_params()[:2]
    twins = clone_params(params)
    inner = SGD(params[:1])
    optimizer = GradFilter(inner, lamb=1.0)
    inner.add_param_group({"params": params[1:]})
    rows = make_grads(params, 3)
    train(optimizer, rows)
    train(SGD(twins), filtered(rows, lamb=1.0))
    assert_close(params, twins)


def test_state_loaded_inside_leaves_the_groups_shared() -> None:
    params = few_params()
    inner = SGD(params)
    optimizer = GradFilter(inner)
    train(optimizer, make_grads(params, 1))
    inner.load_state_dict(deepcopy(inner.state_dict()))
    train(optimizer, make_grads(params, 1))
    assert optimizer.param_groups is inner.param_groups


def test_names_of_parameters_are_those_of_the_optimizer_inside() -> None:
    inner = SGD([("first", one(1.0)), ("second", one(2.0))])
    optimizer = GradFilter(inner)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["first", "second"]


# State dicts and copies


@each_inner
@each_filter
def test_resumed_run_equals_uninterrupted(inner: Any, options: Options) -> None:
    params = dense_params(torch.float32)
    optimizer = GradFilter(inner(params), **options)
    rows = make_grads(params, 8)
    train(optimizer, rows[:4])
    other = GradFilter(inner(clone_params(params)), **options)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    assert other.param_groups is other.optimizer.param_groups
    train(optimizer, rows[4:])
    train(other, rows[4:])
    assert_same(other.param_groups[0]["params"], params)
    assert_same(other.state_dict(), optimizer.state_dict())


COPIES = {"deepcopy": deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("target", [SGD, INNER["rmsprop"], list], ids=["sgd", "rmsprop", "alone"])
def test_copy_continues_alike(copy: Any, target: Any) -> None:
    """With groups that it shares with its own optimizer, not with the original."""
    params = make_params()
    optimizer = GradFilter(target(params), filter="ma", window=3)
    move = GradFilter.step if optimizer.optimizer else GradFilter.apply_
    rows = make_grads(params, 6)
    for t, row in enumerate(rows):
        if t == 3:
            other = copy(optimizer)
            twins = other.param_groups[0]["params"]
            if other.optimizer is not None:
                assert other.param_groups is other.optimizer.param_groups
        set_grads(params, row)
        move(optimizer)
        if t >= 3:
            set_grads(twins, row)
            move(other)
    assert_same(snapshot(other), snapshot(optimizer))
    assert repr(other).startswith("GradFilter (")


@pytest.mark.parametrize("around", [True, False])
def test_dict_of_the_other_form_is_refused(around: bool) -> None:
    params = make_params()
    wrapped, alone = GradFilter(SGD(params)), GradFilter(make_params())
    target, source = (alone, wrapped) if around else (wrapped, alone)
    before = deepcopy(target.state_dict())
    with pytest.raises(ValueError, match="GradFilter: state_dict must hold"):
        target.load_state_dict(source.state_dict())
    assert_same(target.state_dict(), before)
