"""State that comes from elsewhere: torch's Adam and AdamW, other GrokFast packages, checkpoints.

The truth is the run that was never interrupted.
"""

import io
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Linear, Parameter, Sequential

from trm_fast.optim import (
    AdamATan2,
    GrokFastAdamW,
    GrokFastSGD,
    MuGrokfast,
    Muon,
    from_lucidrains,
    load_official_ema,
    split_params,
)

from .torch_checks import (
    assert_same,
    assert_within,
    clone_params,
    make_grads,
    make_params,
    randn,
    set_grads,
    snapshot,
    train,
    without_grads,
)

# At most 25 roundings of 2**-53 per step, relative to terms no larger than the largest value: after
# 40 steps below 40 * 25 * 2**-53 = 1.2e-13.
RTOL = 1e-12
TORCH = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}
each_torch = pytest.mark.parametrize("inner", TORCH.values(), ids=TORCH)


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for index, (ours, truth) in enumerate(zip(actual, expected, strict=True)):
        largest = truth.abs().max().item() if truth.numel() else 0.0
        assert_within(ours, truth, RTOL * largest, f"tensor {index}")


def through_file(value: Any) -> Any:
    """What a safe load reads back."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# torch's Adam and AdamW


@each_torch
def test_run_of_torch_continues(inner: type[torch.optim.Optimizer]) -> None:
    """Group options come along: Adam's weight decay stays coupled."""
    params = make_params(torch.float64)
    theirs = inner(params, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    rows = make_grads(params, 40)
    train(theirs, rows[:20])
    ours = GrokFastAdamW(clone_params(params), lamb=0.0)
    ours.load_state_dict(through_file(theirs.state_dict()))
    train(theirs, rows[20:])
    train(ours, rows[20:])
    assert_close(ours.param_groups[0]["params"], params)


@each_torch
def test_run_continues_in_torch(inner: type[torch.optim.Optimizer]) -> None:
    params = make_params(torch.float64)
    options = {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1, "lamb": 0.0}
    ours = GrokFastAdamW(params, decoupled_weight_decay=inner is torch.optim.AdamW, **options)
    rows = make_grads(params, 40)
    train(ours, rows[:20])
    theirs = inner(clone_params(params))
    theirs.load_state_dict(through_file(ours.state_dict()))
    train(theirs, rows[20:])
    train(ours, rows[20:])
    assert_close(theirs.param_groups[0]["params"], params)


def test_filter_of_a_torch_run_starts_at_the_next_gradient() -> None:
    params = make_params(torch.float64)
    theirs = torch.optim.AdamW(params, lr=1e-2)
    rows = make_grads(params, 12)
    train(theirs, rows[:5])
    ours = GrokFastAdamW(clone_params(params), alpha=0.9, lamb=1.0)
    ours.load_state_dict(theirs.state_dict())
    means = [torch.zeros_like(param) for param in params]
    for t, row in enumerate(rows[5:]):
        keep = 0.9 if t else 0.0
        means = [keep * m + (1 - keep) * g for m, g in zip(means, row, strict=True)]
        train(theirs, [[g + m for g, m in zip(row, means, strict=True)]])
        train(ours, [row])
    assert_close(ours.param_groups[0]["params"], params)


def test_average_of_a_torch_run_starts_at_the_weights_before_its_next_step() -> None:
    """Whether the weights are loaded before or after the state dict."""
    param = Parameter(torch.ones(2))
    theirs = torch.optim.AdamW([param], lr=0.1)
    ours = GrokFastAdamW([param], weight_ema=0.9)
    train(theirs, [[torch.ones(2)]])
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        param.fill_(100.0)
    param.grad = torch.ones(2)
    ours.step()
    expected = 100.0 + 0.1 * (param.detach() - 100.0)
    # Two roundings at the size of the weights.
    torch.testing.assert_close(ours.state[param]["weight_ema"], expected, rtol=0, atol=2 * 2.0**-17)


@each_torch
def test_amsgrad_is_refused(inner: type[torch.optim.Optimizer]) -> None:
    theirs = inner([Parameter(torch.ones(2))], amsgrad=True)
    train(theirs, [[torch.ones(2)]])
    with pytest.raises(ValueError, match="amsgrad must be False"):
        GrokFastAdamW([Parameter(torch.ones(2))]).load_state_dict(theirs.state_dict())


# Our own states


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


# grokfast-pytorch


INIT_LR = 2e-3 / 3


def lucidrains_dict(params: Sequence[Tensor], **group: Any) -> dict[str, Any]:
    """The layout of `grokfast_pytorch.GrokFastAdamW.state_dict()`."""
    state = {
        i: {
            "steps": 10 + i,
            "exp_avg": randn(*p.shape, seed=20 + i),
            "exp_avg_sq": randn(*p.shape, seed=30 + i).square(),
            "grok_exp_avg": randn(*p.shape, seed=40 + i),
        }
        for i, p in enumerate(params)
    }
    options = {
        "lr": INIT_LR / 2, "betas": (0.9, 0.98), "eps": 1e-9, "weight_decay": 0.01,
        "grokfast": True, "grokfast_alpha": 0.95, "grokfast_lamb": 2.0, "grokfast_after_step": 0,
    }  # fmt: skip
    return {"state": state, "param_groups": [options | group | {"params": [*range(len(params))]}]}


def pair() -> list[Parameter]:
    return [Parameter(randn(4, 3)), Parameter(randn(2, seed=1))]


def test_lucidrains_states_are_taken_as_they_are() -> None:
    params = pair()
    source = lucidrains_dict(params)
    optimizer = GrokFastAdamW(params)
    optimizer.load_state_dict(from_lucidrains(source, INIT_LR))
    names = ("exp_avg", "exp_avg_sq", "grok_exp_avg")
    for i, param in enumerate(params):
        expected = {name: source["state"][i][name] for name in names}
        assert_same({name: optimizer.state[param][name] for name in names}, expected)


def test_lucidrains_step_counts_become_tensors() -> None:
    params = pair()
    optimizer = GrokFastAdamW(params)
    optimizer.load_state_dict(from_lucidrains(lucidrains_dict(params), INIT_LR))
    steps = [optimizer.state[param]["step"] for param in params]
    assert_same(steps, [torch.tensor(10.0), torch.tensor(11.0)])


def test_lucidrains_options_keep_their_meaning() -> None:
    params = pair()
    optimizer = GrokFastAdamW(params, filter="highpass", normalize_lr=True)
    optimizer.load_state_dict(from_lucidrains(lucidrains_dict(params), INIT_LR))
    expected = {
        "lr": INIT_LR / 2, "betas": (0.9, 0.98), "eps": 1e-9, "weight_decay": 0.01 / INIT_LR,
        "alpha": 0.95, "lamb": 2.0, "after_step": 0, "filter": "ema", "normalize_lr": False,
        "decoupled_weight_decay": True,
    }  # fmt: skip
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected


@pytest.mark.parametrize("on", [True, False])
def test_lucidrains_run_continues_by_its_formula(on: bool) -> None:
    """One step, written out; their clamp at eps and our sum differ by eps / vhat, here below 1e-8,
    and the rest by at most 16 roundings of 2**-24 of values below 4."""
    params = pair()
    source = lucidrains_dict(params, grokfast=on)
    for state in source["state"].values():
        state["exp_avg_sq"] += 0.1
    grads = make_grads(params, 1)[0]
    expected = []
    for p, g, s in zip(params, grads, source["state"].values(), strict=True):
        p, g, t = p.detach().double(), g.double(), s["steps"] + 1
        mean = 0.95 * s["grok_exp_avg"].double() + 0.05 * g
        ghat = g + 2.0 * mean if on else g
        m = 0.9 * s["exp_avg"].double() + 0.1 * ghat
        v = 0.98 * s["exp_avg_sq"].double() + 0.02 * ghat**2
        p = p * (1 - (INIT_LR / 2) / INIT_LR * 0.01)
        vhat = (v / (1 - 0.98**t)).sqrt().clamp(min=1e-9)
        expected.append(p - (INIT_LR / 2) * m / (1 - 0.9**t) / vhat)
    optimizer = GrokFastAdamW(params)
    optimizer.load_state_dict(from_lucidrains(source, INIT_LR))
    train(optimizer, [grads])
    for ours, truth in zip(params, expected, strict=True):
        assert_within(ours, truth, 1e-8 + 16 * 4 * 2**-24, "param")


def test_lucidrains_dict_may_lack_parameters_without_state() -> None:
    params = pair()
    source = lucidrains_dict(params)
    del source["state"][0]
    optimizer = GrokFastAdamW(params)
    optimizer.load_state_dict(from_lucidrains(source, INIT_LR))
    assert [optimizer.state[param]["step"].item() for param in params] == [0, 11]


def test_lucidrains_dict_is_not_written() -> None:
    source = lucidrains_dict(pair())
    before = deepcopy(source)
    from_lucidrains(source, INIT_LR)
    assert_same(source, before)


def test_lucidrains_dict_is_refused_without_conversion() -> None:
    params = pair()
    with pytest.raises(ValueError, match=r"from_lucidrains\(state_dict, init_lr=\.\.\.\)"):
        GrokFastAdamW(params).load_state_dict(lucidrains_dict(params))


def test_refused_lucidrains_dict_changes_nothing() -> None:
    params = pair()
    optimizer = GrokFastAdamW(params)
    before = deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError):
        optimizer.load_state_dict(lucidrains_dict(params))
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("init_lr", [0.0, -1e-3, float("nan")])
def test_init_lr_must_be_positive(init_lr: float) -> None:
    with pytest.raises(ValueError, match="init_lr must be finite and > 0"):
        from_lucidrains(lucidrains_dict(pair()), init_lr)


