"""``statistics()``: cosine and norms of gradient and mean, as the filters see them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from trm_fast.optim import GradFilter, GrokFastSGD

from .filter_checks import FILTERS, Family, Filter, each_family, each_filter
from .torch_checks import (
    Options,
    assert_same,
    clone_params,
    make_grads,
    make_params,
    one,
    randn,
    set_grads,
    step_with,
    train,
)


def truth(means: list[Tensor], grads: list[Tensor]) -> list[tuple[float, float, float]]:
    found = []
    for mean, grad in zip(means, grads, strict=True):
        norms = grad.norm().item(), mean.norm().item()
        found.append(((grad * mean).sum().item() / (norms[0] * norms[1]), *norms))
    return found


def assert_statistics(optimizer: Any, expected: list[tuple[float, float, float]]) -> None:
    """A sum of n products in float32 is wrong by at most n * 2**-24 of the sum of their sizes; the
    mean has 4 roundings a step."""
    (found,) = optimizer.statistics()
    rows = zip(found.cosine, found.grad_norm, found.mean_norm, strict=True)
    for row, wanted in zip(rows, expected, strict=True):
        assert [value.item() for value in row] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert {(value.dtype, value.shape) for value in row} == {(torch.float64, ())}


@each_family
@each_filter
@pytest.mark.parametrize("steps", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_statistics_are_those_of_float64(
    family: Family, options: Options, steps: int, dtype: torch.dtype
) -> None:
    """Of "ma" with a window of 7: partly filled, and in its second turn."""
    params = make_params(dtype)[:5]
    optimizer = family.ours(params, **options)
    rows = make_grads(params, steps)
    train(optimizer, rows)
    filters = [Filter(**options) for _ in params]
    for row in rows:
        for f, grad in zip(filters, row, strict=True):
            f(grad.double())
    windowed = options["filter"] == "ma"
    means: Any = [sum(f.last) / len(f.last) if windowed else f.mean for f in filters]
    assert_statistics(optimizer, truth(means, [grad.double() for grad in rows[-1]]))
    assert optimizer.statistics()[0].params == params


def test_values_are_tensors_that_nothing_has_waited_for() -> None:
    optimizer = GrokFastSGD([one(1.0)])
    step_with(optimizer, torch.ones(1))
    (found,) = optimizer.statistics()
    assert all(isinstance(value, Tensor) for value in found[1:])


@each_family
@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_maximize_sees_the_negated_gradient(family: Family, filter: str) -> None:
    """As the filter does: a constant gradient is parallel to its mean."""
    more = {"maximize": True}
    optimizer = family.ours([one(1.0, 2.0)], filter=filter, window=3, **more)
    for _ in range(2):
        step_with(optimizer, torch.tensor([3.0, 4.0]))
    assert_statistics(optimizer, [(1.0, 5.0, 5.0)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Both parts of a complex number count."""
    param = Parameter(torch.zeros(2, dtype=dtype))
    value = [3 + 4j, 0] if dtype.is_complex else [3.0, 4.0]
    optimizer = GrokFastSGD([param])
    step_with(optimizer, torch.tensor(value, dtype=dtype))
    assert_statistics(optimizer, [(1.0, 5.0, 5.0)])


@each_family
@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_before_any_step_the_mean_is_zero(family: Family, filter: str) -> None:
    """And has no direction."""
    param = one(1.0, 2.0)
    optimizer = family.ours([param], filter=filter)
    assert optimizer.statistics() == []
    param.grad = torch.tensor([3.0, 4.0])
    (found,) = optimizer.statistics()
    assert found.cosine.isnan().all()
    assert (found.grad_norm.item(), found.mean_norm.item()) == (5.0, 0.0)


@each_family
def test_parameters_without_gradient_or_mean_are_left_out(family: Family) -> None:
    """Asking does not create state."""
    params = [one(1.0), one(2.0), Parameter(torch.ones(1), requires_grad=False)]
    optimizer = family.ours(params, filter="ema")
    set_grads(params, [torch.ones(1)] * 3)
    params[1].grad = None
    assert [found.params for found in optimizer.statistics()] == [[params[0]]]
    assert params[2] not in optimizer.state


@each_family
@pytest.mark.parametrize("options", [{"filter": None}, {"filter": "ema", "lamb": 0.0}], ids=str)
def test_no_filter_sees_nothing(family: Family, options: Options) -> None:
    optimizer = family.ours([one(1.0)], **options)
    step_with(optimizer, torch.ones(1))
    assert optimizer.statistics() == []


def test_groups_and_arithmetics_come_one_by_one() -> None:
    params = [one(1.0), one(1.0, dtype=torch.float64), one(1.0)]
    groups = [{"params": params[:2]}, {"params": params[2:], **FILTERS["ma"]}]
    optimizer = GrokFastSGD(groups)
    set_grads(params, [torch.full_like(param, 2.0) for param in params])
    optimizer.step()
    found = optimizer.statistics()
    assert [entry.params for entry in found] == [[param] for param in params]
    assert [entry.mean_norm.item() for entry in found] == [2.0, 2.0, 2.0]


def test_statistics_change_nothing() -> None:
    params = make_params()
    twins = clone_params(params)
    first, second = (GrokFastSGD(each, filter="projection") for each in (params, twins))
    for row in make_grads(params, 4):
        train(first, [row])
        first.statistics()
        train(second, [row])
    assert_same(params, twins)


def test_filter_around_an_optimizer_and_alone() -> None:
    param = Parameter(randn(5))
    for optimizer in (GradFilter(torch.optim.SGD([param])), GradFilter([param])):
        param.grad = torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0])
        optimizer.step() if optimizer.optimizer else optimizer.apply_()
        (found,) = optimizer.statistics()
        gain = 1.0 if optimizer.optimizer else 3.0  # what apply_ left is the filtered gradient
        assert found.grad_norm.item() == pytest.approx(5.0 * gain)
        assert found.mean_norm.item() == pytest.approx(5.0)
