"""GradFilter without an optimizer inside."""

from copy import deepcopy

import pytest
import torch

from trm_fast.optim import GradFilter

from .filter_checks import FILTERS, each_filter
from .torch_checks import (
    Options,
    assert_same,
    make_grads,
    make_params,
    one,
    set_grads,
    snapshot,
)


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