def test_dict_of_another_optimizer_is_not_converted() -> None:
    with pytest.raises(ValueError, match="every group must hold grokfast, grokfast_alpha"):
        from_lucidrains(torch.optim.AdamW(pair()).state_dict(), INIT_LR)


def test_dict_without_step_counts_is_not_converted() -> None:
    source = lucidrains_dict(pair())
    del source["state"][1]["steps"]
    with pytest.raises(ValueError, match="steps"):
        from_lucidrains(source, INIT_LR)


# ironjr/grokfast


def model_64() -> torch.nn.Module:
    model = torch.nn.Sequential(Linear(4, 3), Linear(3, 2)).double()
    with torch.no_grad():
        for seed, param in enumerate(model.parameters()):
            param.copy_(randn(*param.shape, seed=seed, dtype=torch.float64))
    return model


def official_steps(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    means: dict[str, Tensor] | None,
    rows: list[list[Tensor]],
) -> dict[str, Tensor]:
    """The official filter, alpha 0.98 and lamb 2, in front of an optimizer of torch."""
    for row in rows:
        set_grads([*model.parameters()], row)
        if means is None:
            means = {name: p.grad.clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            means[name] = means[name] * 0.98 + p.grad * 0.02
            p.grad = p.grad + means[name] * 2.0
        optimizer.step()
    assert means is not None
    return means


def test_official_run_continues() -> None:
    model = model_64()
    theirs = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)
    rows = make_grads([*model.parameters()], 40)
    means = official_steps(model, theirs, None, rows[:20])
    other = deepcopy(model)
    ours = GrokFastAdamW(other.parameters(), alpha=0.98, lamb=2.0)
    ours.load_state_dict(theirs.state_dict())
    load_official_ema(ours, means, other.named_parameters())
    official_steps(model, theirs, means, rows[20:])
    train(ours, rows[20:])
    assert_close([*other.parameters()], [*model.parameters()])


