"""State of torch's Adam and AdamW, and in both directions through torch.distributed.checkpoint.

The truth is the run that was never interrupted.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
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
    split_params,
)

from .interop_checks import assert_close, through_file
from .torch_checks import (
    assert_same,
    clone_params,
    make_grads,
    make_params,
    snapshot,
    train,
)

TORCH = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}
each_torch = pytest.mark.parametrize("inner", TORCH.values(), ids=TORCH)


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
