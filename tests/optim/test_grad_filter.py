"""GradFilter around other optimizers and alone: as filters inside, and an optimizer itself."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from trm_fast.optim import AdamATan2, GradFilter, GrokFastAdamW, GrokFastSGD

from .filter_checks import FILTERS, Filter, assert_close, each_filter, few_params, filtered
from .torch_checks import (
    Options,
    assert_same,
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

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1)
INNER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": SGD,
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "adamw_fused": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, alpha=0.9),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
}
each_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)


def dense_params(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    """Without the strided view, whose gaps torch's fused steps on a CPU write to."""
    return [param for param in make_params(dtype) if param.stride() != (8, 2)]


# Equal to the filter in front, and to the filter inside


@each_inner
@each_filter
def test_step_equals_the_filter_in_front(inner: Any, options: Options) -> None:
    """Whatever the optimizer inside calls its own options; RMSprop has an alpha."""
    options = options | {"window": 3}
    params = dense_params()
    truth = inner(clone_params(params))
    rows = make_grads(params, 10)
    train(GradFilter(inner(params), **options), rows)
    train(truth, filtered(rows, **options))
    assert_close(params, truth.param_groups[0]["params"])


@each_filter
@pytest.mark.parametrize(
    ("inner", "fused"),
    [
        (SGD, partial(GrokFastSGD, lr=0.05, momentum=0.9, weight_decay=0.1)),
        (INNER["adamw_fused"], partial(GrokFastAdamW, lr=1e-2, weight_decay=0.1)),
    ],
    ids=["sgd", "adamw"],
)
def test_filter_outside_equals_the_filter_inside(inner: Any, fused: Any, options: Options) -> None:
    params = dense_params()
    twins = clone_params(params)
    rows = make_grads(params, 10)
    train(GradFilter(inner(params), **options), rows)
    train(fused(twins, **options), rows)
    assert_close(params, twins)


@each_filter
def test_gradients_filtered_in_place_equal_those_of_a_step(options: Options) -> None:
    params = few_params()
    twins = clone_params(params)
    rows = make_grads(params, 8)
    train(GradFilter(SGD(params), **options), rows)
    alone, inner = GradFilter(twins, **options), SGD(twins)
    for row in rows:
        set_grads(twins, row)
        alone.apply_()
        inner.step()
    assert_same(params, twins)


def test_no_filter_is_the_optimizer_inside() -> None:
    params = make_params()
    twins = clone_params(params)
    rows = make_grads(params, 5)
    train(GradFilter(SGD(params), filter=None), rows)
    train(SGD(twins), rows)
    assert_same(params, twins)


def test_alpha_of_rmsprop_and_of_the_filter_are_two() -> None:
    optimizer = GradFilter(torch.optim.RMSprop([one(1.0)], alpha=0.5), alpha=0.25)
    group = optimizer.param_groups[0]
    assert (group["alpha"], group["filter_alpha"]) == (0.5, 0.25)


@pytest.mark.parametrize("kind", [GrokFastAdamW, GrokFastSGD, AdamATan2, GradFilter])
def test_optimizer_with_a_filter_of_its_own_is_refused(kind: Any) -> None:
    """Both would read the same options of the group."""
    inside = kind(SGD([one(1.0)])) if kind is GradFilter else kind([one(1.0)])
    with pytest.raises(
        ValueError, match=rf"must not have a filter of its own; got {kind.__name__}"
    ):
        GradFilter(inside)


def test_differentiable_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be differentiable"):
        GradFilter(torch.optim.SGD([one(1.0)], differentiable=True))


def test_groups_have_their_own_filters() -> None:
    """Given in the groups of the optimizer inside."""
    params = few_params()[:3]
    wanted: list[Options] = [{"filter": "ema", "lamb": 0.5}, {"filter": "ma", "window": 2}, {}]
    truths = []
    rows = make_grads(params, 6)
    for index, options in enumerate(wanted):
        truth = SGD(clone_params([params[index]]))
        train(truth, filtered([[row[index]] for row in rows], **{"filter": None} | options))
        truths += truth.param_groups[0]["params"]
    groups = [{"params": [p]} | options for p, options in zip(params, wanted, strict=True)]
    train(GradFilter(SGD(groups), filter=None), rows)
    assert_close(params, truths)


def test_options_may_change_between_steps() -> None:
    params = few_params()
    truth = SGD(clone_params(params))
    optimizer = GradFilter(SGD(params), alpha=0.9)
    filters = [Filter(alpha=0.9) for _ in params]
    for row, lamb in zip(make_grads(params, 6), (2.0, 0.0, 1.0, 0.5, 0.0, 3.0), strict=True):
        optimizer.param_groups[0]["lamb"] = lamb
        for f in filters:
            f.lamb = lamb
        train(optimizer, [row])
        train(truth, [[f(grad) for f, grad in zip(filters, row, strict=True)]])
    assert_close(params, truth.param_groups[0]["params"])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16], ids=str)
def test_other_dtypes_are_filtered_as_float32(dtype: torch.dtype) -> None:
    """A bfloat16 gradient is rounded once on its way out, a complex one is two real ones."""
    param = Parameter(randn(4, 3).to(dtype))
    alone = GradFilter([param], lamb=1.0, alpha=0.5)
    filters = Filter(lamb=1.0, alpha=0.5)
    for seed in range(4):
        grad = randn(
            4, 3, seed=seed, dtype=torch.complex64 if param.is_complex() else torch.float32
        )
        param.grad = grad.to(dtype)
        expected = filters(param.grad.to(torch.complex128 if param.is_complex() else torch.float64))
        alone.apply_()
        unit = 2**-8 if dtype == torch.bfloat16 else 4 * 2**-23
        assert param.grad.dtype == dtype
        assert ((param.grad - expected).abs() <= unit * expected.abs().max()).all()