def test_official_means_are_copied() -> None:
    model = model_64()
    ours = GrokFastAdamW(model.parameters())
    means = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    load_official_ema(ours, means, model.named_parameters())
    train(ours, make_grads([*model.parameters()], 1))
    assert all((mean == 1).all() for mean in means.values())


def test_official_means_do_not_carry_a_graph() -> None:
    model = model_64()
    ours = GrokFastAdamW(model.parameters())
    mean = torch.ones(2, dtype=torch.float64, requires_grad=True)
    load_official_ema(ours, {"1.bias": mean}, model.named_parameters())
    assert not ours.state[model[1].bias]["grok_exp_avg"].requires_grad


def test_parameter_without_official_mean_starts_at_its_next_gradient() -> None:
    model = model_64()
    ours = GrokFastAdamW(model.parameters())
    means = {"1.bias": torch.ones(2, dtype=torch.float64)}
    load_official_ema(ours, means, model.named_parameters())
    rows = make_grads([*model.parameters()], 1)
    train(ours, rows)
    assert_same(ours.state[model[0].weight]["grok_exp_avg"], rows[0][0])


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"2.bias": torch.ones(2)}, KeyError, "'2.bias' is no parameter"),
        ({"1.bias": torch.ones(3)}, ValueError, r"'1.bias' must be of shape \(2,\); got \(3,\)"),
    ],
    ids=["name", "shape"],
)
def test_wrong_official_mean_is_refused(
    bad: dict[str, Tensor], error: type[Exception], text: str
) -> None:
    model = model_64()
    ours = GrokFastAdamW(model.parameters())
    with pytest.raises(error, match=text):
        load_official_ema(ours, bad, model.named_parameters())


@pytest.mark.parametrize("options", [{"lamb": 0.0}, {"filter": None}], ids=str)
def test_official_mean_needs_a_filter(options: dict[str, Any]) -> None:
    model = model_64()
    ours = GrokFastAdamW(model.parameters(), **options)
    with pytest.raises(ValueError, match=r"'1\.bias' must be in a group with a filter"):
        load_official_ema(ours, {"1.bias": torch.ones(2)}, model.named_parameters())


