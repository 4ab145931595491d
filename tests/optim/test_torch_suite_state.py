"""torch's optimizer checks on all of the registry: state dicts and copies."""

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from .registry import (
    INFO,
    OPTIMIZERS,
    Case,
    each_adamw,
    each_adamw_input_and_flag,
    each_case,
    each_input,
    each_input_and_any_flag,
    each_input_and_flag,
    each_own,
    each_own_input_and_flag,
    trained,
)
from .torch_checks import (
    assert_same,
    build,
    clone_params,
    each_float,
    everything,
    make_grads,
    make_params,
    params_of,
    randn,
    snapshot,
    train,
    without_grads,
)

NAMES = ["matrix", "vector", "strided", "permuted", "scalar", "empty"]
named = pytest.mark.parametrize("named", [False, True], ids=["positional", "named"])


def maybe_named(params: list[Parameter], yes: bool) -> Any:
    return list(zip(NAMES, params, strict=True)) if yes else params


EMA = OPTIMIZERS["adamw_ema"]


def twin(optimizer: torch.optim.Optimizer, case: Case, yes: bool = False, **more: Any) -> Any:
    """A second optimizer over copies of the same parameters, as before a load."""
    return case(maybe_named(clone_params(params_of(optimizer)), yes), **more)


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [
        {k: v for k, v in group.items() if k != "param_names"}
        for group in state_dict["param_groups"]
    ]
    inside = {k: without_names(v) for k, v in state_dict.items() if k == "optimizer"}
    return {**state_dict, **inside, "param_groups": groups}


# Round trips


@pytest.mark.parametrize("names", [(False, False), (True, False), (False, True), (True, True)])
@each_input
def test_loaded_optimizer_continues_alike(case: Case, names: tuple[bool, bool]) -> None:
    params = case.params()
    optimizer = case(maybe_named(params, names[0]))
    train(optimizer, make_grads(params, 3))
    other = twin(optimizer, case, names[1])
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    more = make_grads(params, 3, seed=7)
    train(optimizer, more)
    train(other, more)
    assert_same(snapshot(other), snapshot(optimizer))
    assert_same(without_names(other.state_dict()), without_names(optimizer.state_dict()))


@pytest.mark.parametrize("names", [(True, False), (False, True), (True, True)])
@each_case
def test_parameter_names_survive_a_load(case: Case, names: tuple[bool, bool]) -> None:
    params = case.params()
    optimizer = case(maybe_named(params, names[0]))
    other = twin(optimizer, case, names[1])
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["param_groups"][0]["param_names"] == NAMES


@each_case
def test_named_group_can_be_added(case: Case) -> None:
    first, second, *_ = case.params()
    optimizer = case([("first", first)])
    optimizer.add_param_group({"params": [("second", second)]})
    assert [group["param_names"] for group in optimizer.param_groups] == [["first"], ["second"]]


@each_case
def test_repeated_group_has_one_representation(case: Case) -> None:
    optimizer = trained(case)
    optimizer.param_groups.extend(optimizer.param_groups)
    first, second = optimizer.state_dict()["param_groups"]
    assert_same(second, first)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@named
@each_input
def test_file_holds_the_state_dict(case: Case, named: bool, zipped: bool) -> None:
    """Nothing in it needs more than the loader for weights only."""
    params = case.params()
    optimizer = case(maybe_named(params, named))
    train(optimizer, make_grads(params, 2))
    state_dict = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(state_dict, file, _use_new_zipfile_serialization=zipped)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), state_dict)


@each_case
def test_load_keeps_its_argument(case: Case) -> None:
    optimizer = trained(case)
    state_dict = optimizer.state_dict()
    before = deepcopy(state_dict)
    other = case(case.params(), lr=0.5)
    other.load_state_dict(state_dict)
    assert_same(state_dict, before)


@each_case
def test_load_is_called_by_keyword(case: Case) -> None:
    """As torch.distributed.checkpoint does."""
    optimizer = trained(case)
    other = twin(optimizer, case)
    other.load_state_dict(state_dict=optimizer.state_dict())
    assert_same(without_grads(snapshot(other)), without_grads(snapshot(optimizer)))


@each_case
def test_other_number_of_parameters_is_refused(case: Case) -> None:
    other = case(case.params()[:2])
    with pytest.raises(ValueError, match="doesn't match the size"):
        other.load_state_dict(trained(case).state_dict())


# Dtypes after a load


@each_float
@each_case
def test_load_keeps_dtype_and_value_of_the_state(case: Case, dtype: torch.dtype) -> None:
    """The base class casts every state tensor but `step` to the dtype of its parameter."""
    optimizer = trained(case, dtype=dtype)
    other = twin(optimizer, case)
    other.load_state_dict(state_dict=deepcopy(optimizer.state_dict()))
    assert_same(without_grads(snapshot(other)), without_grads(snapshot(optimizer)))
    rows = make_grads(params_of(optimizer), 3)
    train(optimizer, rows)
    train(other, rows)
    assert_same(snapshot(other), snapshot(optimizer))


