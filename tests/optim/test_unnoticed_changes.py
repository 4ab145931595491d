"""What a user may change between two steps without a word to the optimizer: when a kept step is
used again, when it is made anew, and that either is the step of an optimizer that kept nothing."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import trm_fast
from trm_fast import GradFilter, GrokFastAdamW, GrokFastSGD, Muon

from .torch_checks import assert_same, needs_cpp, randn, snapshot

Change = Callable[[Any], object]


def adamw(**options: Any) -> GrokFastAdamW:
    params = [Parameter(randn(4, 3)), Parameter(randn(5, seed=1))]
    return with_grads(GrokFastAdamW(params, lr=0.1, weight_ema=0.9, **options))


def with_grads(optimizer: Any) -> Any:
    """New gradients for all parameters that train."""
    for seed, param in enumerate(params_of(optimizer)):
        param.grad = randn(*param.shape, seed=10 + seed, dtype=param.dtype)
    return optimizer


def params_of(optimizer: Any) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def plan_of(optimizer: Any, index: int = 0) -> Any:
    return optimizer._cache._plans[index]


def assert_step(optimizer: Any, change: Change, *, kept: bool) -> None:
    """Steps before and after a change; a copy, which never keeps anything, has the same result."""
    optimizer.step()
    before = plan_of(optimizer)
    change(optimizer)
    copy = deepcopy(optimizer)
    for param, twin in zip(params_of(optimizer), params_of(copy), strict=True):
        twin.grad = None
        if param.grad is not None:
            twin.grad_dtype = param.grad.dtype
            twin.grad = param.grad.clone()
    optimizer.step()
    copy.step()
    assert (plan_of(optimizer) is before) is kept
    assert_same(snapshot(optimizer), snapshot(copy))


# The criteria, one by one


def set_option(**options: Any) -> Change:
    return lambda optimizer: optimizer.param_groups[0].update(options)


def zero_moments(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state["exp_avg"].zero_()


def shrink_params(optimizer: Any) -> None:
    with torch.no_grad():
        for param in params_of(optimizer):
            param.mul_(0.5)


KEEPING: dict[str, Change] = {
    "new gradients": with_grads,
    "learning rate": set_option(lr=0.2),
    "learning rate in a tensor": set_option(lr=torch.tensor(0.2)),
    "betas": set_option(betas=[0.5, 0.6]),
    "alpha and lamb": set_option(alpha=0.5, lamb=3.0),
    "lamb 0": set_option(lamb=0.0),
    "decay of the average": set_option(weight_ema=0.5),
    "highpass, with the same state": set_option(filter="highpass"),
    "values of states": zero_moments,
    "values of parameters": shrink_params,
}


@pytest.mark.parametrize("change", KEEPING.values(), ids=KEEPING)
def test_step_is_kept_where_only_numbers_change(change: Change) -> None:
    if change is KEEPING["lamb 0"]:
        # Another set of states must exist, so it is looked for once more.
        assert_step(adamw(), change, kept=False)
    else:
        assert_step(adamw(), change, kept=True)


def drop_gradient(optimizer: Any) -> None:
    params_of(optimizer)[0].grad = None


def reverse(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].reverse()


def other_object(optimizer: Any) -> None:
    """A parameter over the same memory."""
    old = params_of(optimizer)[0]
    optimizer.param_groups[0]["params"][0] = new = Parameter(old.detach())
    new.grad = old.grad


def sixteen_bit_gradients(optimizer: Any) -> None:
    for param in params_of(optimizer):
        grad, param.grad = param.grad, None
        param.grad_dtype = torch.bfloat16
        param.grad = grad.bfloat16()


def other_dictionaries(optimizer: Any) -> None:
    for param, state in list(optimizer.state.items()):
        optimizer.state[param] = dict(state)


def cleared(optimizer: Any) -> None:
    optimizer.state.clear()


def other_tensor(optimizer: Any) -> None:
    state = optimizer.state[params_of(optimizer)[0]]
    state["exp_avg_sq"] = state["exp_avg_sq"].clone() * 2


def fewer_tensors(optimizer: Any) -> None:
    del optimizer.state[params_of(optimizer)[0]]["weight_ema"]


def moved_params(optimizer: Any) -> None:
    for param in params_of(optimizer):
        param.data = param.data.clone()


def transposed_params(optimizer: Any) -> None:
    param = params_of(optimizer)[0]
    param.data = param.data.t().contiguous().t()


def moved_states(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def shared_states(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.share_memory_()


def loaded(optimizer: Any) -> None:
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))


MAKING_ANEW: dict[str, Change] = {
    # 1. options
    "no filter": set_option(filter=None),
    "window": set_option(filter="ma", window=2),
    "no average": set_option(weight_ema=None),
    "one by one": set_option(fused=False),
    # 3. parameters
    "no gradient": drop_gradient,
    "order": reverse,
    "another parameter": other_object,
    # 4. gradients
    "dtype of gradients": sixteen_bit_gradients,
    # 5. states
    "dictionaries": other_dictionaries,
    "no states": cleared,
    "a tensor": other_tensor,
    "a tensor less": fewer_tensors,
    "loaded": loaded,
    # 6. memory
    "parameters": moved_params,
    "strides": transposed_params,
    "states": moved_states,
    "shared states": shared_states,
}


@pytest.mark.parametrize("change", MAKING_ANEW.values(), ids=MAKING_ANEW)
def test_step_is_made_anew(change: Change) -> None:
    assert_step(adamw(), change, kept=False)


@pytest.mark.parametrize(
    "change",
    [
        set_option(row_splits=2), set_option(adjust_lr_fn="spectral"), set_option(ns_steps=2),
        set_option(ns_dtype=torch.float32), set_option(ns_coefficients="you"),
    ],
    ids=["row_splits", "adjust_lr_fn", "ns_steps", "ns_dtype", "ns_coefficients"],
)  # fmt: skip
def test_step_of_matrices_is_made_anew_for_another_shape_or_method(change: Change) -> None:
    optimizer = Muon([Parameter(randn(4, 6)), Parameter(randn(8, 2, seed=1))], lr=0.1)
    assert_step(with_grads(optimizer), change, kept=False)


def test_step_of_matrices_is_kept_for_other_numbers() -> None:
    optimizer = Muon([Parameter(randn(4, 6)), Parameter(randn(8, 2, seed=1))], weight_ema=0.9)
    assert_step(with_grads(optimizer), set_option(lr=0.2, momentum=0.5, weight_ema=0.5), kept=True)


def test_momentum_that_starts_makes_a_new_step() -> None:
    optimizer = with_grads(GrokFastSGD([Parameter(randn(3))], lr=0.1))
    assert_step(optimizer, set_option(momentum=0.9), kept=False)


def test_step_of_a_filter_is_kept_and_made_anew_alike() -> None:
    def around() -> GradFilter:
        return with_grads(GradFilter(torch.optim.SGD([Parameter(randn(3))], lr=0.1)))

    assert_step(around(), set_option(lamb=5.0), kept=True)
    assert_step(around(), set_option(filter=None), kept=False)
    assert_step(around(), moved_states, kept=False)
    # It writes into tensors of its own.
    assert_step(around(), moved_params, kept=True)


def test_each_group_keeps_its_own_step() -> None:
    groups = [{"params": [Parameter(randn(3, seed=i))]} for i in range(2)]
    optimizer = with_grads(GrokFastAdamW(groups))
    optimizer.step()
    first, second = plan_of(optimizer, 0), plan_of(optimizer, 1)
    optimizer.param_groups[1]["filter"] = None
    optimizer.step()
    assert plan_of(optimizer, 0) is first
    assert plan_of(optimizer, 1) is not second


def test_groups_that_change_places_are_stepped_right() -> None:
    groups = [{"params": [Parameter(randn(3, seed=i))], "lr": 0.1 * (i + 1)} for i in range(2)]
    optimizer = with_grads(GrokFastAdamW(groups))
    assert_step(optimizer, lambda o: o.param_groups.reverse(), kept=False)


def test_sparse_gradient_is_refused_by_a_kept_step_too() -> None:
    optimizer = adamw()
    optimizer.step()
    param = params_of(optimizer)[0]
    param.grad = param.grad.to_sparse()
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(param, before)


# 2. The backend


def ran_on(optimizer: Any) -> str:
    return plan_of(optimizer)._steps[0].choice.backend


@needs_cpp
def test_a_backend_named_later_is_used() -> None:
    optimizer = adamw()
    optimizer.step()
    with trm_fast.use_backend("reference"):
        optimizer.step()
        assert ran_on(optimizer) == "reference"


@needs_cpp
def test_a_backend_named_for_a_while_is_left_again() -> None:
    optimizer = adamw()
    with trm_fast.use_backend("reference"):
        optimizer.step()
    optimizer.step()
    assert ran_on(optimizer) == "cpp"


@needs_cpp
def test_fused_set_to_false_runs_the_reference() -> None:
    optimizer = adamw()
    optimizer.step()
    optimizer.param_groups[0]["fused"] = False
    optimizer.step()
    assert ran_on(optimizer) == "reference"


# Options and attributes that are looked at each time


def test_betas_changed_in_place_count() -> None:
    def run(change: bool) -> Tensor:
        param = Parameter(torch.zeros(3))
        optimizer = GrokFastAdamW([{"params": [param], "betas": [0.9, 0.99]}])
        for grad in (1.0, -1.0):
            param.grad = torch.full((3,), grad)
            optimizer.step()
            if change:
                optimizer.param_groups[0]["betas"][0] = 0.0
        return param.detach()

    assert not torch.equal(run(change=True), run(change=False))


def test_learning_rate_changed_in_place_counts() -> None:
    optimizer = adamw()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    assert_step(optimizer, lambda o: o.param_groups[0]["lr"].fill_(0.5), kept=True)


def test_a_number_as_loss_scale_is_refused_by_name() -> None:
    optimizer = adamw()
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.grad_scale = 2.0
    with pytest.raises(TypeError, match=r"grad_scale must be a tensor or None; got 2\.0"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_a_step_count_may_be_set_to_a_number() -> None:
    optimizer = adamw()
    optimizer.step()
    state = optimizer.state[params_of(optimizer)[0]]
    state["step"] = 3
    optimizer.step()
    assert state["step"].item() == 4


def test_differentiable_refuses_a_backend_that_autograd_does_not_see() -> None:
    with pytest.raises(ValueError, match="backend must be 'reference' with differentiable"):
        GrokFastAdamW([Parameter(torch.zeros(1))], differentiable=True, backend="cpp")


def test_a_copy_keeps_nothing() -> None:
    optimizer = adamw()
    optimizer.step()
    assert deepcopy(optimizer)._cache._plans == {}
