"""GradFilter around other optimizers: as filters inside, with gradients as they were."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from trm_fast.optim import AdamATan2, GradFilter, GrokFastAdamW, GrokFastSGD

from .filter_checks import Filter, assert_close, each_filter, few_params, filtered
from .inner_optimizers import INNER, SGD, dense_params, each_inner
from .torch_checks import (
    Options,
    assert_same,
    clone_params,
    make_grads,
    make_params,
    one,
    randn,
    set_grads,
    train,
)

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