@each_float
@each_adamw
def test_load_keeps_a_dtype_that_was_asked_for(case: Case, dtype: torch.dtype) -> None:
    optimizer = trained(case, dtype=dtype, state_dtype=torch.float32)
    other = twin(optimizer, case, state_dtype=torch.float32)
    other.load_state_dict(optimizer.state_dict())
    assert_same(without_grads(snapshot(other)), without_grads(snapshot(optimizer)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_keeps_counters_that_the_parameter_dtype_cannot_hold(dtype: torch.dtype) -> None:
    """2049 needs 12 bits; bfloat16 has 8 and float16 has 11."""
    optimizer = trained(EMA, dtype=dtype)
    for state in optimizer.state.values():
        state["step"].fill_(2049)
        state["grok_step"].fill_(2049)
    other = twin(optimizer, EMA)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    counts = [[s["step"].item(), s["grok_step"].item()] for s in other.state.values()]
    assert counts == [[2049, 2049]] * len(params_of(other))


@each_own_input_and_flag
def test_step_count_may_be_a_number(case: Case) -> None:
    optimizer = trained(case)
    other = twin(optimizer, case)
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
    optimizer = trained(EMA)
    state_dict = deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        group.pop(key, None)
    optimizer.load_state_dict(state_dict)
    assert_same(optimizer.param_groups[0][key], optimizer.defaults[key])
    train(optimizer, make_grads(params_of(optimizer), 1))


@each_adamw_input_and_flag
def test_older_state_dict_continues_alike(case: Case) -> None:
    """Without any of the keys that came after Adam's first release, in an optimizer with all."""
    optimizer = trained(case, maximize=False)
    other = twin(optimizer, case, maximize=False)
    state_dict = deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        for flag in INFO.not_og_supported_flags:
            group.pop(flag, None)
    other.load_state_dict(state_dict)
    more = make_grads(params_of(optimizer), 2)
    train(optimizer, more)
    train(other, more)
    assert_same(snapshot(other), snapshot(optimizer))


@each_own
def test_oldest_dict_gets_the_defaults(case: Case) -> None:
    """A dict that knows nothing but the parameters, as one of before all options."""
    optimizer = trained(case)
    state_dict = deepcopy(optimizer.state_dict())
    state_dict["param_groups"] = [
        {"params": group["params"]} for group in state_dict["param_groups"]
    ]
    optimizer.load_state_dict(state_dict)
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in optimizer.defaults} == optimizer.defaults
    train(optimizer, make_grads(params_of(optimizer), 1))


def drop_parameter(state_dict: Any) -> bool:
    state_dict["param_groups"][0]["params"].pop()
    return True


def other_shape(state_dict: Any) -> bool:
    state = state_dict["state"][0]
    names = [name for name, value in state.items() if value.dim() == 2]
    for name in names:
        state[name] = state[name][:3]
    return bool(names)


def negative_lamb(state_dict: Any) -> bool:
    state_dict["param_groups"][0]["lamb"] = -1.0
    return state_dict["param_groups"][0]["filter"] is not None


@pytest.mark.parametrize("spoil", [drop_parameter, other_shape, negative_lamb])
@each_case
def test_bad_dict_changes_nothing(case: Case, spoil: Callable[[Any], bool]) -> None:
    optimizer = trained(case)
    before = everything(optimizer)
    state_dict = deepcopy(optimizer.state_dict())
    if spoil(state_dict):
        with pytest.raises(ValueError, match=r"match|must be"):
            optimizer.load_state_dict(state_dict)
        assert_same(everything(optimizer), before)
    train(optimizer, make_grads(params_of(optimizer), 1))


def torch_state_dict(amsgrad: bool) -> tuple[list[Parameter], dict[str, Any]]:
    params = make_params()
    optimizer = torch.optim.AdamW(params, amsgrad=amsgrad)
    train(optimizer, make_grads(params, 3))
    return params, optimizer.state_dict()


@each_adamw
def test_state_dict_of_torch_adamw_loads(case: Case) -> None:
    params, state_dict = torch_state_dict(amsgrad=False)
    optimizer = case(clone_params(params))
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
def test_copy_has_all_public_attributes(case: Case, copy: Any) -> None:
    optimizer = trained(case)
    assert public(copy(optimizer)) == public(optimizer)


@each_copy
@each_input_and_flag
def test_copy_continues_alike(case: Case, copy: Any) -> None:
    optimizer = trained(case)
    other = copy(optimizer)
    more = make_grads(params_of(optimizer), 2)
    train(other, more)
    train(optimizer, more)
    assert_same(snapshot(other), snapshot(optimizer))


@each_copy
@each_case
def test_copy_leaves_the_original_alone(case: Case, copy: Any) -> None:
    optimizer = trained(case)
    before = everything(optimizer)
    other = copy(optimizer)
    train(other, make_grads(params_of(other), 2))
    assert_same(everything(optimizer), before)


@each_copy
@each_own
def test_copy_still_takes_the_scale_of_a_scaler(case: Case, copy: Any) -> None:
    assert copy(trained(case))._step_supports_amp_scaling is True


@each_input_and_any_flag
def test_text_shows_every_option(case: Case) -> None:
    optimizer = case([randn(2, 3)], weight_decay=0.125)
    text = repr(optimizer)
    assert text.startswith(f"{type(optimizer).__name__} (\nParameter Group 0\n")
    shown = {k: v for k, v in case.options.items() if k in optimizer.defaults}
    shown["weight_decay"] = 0.125
    assert [key for key, value in shown.items() if f"{key}: {value}\n" not in text] == []
