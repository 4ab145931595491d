"""torch's optimizer checks on all of the registry: hooks, closures, lifetime."""

import gc
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .registry import (
    OPTIMIZERS,
    Case,
    each_adamw,
    each_case,
    each_flag,
    trained,
)
from .torch_checks import (
    assert_same,
    make_grads,
    params_of,
    randn,
    snapshot,
    train,
)

EMA = OPTIMIZERS["adamw_ema"]


# State dict hooks


def put_test(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state["test"] = 1


def move_test(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict["found"] = state_dict["state"].pop("test", None)
    return state_dict


@each_flag
def test_hook_before_the_state_dict(case: Case) -> None:
    optimizer = case([randn(2, 3)])
    optimizer.register_state_dict_pre_hook(put_test)
    assert optimizer.state_dict()["state"]["test"] == 1


@pytest.mark.parametrize("before", [True, False])
@each_flag
def test_hook_after_the_state_dict(case: Case, before: bool) -> None:
    optimizer = case([Parameter(randn(2, 3))])
    if before:
        optimizer.register_state_dict_pre_hook(put_test)
    optimizer.register_state_dict_post_hook(move_test)
    assert optimizer.state_dict()["found"] == (1 if before else None)


def set_lr(value: float, copy: bool) -> Callable[..., Any]:
    def hook(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> Any:
        state_dict = deepcopy(state_dict) if copy else state_dict
        state_dict["param_groups"][0]["lr"] = value
        return state_dict if copy else None

    return hook


@pytest.mark.parametrize("copy", [True, False], ids=["returns", "writes"])
@each_flag
def test_hook_before_a_load(case: Case, copy: bool) -> None:
    optimizer = case([Parameter(randn(2, 3))])
    optimizer.register_load_state_dict_pre_hook(set_lr(0.002, copy))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.002


@pytest.mark.parametrize("prepend", [True, False])
@each_adamw
def test_hooks_before_a_load_run_in_order(case: Case, prepend: bool) -> None:
    optimizer = case([Parameter(randn(2, 3))])
    optimizer.register_load_state_dict_pre_hook(set_lr(0.002, copy=False))
    optimizer.register_load_state_dict_pre_hook(set_lr(0.003, copy=True), prepend=prepend)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == (0.002 if prepend else 0.003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hook_before_a_load_may_change_the_state(dtype: torch.dtype) -> None:
    """What is loaded is what the last hook returned, also where dtypes are restored by hand."""

    def fill(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = deepcopy(state_dict)
        for state in state_dict["state"].values():
            state["exp_avg"].fill_(7)
            state["grok_exp_avg"].fill_(8)
        return state_dict

    optimizer = trained(EMA, dtype=dtype)
    optimizer.register_load_state_dict_pre_hook(fill)
    optimizer.load_state_dict(optimizer.state_dict())
    for state in optimizer.state.values():
        assert (state["exp_avg"] == 7).all()
        assert (state["grok_exp_avg"] == 8).all()


@each_case
def test_load_hooks_see_and_change_what_is_loaded(case: Case) -> None:
    optimizer = trained(case)
    seen = []
    optimizer.register_load_state_dict_pre_hook(set_lr(0.375, copy=True))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    assert seen == [0.375]


@each_flag
def test_hook_after_a_load_sees_the_loaded_values(case: Case) -> None:
    optimizer = case([Parameter(randn(2, 3))])
    seen = []
    optimizer.register_load_state_dict_pre_hook(set_lr(0.003, copy=True))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [0.003]


def test_hook_after_a_load_sees_the_restored_dtypes() -> None:
    optimizer = trained(EMA, dtype=torch.bfloat16, state_dtype=torch.float32)
    seen = []

    def look(optimizer: torch.optim.Optimizer) -> None:
        seen.extend(state["exp_avg"].dtype for state in optimizer.state.values())

    optimizer.register_load_state_dict_post_hook(look)
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(seen) == {torch.float32}


@each_case
def test_hook_after_a_load_may_add_state_of_its_own(case: Case) -> None:
    optimizer = trained(case)
    optimizer.register_load_state_dict_post_hook(put_test)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, make_grads(params_of(optimizer), 1))
    assert optimizer.state_dict()["state"]["test"] == 1


# Step hooks


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """The order of calls, with hooks for all optimizers registered for one test."""
    log: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: log.append("global before")),
        register_optimizer_step_post_hook(lambda *_: log.append("global after")),
    ]
    yield log
    for handle in handles:
        handle.remove()


@each_flag
def test_step_hooks_run_in_order(case: Case, calls: list[str]) -> None:
    optimizer = case([randn(2, 2)])
    calls.clear()  # the first one of its kind is preceded by a step of another one that tries it
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step(lambda: calls.append("closure"))
    assert calls == ["global before", "before", "closure", "after", "global after"]


@each_case
def test_hooks_of_an_optimizer_run_around_its_step(case: Case) -> None:
    param = case.params()[0]
    optimizer = case([param])
    start, log = param.detach().clone(), []

    def closure() -> None:
        param.grad = torch.ones_like(param)
        log.append(("closure", torch.equal(param, start)))

    optimizer.register_step_pre_hook(lambda *_: log.append(("before", torch.equal(param, start))))
    optimizer.register_step_post_hook(lambda *_: log.append(("after", torch.equal(param, start))))
    optimizer.step(closure)
    assert log == [("before", True), ("closure", True), ("after", False)]


@pytest.mark.parametrize("kind", ["register_step_pre_hook", "register_step_post_hook"])
@each_case
def test_removed_step_hook_is_silent(case: Case, kind: str) -> None:
    optimizer = case([randn(2, 2)])
    log: list[int] = []
    handle = getattr(optimizer, kind)(lambda *_: log.append(1))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert log == [1]


@each_case
def test_step_hook_may_replace_the_arguments(case: Case) -> None:
    optimizer = case([randn(2, 2)])
    optimizer.register_step_pre_hook(lambda o, args, kw: ((o, lambda: "replaced"), kw))
    assert optimizer.step(lambda: "given") == "replaced"


@each_case
def test_hook_before_the_step_may_change_the_gradient(case: Case) -> None:
    params, other = case.params(), case.params()
    row = make_grads(params, 1)[0]

    def double(optimizer: torch.optim.Optimizer, args: Any, kw: Any) -> None:
        for param in params:
            param.grad = param.grad * 2

    optimizer = case(params)
    optimizer.register_step_pre_hook(double)
    train(optimizer, [row])
    expected = case(other)
    train(expected, [[grad * 2 for grad in row]])
    assert_same(snapshot(optimizer), snapshot(expected))


# Closures


@each_case
def test_closure_runs_once_and_its_loss_is_returned(case: Case) -> None:
    losses: list[Tensor] = []
    optimizer = case(case.params()[:1])

    def closure() -> Tensor:
        losses.append(torch.tensor(1.5))
        return losses[-1]

    loss = optimizer.step(closure)
    assert (len(losses), loss is losses[0]) == (1, True)


@each_case
def test_closure_runs_before_the_update(case: Case) -> None:
    param = case.params()[0]
    optimizer = case([param])
    before = param.detach().clone()
    seen = []

    def closure() -> None:
        seen.append(param.detach().clone())
        param.grad = torch.ones_like(param)

    optimizer.step(closure)
    assert_same(seen, [before])
    assert (param.sum() < before.sum()).all()


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
@each_case
def test_closure_runs_with_gradients_enabled(case: Case, outer: Any) -> None:
    optimizer = case(case.params()[:1])
    with outer():
        enabled = optimizer.step(torch.is_grad_enabled)
    assert enabled is True


@each_case
def test_step_without_closure_returns_none(case: Case) -> None:
    param = case.params()[0]
    param.grad = torch.ones_like(param)
    assert case([param]).step() is None


# Lifetime


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@each_case
def test_optimizer_dies_with_its_last_reference(case: Case, no_gc: None) -> None:
    """No reference cycle: memory of parameters and state does not wait for the collector."""
    optimizer = trained(case)
    param = params_of(optimizer)[0]
    state = max(optimizer.state[param].values(), key=Tensor.numel)
    dead = [weakref.ref(optimizer), weakref.ref(state)]
    del optimizer, param, state
    assert [ref() for ref in dead] == [None, None]


@each_case
def test_scheduler_does_not_keep_the_optimizer(case: Case, no_gc: None) -> None:
    optimizer = case(case.params()[:1])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    dead = weakref.ref(scheduler)
    del scheduler
    assert dead() is None


@each_case
def test_step_leaves_no_graph(case: Case) -> None:
    optimizer = trained(case)
    tensors = [value for row in optimizer.state.values() for value in row.values()]
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in tensors)
    assert all(param.grad_fn is None and param.is_leaf for param in params_of(optimizer))