@pytest.mark.parametrize("bad", ["2.bias", "1.bias"], ids=["name", "shape"])
def test_wrong_official_mean_changes_nothing(bad: str) -> None:
    """Not even what belongs to the right means before it."""
    model = model_64()
    ours = GrokFastAdamW(model.parameters())
    before = deepcopy(ours.state_dict())
    means = {"0.bias": torch.ones(3, dtype=torch.float64), bad: torch.ones(3, dtype=torch.float64)}
    with pytest.raises((KeyError, ValueError)):
        load_official_ema(ours, means, model.named_parameters())
    assert_same(ours.state_dict(), before)


# torch.distributed.checkpoint, in one process


def stepped(steps: int, **options: Any) -> tuple[Linear, GrokFastAdamW]:
    model = Linear(3, 2)
    optimizer = GrokFastAdamW(model.parameters(), lr=0.1, weight_ema=0.9, **options)
    train(optimizer, make_grads([*model.parameters()], steps))
    optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("steps", [0, 3], ids=["never_stepped", "stepped"])
def test_reading_the_state_for_a_checkpoint_changes_nothing(steps: int) -> None:
    """In particular no step on invented gradients, which would start the mean at 0."""
    model, optimizer = stepped(steps)
    before = snapshot(optimizer)
    get_optimizer_state_dict(model, optimizer)
    assert_same(snapshot(optimizer), before)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 3], ids=["never_stepped", "stepped"])
def test_checkpointed_run_equals_uninterrupted(
    tmp_path: Path, steps: int, dtype: torch.dtype
) -> None:
    model, optimizer = stepped(steps, state_dtype=dtype)
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path)
    other_model, other = stepped(0, state_dtype=dtype)
    other_model.load_state_dict(model.state_dict())
    loaded = {"optimizer": get_optimizer_state_dict(other_model, other)}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other_model, other, loaded["optimizer"])
    rows = make_grads([*model.parameters()], 2, seed=7)
    train(optimizer, rows)
    train(other, rows)
    assert_same(snapshot(other), snapshot(optimizer))


# With options of every kind that a group may hold.
WHOLE = {
    "GrokFastAdamW": lambda m: GrokFastAdamW(m.parameters(), np.float64(0.1), betas=(0.8, 0.9)),
    "bfloat16": lambda m: GrokFastAdamW(m.parameters(), filter="ma", state_dtype=torch.bfloat16),
    "GrokFastSGD": lambda m: GrokFastSGD(m.parameters(), torch.tensor(0.1), momentum=0.9),
    "AdamATan2": lambda m: AdamATan2(m.parameters(), np.float32(0.1), filter="ema"),
    "Muon": lambda m: Muon(m.parameters(), np.float32(0.1), ns_dtype=torch.float32),
    "rows": lambda m: Muon(m.parameters(), row_splits=range(1, 2), ns_coefficients=(3, -3.2, 1.2)),
    "MuGrokfast": lambda m: MuGrokfast(split_params(m, heads=[m[1]]), ns_dtype=None),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_state_dict_goes_out_and_comes_back(name: str) -> None:
    width = 1 if name == "rows" else 2  # rows of the first matrix, which are split
    model = Sequential(Linear(3, width, bias=False), Linear(width, 1, bias=False))
    optimizer = WHOLE[name](model)
    train(optimizer, make_grads([*model.parameters()], 2))
    before, saved = snapshot(optimizer), optimizer.state_dict()["param_groups"]
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_optimizer_state_dict(model, optimizer, options=options)
    set_optimizer_state_dict(model, optimizer, whole, options=options)
    assert_same(snapshot(optimizer), before)
    loaded = optimizer.state_dict()["param_groups"]
    assert list(map(listed, loaded)) == list(map(listed, saved))


def listed(group: dict[str, Any]) -> dict[str, Any]:
    """Options with lists for tuples, which is how torch hands them back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in group.items()}


def test_a_dtype_is_saved_by_its_name_and_loaded_as_itself() -> None:
    optimizer = Muon([Parameter(torch.ones(2, 2))], ns_dtype=torch.float16)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["ns_dtype"] == "torch.float16"
    other = Muon([Parameter(torch.ones(2, 2))])
    other.load_state_dict(saved)
    assert other.param_groups[0]["ns_dtype"] is torch.float16
    # As dicts of earlier versions have it.
    saved["param_groups"][0]["ns_dtype"] = torch.float32
    other.load_state_dict(saved)
    assert other.param_groups[0]["ns_dtype"] is torch.float32


def test_checkpoint_of_torch_adamw_loads() -> None:
    model = Linear(3, 2)
    theirs = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(theirs, make_grads([*model.parameters()], 3))
    theirs.zero_grad()
    ours = GrokFastAdamW(model.parameters())
    set_optimizer_state_dict(model, ours, get_optimizer_state_dict(model, theirs))
    for param in model.parameters():
        expected = dict(theirs.state[param])
        assert_same({name: ours.state[param][name] for name in expected}, expected)