# Gradients are what they were


def held(params: list[Parameter]) -> list[tuple[int, int, int]]:
    return [(id(p.grad), p.grad.data_ptr(), p.grad._version) for p in params if p.grad is not None]


class Failure(Exception):
    pass


class Raises(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise Failure


@pytest.mark.parametrize("kind", [torch.optim.SGD, Raises])
@each_filter
def test_gradients_come_back(kind: Any, options: Options) -> None:
    """The same objects with the same values, also when the optimizer inside raises."""
    params = make_params()
    optimizer = GradFilter(kind(params), **options)
    row: Any = make_grads(params, 1)[0]
    row[1] = None
    set_grads(params, row)
    before = held(params)
    try:
        optimizer.step()
    except Failure:
        assert kind is Raises
    assert held(params) == before
    assert_same([param.grad for param in params], row)


def test_parameter_without_gradient_is_left_alone() -> None:
    params = make_params()
    optimizer = GradFilter(SGD(params))
    rows: Any = make_grads(params, 2)
    train(optimizer, [[None, *rows[0][1:]]])
    assert params[0] not in optimizer.optimizer.state
    assert optimizer.state[params[0]]["grok_step"].item() == 0


def test_refused_gradient_changes_nothing() -> None:
    params = [one(1.0), Parameter(torch.ones(3, 2))]
    optimizer = GradFilter(SGD(params))
    params[0].grad, params[1].grad = torch.ones(1), torch.ones(3, 2).to_sparse()
    before = deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same(optimizer.state_dict(), before)
    assert_same([p.detach() for p in params], [torch.ones(1), torch.ones(3, 2)])


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


# Alone


@each_filter
def test_values_change_where_they_are(options: Options) -> None:
    params = make_params()
    alone = GradFilter(params, **options)
    set_grads(params, make_grads(params, 1)[0])
    before = [(id(param.grad), param.grad.data_ptr()) for param in params]
    alone.apply_()
    assert [(id(param.grad), param.grad.data_ptr()) for param in params] == before


@pytest.mark.parametrize(("filter", "truth"), [("ema", [3.0] * 5), ("ma", [6.0] * 5)])
def test_gradients_zeroed_in_place_do_not_reach_the_filter(filter: str, truth: list[float]) -> None:
    """A published filter that keeps p.grad itself gives 2.999, 6.918, 6.839 for ones."""
    param = one(0.0, dtype=torch.float64)
    lamb, options = (2.0, {}) if filter == "ema" else (5.0, {"window": 3, "warmup": False})
    alone = GradFilter([param], filter=filter, lamb=lamb, **options)
    param.grad = torch.zeros_like(param)
    found = []
    for _ in truth:
        alone.zero_grad(set_to_none=False)
        param.grad += 1.0
        alone.apply_()
        found.append(param.grad.item())
    assert found == pytest.approx(truth, rel=1e-14)


def test_warm_up_window_does_not_alias_gradients() -> None:
    """Gradients 1, 2, 3 with a window of 3 and lamb 5 give 3 + 5 * 2 = 13; the published one 18."""
    param = one(0.0, dtype=torch.float64)
    alone = GradFilter([param], filter="ma", lamb=5.0, window=3)
    param.grad = torch.zeros_like(param)
    for value in (1.0, 2.0, 3.0):
        alone.zero_grad(set_to_none=False)
        param.grad += value
        alone.apply_()
    assert param.grad.item() == 13.0


@each_filter
def test_overflow_leaves_gradients_and_filter_alone(options: Options) -> None:
    """As if the call had not been, and a tensor of zero is no overflow."""
    params, twins = make_params(), make_params()
    alone, plain = GradFilter(params, **options), GradFilter(twins, **options)
    rows = make_grads(params, 6)
    for t, row in enumerate(rows):
        set_grads(params, row)
        if t in (0, 3):
            params[0].grad[1, 2] = torch.inf
            before = deepcopy((snapshot(alone), alone.state_dict()))
            alone.apply_(found_inf=torch.tensor(2.0))
            assert_same((snapshot(alone), alone.state_dict()), before)
        else:
            set_grads(twins, row)
            alone.apply_(found_inf=torch.zeros(1))
            plain.apply_()
            assert_same(snapshot(alone), snapshot(plain))


def test_step_without_an_optimizer_names_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"call apply_\(\)"):
        GradFilter([one(1.0)]).step()


def test_filter_alone_is_saved_and_loaded() -> None:
    params = make_params(torch.bfloat16)
    alone = GradFilter(params, **FILTERS["ma"])
    for row in make_grads(params, 4):
        set_grads(params, row)
        alone.apply_()
    other = GradFilter(make_params(torch.bfloat16), **FILTERS["ma"])
    other.load_state_dict(deepcopy(alone.state_dict()))
    assert_same(other.state_dict(), alone.state_dict())


def test_optimizer_that_needs_a_closure_is_refused_by_name() -> None:
    inside = torch.optim.LBFGS([torch.nn.Parameter(torch.ones(2))])
    wanted = r"GradFilter: the optimizer inside must step without a closure.*got LBFGS.*apply_\(\)"
    with pytest.raises(ValueError, match=wanted):
        GradFilter(inside)
