"""torch's optimizer checks on GrokFastAdamW: state dict, copies, hooks, closures, lifetime."""

import gc
import io
import pickle
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

from .torch_checks import (
    INFO,
    Options,
    assert_same,
    build,
    clone_params,
    each_filter,
    each_flag,
    each_float,
    each_input,
    each_input_and_any_flag,
    each_input_and_flag,
    make_grads,
    make_params,
    randn,
    snapshot,
    train,
    without_grads,
)

NAMES = ["matrix", "vector", "strided", "permuted", "scalar", "empty"]
named = pytest.mark.parametrize("named", [False, True], ids=["positional", "named"])


def maybe_named(params: list[Parameter], yes: bool) -> Any:
    return list(zip(NAMES, params, strict=True)) if yes else params


def trained(kwargs: Options, steps: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    params = make_params(dtype)
    optimizer = build(params, **kwargs)
    train(optimizer, make_grads(params, steps))
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def twin(optimizer: torch.optim.Optimizer, kwargs: Options, yes: bool = False) -> Any:
    """A second optimizer over copies of the same parameters, as before a load."""
    return build(maybe_named(clone_params(params_of(optimizer)), yes), **kwargs)


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [
        {k: v for k, v in group.items() if k != "param_names"}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


# Round trips


@pytest.mark.parametrize("names", [(False, False), (True, False), (False, True), (True, True)])
@each_input
def test_loaded_optimizer_continues_alike(kwargs: Options, names: tuple[bool, bool]) -> None:
    params = make_params()
    optimizer = build(maybe_named(params, names[0]), **kwargs)
    train(optimizer, make_grads(params, 3))
    other = twin(optimizer, kwargs, names[1])
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    more = make_grads(params, 3, seed=7)
    train(optimizer, more)
    train(other, more)
    assert_same(snapshot(other), snapshot(optimizer))
    assert_same(without_names(other.state_dict()), without_names(optimizer.state_dict()))


@pytest.mark.parametrize("names", [(True, False), (False, True), (True, True)])
@each_filter
def test_parameter_names_survive_a_load(kwargs: Options, names: tuple[bool, bool]) -> None:
    params = make_params()
    optimizer = build(maybe_named(params, names[0]), **kwargs)
    other = twin(optimizer, kwargs, names[1])
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["param_groups"][0]["param_names"] == NAMES


@each_filter
def test_named_group_can_be_added(kwargs: Options) -> None:
    optimizer = build([("first", Parameter(randn(2)))], **kwargs)
    optimizer.add_param_group({"params": [("second", Parameter(randn(3)))]})
    assert [group["param_names"] for group in optimizer.param_groups] == [["first"], ["second"]]


@each_filter
def test_repeated_group_has_one_representation(kwargs: Options) -> None:
    optimizer = trained(kwargs)
    optimizer.param_groups.extend(optimizer.param_groups)
    first, second = optimizer.state_dict()["param_groups"]
    assert_same(second, first)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@named
@each_input
def test_file_holds_the_state_dict(kwargs: Options, named: bool, zipped: bool) -> None:
    """Nothing in it needs more than the loader for weights only."""
    params = make_params()
    optimizer = build(maybe_named(params, named), **kwargs)
    train(optimizer, make_grads(params, 2))
    state_dict = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(state_dict, file, _use_new_zipfile_serialization=zipped)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), state_dict)


@each_filter
def test_load_keeps_its_argument(kwargs: Options) -> None:
    optimizer = trained(kwargs)
    state_dict = optimizer.state_dict()
    before = deepcopy(state_dict)
    other = build(make_params(), lr=0.5, **kwargs)
    other.load_state_dict(state_dict)
    assert_same(state_dict, before)


@each_filter
def test_load_is_called_by_keyword(kwargs: Options) -> None:
    """As torch.distributed.checkpoint does."""
    optimizer = trained(kwargs)
    other = twin(optimizer, kwargs)
    other.load_state_dict(state_dict=optimizer.state_dict())
    assert_same(without_grads(snapshot(other)), without_grads(snapshot(optimizer)))


@each_filter
def test_other_number_of_parameters_is_refused(kwargs: Options) -> None:
    other = build(make_params()[:2], **kwargs)
    with pytest.raises(ValueError, match="doesn't match the size"):
        other.load_state_dict(trained(kwargs).state_dict())


