"""What may happen to Muon between and during steps: gradients that are missing, overflows, options
that change, backends by name, copies, closures and hooks."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn import Linear, Parameter

import trm_fast
from trm_fast import BackendError, Muon
from trm_fast.optim import WeightEMA

from .muon_checks import EXACT, assert_near, formula, found, matrix, trained
from .torch_checks import (
    assert_same,
    clone_params,
    make_grads,
    set_grads,
    snapshot,
    train,
    without_grads,
)

FULL: dict[str, Any] = {"filter": "ema", "weight_ema": 0.9, "lr": 0.05}
BACKENDS = ["reference"] + (
    ["cpp"] if trm_fast.backends()["newton_schulz"]["cpu"]["cpp"].startswith("multiplies") else []
)


def two() -> list[Parameter]:
    return [matrix(6, 4), matrix(5, 7, seed=1)]


# Gradients


@pytest.mark.parametrize("filter", [None, "ema", "projection", "ma"])
def test_parameter_without_gradient_is_left_alone(filter: str | None) -> None:
    params = two()
    alone = clone_params(params[:1])
    optimizer = Muon(params, filter=filter, weight_ema=0.9, lr=0.1, window=2)
    before = snapshot(optimizer)[1]
    rows = [[row[0], None] for row in make_grads(params, 3)]
    train(optimizer, rows)
    assert_same(snapshot(optimizer)[1], before)
    train(Muon(alone, filter=filter, weight_ema=0.9, lr=0.1, window=2), [r[:1] for r in rows])
    assert torch.equal(params[0], alone[0])


def test_late_gradient_starts_a_parameter_afresh() -> None:
    params = two()
    alone = clone_params(params)
    optimizer = Muon(params, **FULL)
    rows = make_grads(params, 5)
    train(optimizer, [[row[0], None] for row in rows[:2]])
    train(optimizer, rows[2:])
    train(Muon(alone[:1], **FULL), [row[:1] for row in rows])
    train(Muon(alone[1:], **FULL), [row[1:] for row in rows[2:]])
    assert_same([p.detach() for p in params], [p.detach() for p in alone])


def test_gradients_that_come_and_go_equal_the_formula() -> None:
    params = [matrix(6, 4, dtype=torch.float64), matrix(4, 6, seed=1, dtype=torch.float64)]
    starts = clone_params(params)
    optimizer = Muon(params, weight_ema=0.9, lr=0.1, **EXACT)
    rows = make_grads(params, 8)
    given = [[a if t % 2 else None, b if t % 3 else None] for t, (a, b) in enumerate(rows)]
    train(optimizer, given)
    for index, (param, start) in enumerate(zip(params, starts, strict=True)):
        grads = [row[index] for row in given if row[index] is not None]
        truth = formula(start, grads, lr=0.1, weight_ema=0.9)  # type: ignore[arg-type]
        for name, value in truth.items():
            assert_near(found(optimizer, param)[name], value, name)
        assert optimizer.state[param]["step"].item() == len(grads)


def test_no_gradients_at_all_change_nothing() -> None:
    optimizer, _ = trained(two(), 2, **FULL)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = None
    before = snapshot(optimizer)
    optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_frozen_parameter_has_no_state_until_it_is_thawed() -> None:
    early, late = matrix(6, 4), Parameter(matrix(4, 4).detach(), requires_grad=False)
    optimizer = Muon([early, late], **FULL)
    assert [*optimizer.state] == [early]
    late.requires_grad_(True)
    (twin,) = clone_params([late])
    rows = make_grads([early, late], 3)
    train(optimizer, rows)
    train(Muon([twin], **FULL), [row[1:] for row in rows])
    assert torch.equal(late, twin)


@pytest.mark.parametrize("steps", [0, 1], ids=["first step", "later"])
def test_sparse_gradient_is_refused_with_nothing_changed(steps: int) -> None:
    params = two()
    optimizer = Muon([{"params": [param]} for param in params])
    train(optimizer, make_grads(params, steps))
    set_grads(params, make_grads(params, 1)[0])
    params[1].grad = params[1].grad.to_sparse()
    before = [(p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()) for p in params]
    with pytest.raises(RuntimeError, match="Muon does not support sparse gradients"):
        optimizer.step()
    after = [(p.detach(), optimizer.state[p]["momentum_buffer"]) for p in params]
    assert_same(after, before)


# Mixed precision


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_overflow_under_a_scaler_changes_no_bit(backend: str, steps: int, value: float) -> None:
    params = two()
    options = {"row_splits": 1, "clip_norm": 1.0, "backend": backend, **FULL}
    optimizer, _ = trained(params, steps, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = without_grads(snapshot(optimizer))
    scaler.scale(sum(param.sum() for param in params)).backward()
    params[1].grad[0, 0] = value
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert_same(without_grads(snapshot(optimizer)), before)
    # The next step is what it would have been.
    twins = [matrix(6, 4), matrix(5, 7, seed=1)]
    twin = Muon(twins, **options)
    train(twin, make_grads(twins, steps))
    rows = make_grads(params, 1, seed=5)
    train(optimizer, rows)
    train(twin, rows)
    assert_same(snapshot(optimizer), snapshot(twin))


@pytest.mark.parametrize("filter", [None, "ema", "cosine_gate"])
def test_scaled_training_equals_unscaled(filter: str | None) -> None:
    """Bit for bit, because the scale is a power of two."""
    results = []
    for enabled in (True, False):
        layer = Linear(4, 6, bias=False)
        layer.weight.data.copy_(matrix(6, 4).detach())
        optimizer = Muon(layer.parameters(), lr=0.1, filter=filter)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for seed in range(4):
            optimizer.zero_grad()
            loss = layer(matrix(8, 4, seed=seed).detach()).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(without_grads(snapshot(optimizer)))
    assert_same(results[0], results[1])


def test_found_inf_and_scale_are_forgotten_after_the_step() -> None:
    params = two()
    optimizer, _ = trained(params, 1, **FULL)
    twin, _ = trained(two(), 1, **FULL)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.full((), 4.0)
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale
    rows = make_grads(params, 2, seed=5)
    train(optimizer, rows)
    train(twin, rows)
    assert_same(snapshot(optimizer), snapshot(twin))


# Options and tensors that change between steps


def test_options_changed_between_steps_hold_from_then_on() -> None:
    changes: list[dict[str, Any]] = [
        {"lr": 0.2}, {"weight_decay": 0.5}, {"momentum": 0.5}, {"nesterov": False},
        {"ns_steps": 2}, {"ns_coefficients": "you"}, {"eps": 20.0},
        {"adjust_lr_fn": "match_rms_adamw"}, {"row_splits": 3}, {"row_splits": (4, 2)},
        {"maximize": True}, {"ns_dtype": torch.float32}, {"weight_ema": 0.5},
    ]  # fmt: skip
    for change in changes:
        param = matrix(6, 8)
        optimizer, _ = trained([param], 2, weight_ema=0.9)
        (twin,) = clone_params([param])
        other = Muon([twin], **{"weight_ema": 0.9, **change})
        own = other.state_dict()["param_groups"]
        other.load_state_dict(optimizer.state_dict() | {"param_groups": own})
        optimizer.param_groups[0].update(change)
        rows = make_grads([param], 2, seed=3)
        train(optimizer, rows)
        train(other, rows)
        assert_same(snapshot(optimizer), snapshot(other))
        plain, _ = trained([matrix(6, 8)], 2, weight_ema=0.9)
        train(plain, rows)
        assert not torch.equal(snapshot(plain)[0]["weight_ema"], snapshot(other)[0]["weight_ema"])


def test_coefficients_and_splits_changed_in_place_count() -> None:
    for name, first, second in (
        ("ns_coefficients", [2.0, -1.5, 0.5], [1.5, -0.5, 0.0]),
        ("row_splits", [4, 2], [2, 4]),
    ):
        param, twin = matrix(6, 8), matrix(6, 8)
        given = list(first)
        optimizer = Muon([{"params": [param], name: given}], lr=0.1)
        other = Muon([{"params": [twin], name: list(first)}], lr=0.1)
        rows = make_grads([param], 2)
        train(optimizer, rows[:1])
        train(other, rows[:1])
        given[:] = second
        other.param_groups[0][name] = list(second)
        train(optimizer, rows[1:])
        train(other, rows[1:])
        assert torch.equal(param, twin), name


BAD: list[tuple[str, Any, str]] = [
    ("row_splits", 4, "Muon: a parameter must have rows that row_splits=4 divides"),
    ("row_splits", 0, "Muon: row_splits must be"),
    ("batch_dims", 1, "Muon: a parameter must have at least 3 dimensions"),
    ("adjust_lr_fn", "rms", "Muon: adjust_lr_fn must be one of"),
    ("ns_steps", 0, "steps must be >= 1"),
    ("ns_coefficients", "kellr", "did you mean 'keller'"),
    ("ns_method", "fast", "method must be one of"),
    ("ns_dtype", torch.int8, "dtype must be one of"),
    ("eps", 0.0, "eps must be finite and > 0"),
    ("momentum", 1.0, "Muon: momentum must be in"),
    ("lr", -1.0, "Muon: lr must be"),
    ("weight_decay", float("nan"), "Muon: weight_decay must be"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=[f"{n}={v}" for n, v, _ in BAD])
def test_bad_option_of_the_last_group_keeps_the_first_from_its_step(
    name: str, value: Any, message: str
) -> None:
    params = two()
    optimizer = Muon([{"params": params[1:]}, {"params": params[:1]}], **FULL)
    train(optimizer, [[g for g in row[::-1]] for row in make_grads(params, 1)])
    before = snapshot(optimizer)
    optimizer.param_groups[1][name] = value
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_state_and_weights_may_move_in_memory() -> None:
    def weights(optimizer: Muon) -> None:
        for param in optimizer.param_groups[0]["params"]:
            param.data = param.data.clone()

    def states(optimizer: Muon) -> None:
        for state in optimizer.state.values():
            for value in state.values():
                value.data = value.data.clone()

    def replaced(optimizer: Muon) -> None:
        for state in optimizer.state.values():
            state.update({name: value.clone() for name, value in state.items()})

    def transposed(optimizer: Muon) -> None:
        for param in optimizer.param_groups[0]["params"]:
            param.data = param.data.t().contiguous().t()

    for move in (weights, states, replaced, transposed):
        params = two()
        options = {"ns_dtype": torch.float32, **FULL}
        optimizer, _ = trained(params, 2, **options)
        twin, _ = trained(two(), 2, **options)
        move(optimizer)
        rows = make_grads(params, 2, seed=3)
        train(optimizer, rows)
        train(twin, rows)
        for mine, theirs in zip(snapshot(optimizer), snapshot(twin), strict=True):
            for name, value in theirs.items():
                # Another order of memory may sum products in another order.
                assert_near(mine[name], value, f"{move.__name__} {name}", 1e-5)


def test_step_count_set_in_place_restarts_the_average_too() -> None:
    """At step 0 the average of the weights starts at the weights."""
    for reset in (lambda state: state["step"].zero_(), lambda state: state.update(step=0)):
        param = matrix(6, 4)
        optimizer, _ = trained([param], 2, **FULL)
        reset(optimizer.state[param])
        before = param.detach().clone()
        train(optimizer, make_grads([param], 1, seed=3))
        average = optimizer.state[param]["weight_ema"]
        expected = before.double() + 0.1 * (param.detach().double() - before.double())
        assert_near(average, expected, "average", 2**-22)
        assert optimizer.state[param]["step"].item() == 1


def test_model_may_be_cast_after_construction() -> None:
    layer = Linear(4, 6, bias=False)
    optimizer = Muon(layer.parameters(), lr=0.05)
    layer.weight.grad = matrix(6, 4, seed=1).detach()
    optimizer.step()
    optimizer.zero_grad()
    layer.to(torch.bfloat16)
    before = optimizer.state[layer.weight]["momentum_buffer"].clone()
    layer.weight.grad = matrix(6, 4, seed=2).detach().bfloat16()
    optimizer.step()
    after = optimizer.state[layer.weight]["momentum_buffer"]
    assert after.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    assert_near(after, before + 0.05 * (layer.weight.grad.float() - before), "", 2**-21)


def test_sixteen_bit_momentum_is_near_the_float32_one() -> None:
    params, twins = two(), two()
    narrow, rows = trained(params, 20, state_dtype={"momentum_buffer": torch.bfloat16})
    wide = Muon(twins)
    train(wide, rows)
    for param, twin in zip(params, twins, strict=True):
        mine, theirs = (o.state[p]["momentum_buffer"] for o, p in ((narrow, param), (wide, twin)))
        assert mine.dtype == torch.bfloat16 and theirs.dtype == torch.float32
        # Each of 20 steps rounds at most by 2^-7 of the largest value so far, stochastically.
        assert_near(mine, theirs, "", 20 * 2**-7 / 2)


def test_averages_belong_to_weight_ema() -> None:
    layer = Linear(4, 6, bias=False)
    optimizer = Muon(layer.parameters(), weight_ema=0.5, lr=0.1)
    start = layer.weight.detach().clone()
    layer.weight.grad = matrix(6, 4).detach()
    optimizer.step()
    own = layer.weight.detach().clone()
    with WeightEMA.of(optimizer, layer).swapped():
        assert_near(layer.weight, 0.5 * (start.double() + own.double()), "", 2**-22)
    assert torch.equal(layer.weight, own)


# Backends


def test_named_backend_that_cannot_multiply_so_fails_before_the_momentum_moves() -> None:
    for how in ("argument", "process"):
        for ns_dtype, message in ((torch.float32, "bfloat16 only"), (torch.float64, "float64")):
            if BACKENDS == ["reference"]:
                message = "named backend 'cpp' cannot run"
            param = matrix(6, 4)
            backend = "cpp" if how == "argument" else None
            optimizer = Muon([param], backend=backend, ns_dtype=ns_dtype, **FULL)
            set_grads([param], make_grads([param], 1)[0])
            before = snapshot(optimizer)
            with pytest.raises(BackendError, match=message):
                if backend:
                    optimizer.step()
                else:
                    with trm_fast.use_backend("cpp"):
                        optimizer.step()
            assert_same(snapshot(optimizer), before)
            if how == "process":
                optimizer.step()
                assert optimizer.state[param]["step"].item() == 1


def test_unknown_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(BackendError, match="did you mean 'reference'"):
        Muon([matrix(6, 4)], backend="referenc")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", [{}, {"row_splits": (4, 1, 1)}], ids=["whole", "split"])
def test_every_backend_is_near_the_formula(backend: str, split: dict[str, Any]) -> None:
    """In bfloat16: 1 % of each step."""
    param = Parameter(torch.zeros(48, 40))
    split = {"row_splits": (32, 8, 8)} if split else {}
    optimizer, rows = trained([param], 3, backend=backend, lr=0.1, weight_decay=0.0, **split)
    grads = [row[0].split(split.get("row_splits", 48)) for row in rows]
    blocks = [
        formula(torch.zeros_like(parts[0]), parts, lr=0.1, weight_decay=0.0)["param"]
        for parts in zip(*grads, strict=True)
    ]
    truth = torch.cat(blocks)
    assert (param - truth).norm() <= 0.03 * truth.norm()
    assert_near(
        optimizer.state[param]["momentum_buffer"],
        formula(torch.zeros(48, 40), [row[0] for row in rows])["momentum_buffer"],
        "buffer", 2**-21,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_repeat_to_the_last_bit(backend: str) -> None:
    results = []
    for _ in range(2):
        optimizer, _ = trained([matrix(97, 33), matrix(64, 64)], 3, backend=backend, **FULL)
        results.append(snapshot(optimizer))
    assert_same(results[0], results[1])


# Copies, closures, hooks


@pytest.mark.parametrize("copy", [deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("steps", [0, 2])
def test_copy_continues_alike(copy: Callable[[Muon], Muon], steps: int) -> None:
    options = {"row_splits": 1, "clip_norm": 1.0, "state_dtype": torch.bfloat16, **FULL}
    params = two()
    optimizer, _ = trained(params, steps, **options)
    twin = copy(optimizer)
    assert twin.clip_norm == 1.0 and twin._step_supports_amp_scaling
    rows = make_grads(params, 2, seed=3)
    train(twin, rows)
    assert optimizer.state[params[0]]["step"].item() == steps
    train(optimizer, rows)
    assert_same(snapshot(twin), snapshot(optimizer))


def test_hooks_run_around_the_step_and_the_state_dict() -> None:
    param = matrix(6, 4)
    optimizer, _ = trained([param], 1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("saving"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after", "saving", "loading", "loaded"]


def test_step_leaves_no_graph_and_raises_the_version() -> None:
    param = matrix(6, 4)
    optimizer = Muon([param], **FULL)
    for row in make_grads([param], 2):
        version = param._version
        train(optimizer, [row])
        assert param._version > version and param.grad_fn is None
        assert all(value.grad_fn is None for value in optimizer.state[param].values())
    product = param * param
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_statistics_tell_what_the_filter_sees() -> None:
    param = matrix(6, 4)
    optimizer, rows = trained([param], 3, filter="ema")
    (seen,) = optimizer.statistics()
    mean = optimizer.state[param]["grok_exp_avg"]
    cosine = torch.cosine_similarity(rows[-1][0].flatten(), mean.flatten(), 0)
    assert_near(seen.cosine, cosine[None], "cosine", 1e-5)
