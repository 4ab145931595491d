"""Muon beside torch.optim.Muon: the same step, the same state dict, and its suite's checks."""

import io
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Linear, Parameter
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, OneCycleLR, ReduceLROnPlateau

from trm_fast import Muon

from .muon_checks import EXACT, assert_near, formula, matrix, trained
from .torch_checks import assert_same, clone_params, make_grads, set_grads, snapshot, train

SHAPES = {"tall": (48, 20), "wide": (20, 48), "square": (32, 32), "odd": (97, 33)}
STEPS = 5


def pair(
    shape: tuple[int, int], dtype: torch.dtype, backend: str | None, **options: Any
) -> tuple[Parameter, Parameter, dict[str, Tensor]]:
    """Weights after a few steps of ours, of torch's, and by the formula."""
    ours = matrix(*shape, dtype=dtype)
    theirs, start = clone_params([ours]) + clone_params([ours])
    rows = make_grads([ours], STEPS)
    train(Muon([ours], backend=backend, **options), rows)
    train(torch.optim.Muon([theirs], **options), rows)
    steps = options.pop("ns_steps", 5)
    triple = options.pop("ns_coefficients", (3.4445, -4.7750, 2.0315))
    return ours, theirs, formula(start, [r[0] for r in rows], triples=[triple] * steps, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no nesterov": {"nesterov": False},
    "match_rms": {"adjust_lr_fn": "match_rms_adamw"},
    "match_rms, no nesterov": {"adjust_lr_fn": "match_rms_adamw", "nesterov": False},
    "original": {"adjust_lr_fn": "original", "weight_decay": 0.0},
    "momentum": {"momentum": 0.5},
    "coefficients": {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 8},
    "eps": {"eps": 100.0},
    "one step": {"ns_steps": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_our_error_is_at_most_twice_that_of_torch(
    dtype: torch.dtype, shape: tuple[int, int], options: dict[str, Any], backend: str | None
) -> None:
    """Both multiply in bfloat16; the truth is the formula in float64. One unit of the stored
    weights comes on top."""
    ours, theirs, truth = pair(shape, dtype, backend, lr=0.1, **options)
    mine, own = ((p.double() - truth["param"]).detach() for p in (ours, theirs))
    assert mine.norm() <= 2 * own.norm() + torch.finfo(dtype).eps * truth["param"].norm()
    # Of one element both are the extremes of random errors, which differ more.
    unit = torch.finfo(dtype).eps * truth["param"].abs().max()
    assert mine.abs().max() <= 3 * own.abs().max() + unit


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_products_are_near_the_formula(
    shape: tuple[int, int], options: dict[str, Any]
) -> None:
    ours, start = matrix(*shape), matrix(*shape)
    rows = make_grads([ours], STEPS)
    train(Muon([ours], lr=0.1, ns_dtype=torch.float32, **options), rows)
    options = dict(options)
    steps = options.pop("ns_steps", 5)
    triple = options.pop("ns_coefficients", (3.4445, -4.7750, 2.0315))
    truth = formula(start, [r[0] for r in rows], lr=0.1, triples=[triple] * steps, **options)
    # An update and three products in each step are rounded by 2^-24 each; what a step adds is
    # lifted by the others, all in all 3.4445^5 = 485-fold, or 2^8 with (2, -1.5, .5).
    moved = (truth["param"] - start.double()).norm()
    weights = STEPS * 2**-23 * truth["param"].norm()
    assert (ours.double() - truth["param"]).norm() <= 26 * 485 * 2**-24 * moved + weights


def test_ours_leaves_a_bfloat16_momentum_alone_that_torch_normalises() -> None:
    """torch 2.13 without nesterov divides the buffer itself by its norm, as the update is the
    buffer where no dtype changes: sqrt(1/40) = 0.158 instead of 0.1 for ones of 40 elements."""
    ours, theirs = (Parameter(torch.zeros(5, 8, dtype=torch.bfloat16)) for _ in range(2))
    options = {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0}
    optimizers = Muon([ours], **options), torch.optim.Muon([theirs], **options)
    for optimizer in optimizers:
        train(optimizer, [[torch.ones(5, 8, dtype=torch.bfloat16)]])
    buffers = [optimizer.state[p]["momentum_buffer"] for optimizer, p in zip(
        optimizers, (ours, theirs), strict=True)]  # fmt: skip
    assert_near(buffers[0], torch.full((5, 8), 0.1), "ours", 2**-22)
    if torch.__version__.startswith("2.13."):
        assert_near(buffers[1], torch.full((5, 8), 40**-0.5), "torch", 2**-7)


# State dicts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("named", [False, True])
def test_state_dict_of_torch_continues_here(dtype: torch.dtype, named: bool) -> None:
    options = {"lr": 0.05, "momentum": 0.8, "adjust_lr_fn": "match_rms_adamw"}
    params = [matrix(12, 8, dtype=dtype), matrix(6, 16, seed=1, dtype=dtype)]
    rows = make_grads(params, 6)
    theirs = torch.optim.Muon(
        [(f"w{i}", p) for i, p in enumerate(params)] if named else params, **options
    )
    train(theirs, rows[:3])
    copies = clone_params(params)
    ours = Muon([(f"w{i}", p) for i, p in enumerate(copies)] if named else copies)
    ours.load_state_dict(theirs.state_dict())
    group = ours.param_groups[0]
    assert {name: group[name] for name in options} == options
    assert group["row_splits"] == 1 and group["ns_dtype"] == torch.bfloat16
    for mine, own in zip(copies, params, strict=True):
        buffer = ours.state[mine]["momentum_buffer"]
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, theirs.state[own]["momentum_buffer"].float())
    # From there on: the formula for the gradients to come, from the buffer that was loaded.
    starts = [p.detach().double() for p in copies]
    buffers = [ours.state[p]["momentum_buffer"].double() for p in copies]
    ours.param_groups[0]["ns_dtype"] = torch.float32
    train(ours, rows[3:4])
    for start, buffer, grad, param in zip(starts, buffers, rows[3], copies, strict=True):
        # One step after a past that equals its momentum: the gradients 5 buf and g behind zero.
        past = [buffer / 0.2, grad.double()]
        truth = formula(torch.zeros_like(start), past, weight_decay=0.0, **options)["param"]
        first = formula(torch.zeros_like(start), past[:1], weight_decay=0.0, **options)["param"]
        expected = start * (1 - 0.05 * 0.1) + truth - first
        # 16 roundings to float32, 485-fold, then that of the stored weight.
        error = (param.double() - expected).abs().max()
        assert error <= 16 * 485 * 2**-24 * 0.2 + torch.finfo(dtype).eps * start.abs().max()


def test_torch_continues_our_state_dict() -> None:
    options: dict[str, Any] = {"lr": 0.05, "nesterov": False, "ns_steps": 4}
    ours = matrix(12, 8)
    mine, _ = trained([ours], 3, **options)
    (theirs,) = clone_params([ours])
    torchs = torch.optim.Muon([theirs])
    torchs.load_state_dict(deepcopy(mine.state_dict()))  # torch would share the tensors
    assert torchs.param_groups[0]["ns_steps"] == 4 and torchs.param_groups[0]["lr"] == 0.05
    buffers = mine.state[ours]["momentum_buffer"], torchs.state[theirs]["momentum_buffer"]
    assert torch.equal(*buffers) and buffers[0].data_ptr() != buffers[1].data_ptr()
    start = ours.detach().clone()
    for optimizer in (mine, torchs):
        train(optimizer, make_grads([ours], 2, seed=7))
    # Both compute buf + 0.05 (g - buf) in float32.
    assert_near(buffers[0], buffers[1], "buffer", 2**-21)
    # Both orthogonalise in bfloat16, which is 1 % off, with room for as much again.
    assert (ours - theirs).norm() <= 0.04 * (theirs - start).norm()


def test_state_of_a_bfloat16_model_stays_float32_in_a_file() -> None:
    first = [matrix(12, 8, dtype=torch.bfloat16), matrix(8, 8, dtype=torch.bfloat16)]
    options: dict[str, Any] = {"filter": "ema", "weight_ema": 0.99, "lr": 0.05}
    optimizer, _ = trained(first, 3, **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = clone_params(first)
    loaded = Muon(second)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for state in loaded.state.values():
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert {"momentum_buffer", "grok_exp_avg", "weight_ema"} < state.keys()
    rest = make_grads(first, 3, seed=9)
    train(optimizer, rest)
    train(loaded, rest)
    assert_same(snapshot(loaded), snapshot(optimizer))


@pytest.mark.parametrize("ours_named", [False, True])
@pytest.mark.parametrize("theirs_named", [False, True])
def test_loaded_optimizer_continues_alike(ours_named: bool, theirs_named: bool) -> None:
    def build(params: list[Parameter], named: bool, **options: Any) -> Muon:
        given = [(f"w{i}", p) for i, p in enumerate(params)] if named else params
        return Muon(given, **options)

    params = [matrix(12, 8), matrix(6, 4, seed=1)]
    optimizer = build(params, ours_named, row_splits=2, filter="ma", window=2, weight_ema=0.9)
    rows = make_grads(params, 6)
    train(optimizer, rows[:3])
    copies = clone_params(params)
    loaded = build(copies, theirs_named, filter="ma", window=2)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[0]["row_splits"] == 2
    train(optimizer, rows[3:])
    train(loaded, rows[3:])
    assert_same(snapshot(loaded), snapshot(optimizer))


def test_equal_runs_give_equal_state_dicts() -> None:
    dicts = []
    for _ in range(2):
        optimizer, _ = trained([matrix(12, 8), matrix(6, 4)], 3, weight_ema=0.9, filter="ema")
        dicts.append(optimizer.state_dict())
    assert_same(dicts[0]["state"], dicts[1]["state"])
    assert_same(dicts[0]["param_groups"], dicts[1]["param_groups"])


def test_state_of_another_shape_is_refused_with_nothing_loaded() -> None:
    optimizer, _ = trained([matrix(6, 4)], 2)
    other = Muon([matrix(4, 6)], lr=0.5)
    with pytest.raises(ValueError, match=r"momentum_buffer .* must be a tensor \(4, 6\)"):
        other.load_state_dict(optimizer.state_dict())
    (state,) = other.state.values()
    assert other.param_groups[0]["lr"] == 0.5 and not state["momentum_buffer"].any()


# The checks of torch's suite


def descend(optimizer: Any, params: list[Parameter], schedulers: Any = (), steps: int = 30) -> Any:
    """Loss before and after steps on a small regression."""
    x, y = matrix(32, 8, seed=5).detach(), matrix(32, 3, seed=6).detach()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (torch.tanh(x @ params[0].t()) @ params[1].t() - y).square().mean()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(steps):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            plateau = isinstance(scheduler, ReduceLROnPlateau)
            scheduler.step(loss.item()) if plateau else scheduler.step()
    return first, closure().item()


RUNS: dict[str, dict[str, Any]] = {
    "default": {"lr": 0.02},
    "tensor lr": {"lr": torch.tensor(0.02)},
    "tensor weight decay": {"lr": 0.02, "weight_decay": torch.tensor(0.1)},
    "no nesterov": {"lr": 0.02, "nesterov": False},
    "match_rms": {"lr": 0.05, "adjust_lr_fn": "match_rms_adamw"},
    "spectral": {"lr": 0.02, "adjust_lr_fn": "spectral"},
    "ema": {"lr": 0.02, "filter": "ema"},
    "float32": {"lr": 0.02, "ns_dtype": torch.float32},
    "reference": {"lr": 0.02, "backend": "reference"},
    "clipped": {"lr": 0.02, "clip_norm": 0.1},
    "momentum in bf16": {"lr": 0.02, "state_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("maximize", [False, True], ids=["minimise", "maximise"])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_loss_goes_the_right_way(options: dict[str, Any], maximize: bool) -> None:
    params = [matrix(16, 8), matrix(3, 16, seed=1)]
    first, last = descend(Muon(params, maximize=maximize, **options), params)
    assert last > first if maximize else last < 0.9 * first


@pytest.mark.parametrize(
    "make",
    [
        lambda o: [ExponentialLR(o, 0.9)],
        lambda o: [LinearLR(o), ReduceLROnPlateau(o)],
        lambda o: [OneCycleLR(o, max_lr=0.05, total_steps=31)],
    ],
    ids=["exponential", "two", "one cycle"],
)
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_schedulers_move_the_learning_rate(make: Any, tensor: bool) -> None:
    ends = []
    for scheduled in (make, lambda _: []):
        params = [matrix(16, 8), matrix(3, 16, seed=1)]
        optimizer = Muon(params, lr=torch.tensor(0.05) if tensor else 0.05)
        first, last = descend(optimizer, params, scheduled(optimizer))
        assert last < first
        ends.append(last)
    assert ends[0] != ends[1]


def test_tensor_learning_rate_equals_a_number_and_is_read_at_each_step() -> None:
    """A power of two, so that float32 holds it and the products with the ratios agree."""
    params, twins = [matrix(16, 4), matrix(4, 4)], [matrix(16, 4), matrix(4, 4)]
    lr = torch.tensor(2.0**-4)
    ours, theirs = Muon(params, lr=lr), Muon(twins, lr=2.0**-4)
    for row in make_grads(params, 4):
        train(ours, [row])
        train(theirs, [row])
        lr.mul_(0.5)
        theirs.param_groups[0]["lr"] *= 0.5
    assert_same([p.detach() for p in params], [p.detach() for p in twins])
    assert lr.item() == 2.0**-8


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_zero_learning_rate_moves_the_momentum_only(lr: Any) -> None:
    param = matrix(6, 4)
    before = param.detach().clone()
    optimizer, rows = trained([param], 2, lr=lr, weight_decay=0.5)
    assert torch.equal(param, before)
    truth = formula(before, [row[0] for row in rows])["momentum_buffer"]
    assert_near(optimizer.state[param]["momentum_buffer"], truth, "", 2**-21)


def test_added_group_trains_like_an_optimizer_of_its_own() -> None:
    first, second = matrix(6, 4), matrix(8, 4)
    alone = clone_params([first, second])
    optimizer = Muon([first])
    rows = make_grads([first, second], 4)
    set_grads([first], rows[0][:1])
    optimizer.step()
    optimizer.add_param_group({"params": [second], "row_splits": 2, "lr": 0.1})
    train(optimizer, rows[1:])
    train(Muon(alone[:1]), [row[:1] for row in rows])
    train(Muon(alone[1:], row_splits=2, lr=0.1), [row[1:] for row in rows[1:]])
    assert torch.equal(first, alone[0]) and torch.equal(second, alone[1])


def test_a_linear_layer_learns_with_autograd() -> None:
    layer = Linear(4, 4, bias=False, dtype=torch.float64)
    optimizer = Muon(layer.parameters(), lr=0.1, weight_decay=0.0, **EXACT)
    target, x = matrix(4, 4, dtype=torch.float64), matrix(16, 4, seed=2, dtype=torch.float64)
    losses = []
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 100)
        optimizer.zero_grad()
        loss = (layer(x.detach()) - x.detach() @ target.detach()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