# Dtypes after a load


@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=["default", "float32"])
@each_float
@each_filter
def test_load_keeps_dtype_and_value_of_the_state(
    kwargs: Options, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    """The base class casts every state tensor but `step` to the dtype of its parameter."""
    kwargs = kwargs | {"state_dtype": state_dtype}
    optimizer = trained(kwargs, dtype=dtype)
    other = twin(optimizer, kwargs)
    other.load_state_dict(optimizer.state_dict())
    assert_same(without_grads(snapshot(other)), without_grads(snapshot(optimizer)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_keeps_counters_that_the_parameter_dtype_cannot_hold(dtype: torch.dtype) -> None:
    """2049 needs 12 bits; bfloat16 has 8 and float16 has 11."""
    optimizer = trained({}, dtype=dtype)
    for state in optimizer.state.values():
        state["step"].fill_(2049)
        state["grok_step"].fill_(2049)
    other = twin(optimizer, {})
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    counts = [[s["step"].item(), s["grok_step"].item()] for s in other.state.values()]
    assert counts == [[2049, 2049]] * len(params_of(other))


@each_input_and_flag
def test_step_count_may_be_a_number(kwargs: Options) -> None:
    optimizer = trained(kwargs)
    other = twin(optimizer, kwargs)
    state_dict = deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = state["step"].item()
    other.load_state_dict(state_dict)
    more = make_grads(params_of(optimizer), 2)
    train(optimizer, more)
    train(other, more)
    assert_same(snapshot(other), snapshot(optimizer))


# Older and foreign state dicts

NEWER_KEYS = (
    *INFO.not_og_supported_flags,
    "alpha",
    "lamb",
    "filter",
    "after_step",
    "weight_ema",
    "decoupled_weight_decay",
    "normalize_lr",
)


@pytest.mark.parametrize("key", NEWER_KEYS)
def test_missing_group_key_gets_the_default(key: str) -> None:
    optimizer = trained({})
    state_dict = deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        group.pop(key, None)
    optimizer.load_state_dict(state_dict)
    assert_same(optimizer.param_groups[0][key], optimizer.defaults[key])
    train(optimizer, make_grads(params_of(optimizer), 1))


@each_input_and_flag
def test_older_state_dict_continues_alike(kwargs: Options) -> None:
    """Without any of the keys that came after Adam's first release, in an optimizer with all."""
    kwargs = {k: v for k, v in kwargs.items() if k != "maximize"}
    optimizer = trained(kwargs)
    other = twin(optimizer, kwargs)
    state_dict = deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        for flag in INFO.not_og_supported_flags:
            group.pop(flag, None)
    other.load_state_dict(state_dict)
    more = make_grads(params_of(optimizer), 2)
    train(optimizer, more)
    train(other, more)
    assert_same(snapshot(other), snapshot(optimizer))


def torch_state_dict(amsgrad: bool) -> tuple[list[Parameter], dict[str, Any]]:
    params = make_params()
    optimizer = torch.optim.AdamW(params, amsgrad=amsgrad)
    train(optimizer, make_grads(params, 3))
    return params, optimizer.state_dict()


@each_filter
def test_state_dict_of_torch_adamw_loads(kwargs: Options) -> None:
    params, state_dict = torch_state_dict(amsgrad=False)
    optimizer = build(clone_params(params), **kwargs)
    optimizer.load_state_dict(state_dict)
    for index, param in enumerate(params_of(optimizer)):
        expected = state_dict["state"][index]
        assert_same({key: optimizer.state[param][key] for key in expected}, expected)


def test_filter_starts_after_the_load_of_a_torch_state_dict() -> None:
    """The next gradient seeds the filter, and the step count goes on."""
    params, state_dict = torch_state_dict(amsgrad=False)
    optimizer = build(clone_params(params), lamb=2.0)
    optimizer.load_state_dict(state_dict)
    grads = make_grads(params, 1)
    train(optimizer, grads)
    for param, grad in zip(params_of(optimizer), grads[0], strict=True):
        state = optimizer.state[param]
        assert (state["step"].item(), state["grok_step"].item()) == (4, 1)
        assert_same(state["grok_exp_avg"], grad)


def test_amsgrad_state_dict_is_refused() -> None:
    params, state_dict = torch_state_dict(amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad"):
        build(params).load_state_dict(state_dict)


# Copies and text


def public(optimizer: torch.optim.Optimizer) -> set[str]:
    return {name for name in vars(optimizer) if not name.startswith("_")}


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}
each_copy = pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)


@each_copy
@each_input
def test_copy_has_all_public_attributes(kwargs: Options, copy: Any) -> None:
    optimizer = trained(kwargs)
    assert public(copy(optimizer)) == public(optimizer)


@each_copy
@each_input_and_flag
def test_copy_continues_alike(kwargs: Options, copy: Any) -> None:
    optimizer = trained(kwargs)
    other = copy(optimizer)
    more = make_grads(params_of(optimizer), 2)
    train(other, more)
    train(optimizer, more)
    assert_same(snapshot(other), snapshot(optimizer))


@each_copy
@each_filter
def test_copy_leaves_the_original_alone(kwargs: Options, copy: Any) -> None:
    optimizer = trained(kwargs)
    before = snapshot(optimizer)
    other = copy(optimizer)
    train(other, make_grads(params_of(other), 2))
    assert_same(snapshot(optimizer), before)


@each_copy
@each_filter
def test_copy_still_takes_the_scale_of_a_scaler(kwargs: Options, copy: Any) -> None:
    assert copy(trained(kwargs))._step_supports_amp_scaling is True


@each_input_and_any_flag
def test_text_shows_every_option(kwargs: Options) -> None:
    text = repr(build([randn(2, 3)], **kwargs))
    assert text.startswith("GrokFastAdamW (")
    assert [key for key, value in kwargs.items() if f"{key}: {value}\n" not in text] == []


# State dict hooks


def put_test(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state["test"] = 1


def take_test(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict["found"] = state_dict["state"].pop("test", None)
    return state_dict


@each_flag
def test_hook_before_the_state_dict(kwargs: Options) -> None:
    optimizer = build([randn(2, 3)], **kwargs)
    optimizer.register_state_dict_pre_hook(put_test)
    assert optimizer.state_dict()["state"]["test"] == 1


@pytest.mark.parametrize("before", [True, False])
@each_flag
def test_hook_after_the_state_dict(kwargs: Options, before: bool) -> None:
    optimizer = build([Parameter(randn(2, 3))], **kwargs)
    if before:
        optimizer.register_state_dict_pre_hook(put_test)
    optimizer.register_state_dict_post_hook(take_test)
    assert optimizer.state_dict()["found"] == (1 if before else None)


def set_lr(value: float, copy: bool) -> Callable[..., Any]:
    def hook(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> Any:
        state_dict = deepcopy(state_dict) if copy else state_dict
        state_dict["param_groups"][0]["lr"] = value
        return state_dict if copy else None

    return hook


@pytest.mark.parametrize("copy", [True, False], ids=["returns", "writes"])
@each_flag
def test_hook_before_a_load(kwargs: Options, copy: bool) -> None:
    optimizer = build([Parameter(randn(2, 3))], **kwargs)
    optimizer.register_load_state_dict_pre_hook(set_lr(0.002, copy))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.002


@pytest.mark.parametrize("prepend", [True, False])
@each_filter
def test_hooks_before_a_load_run_in_order(kwargs: Options, prepend: bool) -> None:
    optimizer = build([Parameter(randn(2, 3))], **kwargs)
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

    optimizer = trained({}, dtype=dtype)
    optimizer.register_load_state_dict_pre_hook(fill)
    optimizer.load_state_dict(optimizer.state_dict())
    for state in optimizer.state.values():
        assert (state["exp_avg"] == 7).all()
        assert (state["grok_exp_avg"] == 8).all()


@each_flag
def test_hook_after_a_load_sees_the_loaded_values(kwargs: Options) -> None:
    optimizer = build([Parameter(randn(2, 3))], **kwargs)
    seen = []
    optimizer.register_load_state_dict_pre_hook(set_lr(0.003, copy=True))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [0.003]


def test_hook_after_a_load_sees_the_restored_dtypes() -> None:
    optimizer = trained({"state_dtype": torch.float32}, dtype=torch.bfloat16)
    seen = []

    def look(optimizer: torch.optim.Optimizer) -> None:
        seen.extend(state["exp_avg"].dtype for state in optimizer.state.values())

    optimizer.register_load_state_dict_post_hook(look)
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(seen) == {torch.float32}


@each_filter
def test_hook_after_a_load_may_add_state_of_its_own(kwargs: Options) -> None:
    optimizer = trained(kwargs)
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
def test_step_hooks_run_in_order(kwargs: Options, calls: list[str]) -> None:
    optimizer = build([randn(2)], **kwargs)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step(lambda: calls.append("closure"))
    assert calls == ["global before", "before", "closure", "after", "global after"]


@pytest.mark.parametrize("kind", ["register_step_pre_hook", "register_step_post_hook"])
@each_filter
def test_removed_step_hook_is_silent(kwargs: Options, kind: str) -> None:
    optimizer = build([randn(2)], **kwargs)
    log: list[int] = []
    handle = getattr(optimizer, kind)(lambda *_: log.append(1))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert log == [1]


@each_filter
def test_step_hook_may_replace_the_arguments(kwargs: Options) -> None:
    optimizer = build([randn(2)], **kwargs)
    optimizer.register_step_pre_hook(lambda o, args, kw: ((o, lambda: "replaced"), kw))
    assert optimizer.step(lambda: "given") == "replaced"


@each_filter
def test_hook_before_the_step_may_change_the_gradient(kwargs: Options) -> None:
    params, other = make_params(), make_params()
    row = make_grads(params, 1)[0]

    def double(optimizer: torch.optim.Optimizer, args: Any, kw: Any) -> None:
        for param in params:
            param.grad = param.grad * 2

    optimizer = build(params, **kwargs)
    optimizer.register_step_pre_hook(double)
    train(optimizer, [row])
    expected = build(other, **kwargs)
    train(expected, [[grad * 2 for grad in row]])
    assert_same(snapshot(optimizer), snapshot(expected))


# Closures


@each_filter
def test_closure_runs_once_and_its_loss_is_returned(kwargs: Options) -> None:
    losses: list[Tensor] = []
    optimizer = build([Parameter(randn(3))], **kwargs)

    def closure() -> Tensor:
        losses.append(torch.tensor(1.5))
        return losses[-1]

    loss = optimizer.step(closure)
    assert (len(losses), loss is losses[0]) == (1, True)


@each_filter
def test_closure_runs_before_the_update(kwargs: Options) -> None:
    param = Parameter(randn(3))
    optimizer = build([param], **kwargs)
    before = param.detach().clone()
    seen = []

    def closure() -> None:
        seen.append(param.detach().clone())
        param.grad = torch.ones(3)

    optimizer.step(closure)
    assert_same(seen, [before])
    assert (param < before).all()


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
@each_filter
def test_closure_runs_with_gradients_enabled(kwargs: Options, outer: Any) -> None:
    optimizer = build([Parameter(randn(3))], **kwargs)
    with outer():
        enabled = optimizer.step(torch.is_grad_enabled)
    assert enabled is True


@each_filter
def test_step_without_closure_returns_none(kwargs: Options) -> None:
    param = Parameter(randn(3))
    param.grad = torch.ones(3)
    assert build([param], **kwargs).step() is None


# Lifetime


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@each_filter
def test_optimizer_dies_with_its_last_reference(kwargs: Options, no_gc: None) -> None:
    """No reference cycle: memory of parameters and state does not wait for the collector."""
    optimizer = trained(kwargs)
    param = params_of(optimizer)[0]
    dead = [weakref.ref(optimizer), weakref.ref(optimizer.state[param]["exp_avg"])]
    del optimizer, param
    assert [ref() for ref in dead] == [None, None]


@each_filter
def test_scheduler_does_not_keep_the_optimizer(kwargs: Options, no_gc: None) -> None:
    optimizer = build([Parameter(randn(3))], **kwargs)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    dead = weakref.ref(scheduler)
    del scheduler
    assert dead() is None


@each_filter
def test_step_leaves_no_graph(kwargs: Options) -> None:
    optimizer = trained(kwargs)
    tensors = [value for row in optimizer.state.values() for value in row.values()]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(param.grad_fn is None for param in params_of(optimizer))
