"""Own states through a file, and what a load that fails leaves.

The truth is the run that was never interrupted.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from trm_fast.optim import (
    GrokFastAdamW,
)

from .interop_checks import through_file
from .torch_checks import (
    assert_same,
    clone_params,
    make_grads,
    make_params,
    randn,
    snapshot,
    train,
    without_grads,
)

STATES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"state_dtype": torch.bfloat16},
    "mixed": {"state_dtype": {"exp_avg": torch.bfloat16, "grok_exp_avg": torch.bfloat16}},
    "average": {"weight_ema": 0.9},
    "bfloat16_average": {"weight_ema": 0.9, "state_dtype": {"weight_ema": torch.bfloat16}},
    "after_step_4": {"after_step": 4},
    "highpass": {"filter": "highpass", "normalize_lr": True},
    "reference": {"backend": "reference", "state_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", STATES.values(), ids=STATES)
def test_resumed_run_equals_uninterrupted(options: dict[str, Any], dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = GrokFastAdamW(params, lr=1e-2, **options)
    rows = make_grads(params, 6)
    train(optimizer, rows[:3])
    resumed = GrokFastAdamW(clone_params(params), **options)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    train(optimizer, rows[3:])
    train(resumed, rows[3:])
    assert_same(snapshot(resumed), snapshot(optimizer))


def test_float32_states_of_bfloat16_parameters_survive_bit_for_bit() -> None:
    params = make_params(torch.bfloat16)
    optimizer = GrokFastAdamW(params, weight_ema=0.9)
    train(optimizer, make_grads(params, 300))
    other = GrokFastAdamW(clone_params(params), weight_ema=0.9)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert_same(without_grads(snapshot(other)), without_grads(snapshot(optimizer)))


def test_counters_above_256_survive_in_bfloat16() -> None:
    """bfloat16 holds no whole number between 256 and 258."""
    param = Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = GrokFastAdamW([param])
    state_dict = optimizer.state_dict()
    for name in ("step", "grok_step"):
        state_dict["state"][0][name] = torch.tensor(257.0)
    optimizer.load_state_dict(state_dict)
    assert [optimizer.state[param][name].item() for name in ("step", "grok_step")] == [257, 257]


def test_loaded_tensors_are_copies() -> None:
    params = make_params()
    optimizer = GrokFastAdamW(params, weight_ema=0.9)
    train(optimizer, make_grads(params, 1))
    state_dict = optimizer.state_dict()
    saved = deepcopy(state_dict["state"])
    other = GrokFastAdamW(clone_params(params), weight_ema=0.9)
    other.load_state_dict(state_dict)
    train(other, make_grads(params, 2))
    assert_same(state_dict["state"], saved)


def test_mean_that_is_missing_in_a_dict_starts_anew() -> None:
    param = Parameter(torch.ones(2))
    optimizer = GrokFastAdamW([param])
    train(optimizer, [[torch.ones(2)]] * 3)
    state_dict = optimizer.state_dict()
    del state_dict["state"][0]["grok_exp_avg"]
    optimizer.load_state_dict(state_dict)
    train(optimizer, [[torch.full((2,), 5.0)]])
    assert_same(optimizer.state[param]["grok_exp_avg"], torch.full((2,), 5.0))


def test_state_may_be_loaded_over_another_memory_order() -> None:
    param = Parameter(randn(4, 3, dtype=torch.float64))
    optimizer = GrokFastAdamW([param], weight_ema=0.9)
    rows = make_grads([param], 4)
    train(optimizer, rows[:2])
    moved = Parameter(param.detach().t().contiguous().t())
    other = GrokFastAdamW([moved], weight_ema=0.9)
    other.load_state_dict(optimizer.state_dict())
    train(optimizer, rows[2:])
    train(other, rows[2:])
    assert_same(snapshot(other), snapshot(optimizer))


def wrong_groups(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"].append(deepcopy(state_dict["param_groups"][0]))


def wrong_shape(state_dict: dict[str, Any]) -> None:
    state_dict["state"][1]["exp_avg"] = torch.zeros(7)


def wrong_step(state_dict: dict[str, Any]) -> None:
    state_dict["state"][1]["step"] = torch.zeros(2)


def with_amsgrad(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["amsgrad"] = True


@pytest.mark.parametrize("spoil", [wrong_groups, wrong_shape, wrong_step, with_amsgrad])
def test_failed_load_changes_nothing(spoil: Callable[[dict[str, Any]], None]) -> None:
    params = [Parameter(torch.ones(4, 3)), Parameter(torch.ones(2))]
    optimizer = GrokFastAdamW(params, lr=0.1)
    other = GrokFastAdamW(clone_params(params), lr=0.5)
    train(optimizer, make_grads(params, 1))
    train(other, make_grads(params, 2, seed=7))
    before = deepcopy(optimizer.state_dict())
    spoiled = deepcopy(other.state_dict())
    spoil(spoiled)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(spoiled)
    assert_same(optimizer.state_dict(), before)


def test_training_goes_on_after_a_failed_load() -> None:
    params = [Parameter(torch.ones(4, 3)), Parameter(torch.ones(2))]
    twins = clone_params(params)
    optimizer, twin = GrokFastAdamW(params, lr=0.1), GrokFastAdamW(twins, lr=0.1)
    rows = make_grads(params, 3)
    train(optimizer, rows[:2])
    train(twin, rows[:2])
    spoiled = deepcopy(GrokFastAdamW(clone_params(params), lr=0.5).state_dict())
    wrong_shape(spoiled)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.load_state_dict(spoiled)
    train(optimizer, rows[2:])
    train(twin, rows[2:])
    assert_same(params, twins)
