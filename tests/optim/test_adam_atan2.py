"""AdamATan2: its formula, its bound, official training settings, and dicts of its forerunner.

The truth is the published update, written out in float64 in ``filter_checks.ATan2``.
"""

from copy import deepcopy
from math import pi
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from trm_fast.optim import AdamATan2

from .filter_checks import ATan2, assert_close, each_backend
from .torch_checks import (
    Options,
    assert_same,
    assert_within,
    clone_params,
    make_grads,
    make_params,
    one,
    randn,
    snapshot,
    step_with,
    train,
)

TRM: Options = {"betas": (0.9, 0.95), "weight_decay": 1.0}


@pytest.mark.parametrize(
    "options",
    [{}, TRM, {"lr": 1e-2, "betas": (0.0, 0.0)}, {"lr": 0.1, "weight_decay": 0.0}],
    ids=["defaults", "trm", "no_memory", "no_decay"],
)
def test_steps_follow_the_published_formula(options: Options) -> None:
    params = make_params(torch.float64)
    truth = ATan2(clone_params(params), **options)
    rows = make_grads(params, 50)
    ours = AdamATan2(params, **options)
    train(ours, rows)
    train(truth, rows)
    assert_close(params, truth.param_groups[0]["params"])
    for param, twin in zip(params, truth.param_groups[0]["params"], strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert_close([ours.state[param][name]], [truth.state[twin][name]])


@each_backend
def test_float32_follows_float64(backend: str) -> None:
    """A step has 8 roundings in an update of at most lr * pi / 2 / (1 - beta1) = 16 lr, and two in
    the weight."""
    params = make_params()
    exact = [Parameter(param.detach().double()) for param in params]
    rows, lr = make_grads(params, 50), 1e-2
    train(AdamATan2(params, lr=lr, backend=backend, **TRM), rows)
    train(ATan2(exact, lr=lr, **TRM), [[grad.double() for grad in row] for row in rows])
    for param, twin in zip(params, exact, strict=True):
        size = twin.detach().abs() + 50 * 2 * lr  # a weight moves by less than 2 lr in a step
        assert_within(param, twin, 50 * 2**-24 * (8 * 16 * lr + 2 * size), "param")


@each_backend
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_zero_gradients_move_nothing_but_the_decay(weight_decay: float, backend: str) -> None:
    """atan2(0, 0) = 0, where m / (sqrt(v) + 0) would be NaN."""
    param = one(1.0, -2.0)
    optimizer = AdamATan2([param], lr=0.5, weight_decay=weight_decay, backend=backend)
    step_with(optimizer, torch.zeros(2))
    assert_same(param.detach(), torch.tensor([1.0, -2.0]) * (1 - 0.5 * weight_decay))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
@each_backend
def test_update_is_bounded(scale: float, backend: str) -> None:
    """|update| <= lr * pi / 2 / (1 - beta1^t), also where squares leave float32."""
    lr, beta1 = 2.0**-6, 0.9
    param = Parameter(torch.zeros(1000))
    options: Options = {"betas": (beta1, 0.95), "weight_decay": 0.0, "backend": backend}
    optimizer = AdamATan2([param], lr=lr, **options)
    for t in range(1, 8):
        before = param.detach().clone()
        step_with(optimizer, scale * randn(1000, seed=t))
        bound = lr * pi / 2 / (1 - beta1**t)
        # The difference of two stored weights: one rounding each, of values below 8 bounds.
        assert ((param.detach() - before).abs() <= bound * (1 + 16 * 2**-23)).all()


def test_scale_of_the_gradients_does_not_matter() -> None:
    """There is no eps; powers of two scale without rounding."""
    params = make_params()
    twins = clone_params(params)
    rows = make_grads(params, 5)
    train(AdamATan2(params), rows)
    train(AdamATan2(twins), [[2.0**20 * grad for grad in row] for row in rows])
    assert_same(params, twins)


def test_decay_is_decoupled() -> None:
    """p * (1 - lr * wd) exactly, whatever the gradient, and no part of the moments."""
    param, twin = one(4.0, -8.0), one(4.0, -8.0)
    grad = torch.tensor([0.3, 0.7])
    decayed = AdamATan2([param], lr=2.0**-3, weight_decay=0.5)
    plain = AdamATan2([twin], lr=2.0**-3, weight_decay=0.0)
    step_with(decayed, grad)
    step_with(plain, grad)
    expected = twin.detach() - 2.0**-4 * torch.tensor([4.0, -8.0])
    assert_within(param, expected, 2 * 2**-24 * 8.0, "param")
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same(decayed.state[param][name], plain.state[twin][name])


# Official training settings: lr 0 at construction, a float written before each step


@pytest.mark.parametrize("lr", [0, 0.0, torch.tensor(0.0)], ids=["int", "float", "tensor"])
def test_lr_0_moves_the_moments_only(lr: Any) -> None:
    params = make_params()
    before = [param.detach().clone() for param in params]
    optimizer = AdamATan2(params, lr=lr, **TRM)
    rows = make_grads(params, 1)
    train(optimizer, rows)
    assert_same([param.detach() for param in params], before)
    assert optimizer.state[params[1]]["exp_avg"].abs().max() > 0


def test_lr_written_before_each_step_is_that_of_the_step() -> None:
    params = make_params(torch.float64)
    truth = ATan2(clone_params(params), **TRM)
    optimizer = AdamATan2(params, lr=0, **TRM)
    for t, row in enumerate(make_grads(params, 20)):
        lr = 1e-3 * min(1.0, (t + 1) / 10)
        optimizer.param_groups[0]["lr"] = truth.param_groups[0]["lr"] = lr
        train(optimizer, [row])
        train(truth, [row])
    assert_close(params, truth.param_groups[0]["params"])


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_scheduler_warms_up_from_0(tensor: bool) -> None:
    params = make_params(torch.float64)
    lr = torch.tensor(1e-3, dtype=torch.float64) if tensor else 1e-3
    optimizer = AdamATan2(params, lr=lr, **TRM)
    truth = ATan2(clone_params(params), lr=1e-3, **TRM)
    schedulers = [LambdaLR(o, lambda t: min(1.0, t / 5)) for o in (optimizer, truth)]
    for row in make_grads(params, 10):
        for each, scheduler in zip((optimizer, truth), schedulers, strict=True):
            train(each, [row])
            scheduler.step()
    assert_close(params, truth.param_groups[0]["params"])


@pytest.mark.parametrize(
    "more", [{"capturable": True}, {"foreach": True}, {"fused": True}], ids=str
)
def test_flags_change_nothing(more: Options) -> None:
    params = make_params()
    twins = clone_params(params)
    rows = make_grads(params, 5)
    train(AdamATan2(params, **TRM, **more), rows)
    train(AdamATan2(twins, **TRM), rows)
    assert_same(params, twins)


# State dicts of the package adam_atan2


def test_state_and_options_are_named_as_in_the_package() -> None:
    param = one(1.0)
    optimizer = AdamATan2([param])
    step_with(optimizer, torch.ones(1))
    step = optimizer.state[param]["step"]
    assert optimizer.state[param].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert (step.dtype, step.shape) == (torch.float32, ())
    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2}
    assert {name: optimizer.defaults[name] for name in defaults} == defaults


def package_dict(truth: ATan2) -> dict[str, Any]:
    """The state dict that the package would have written for the same run."""
    state_dict = deepcopy(truth.state_dict())
    for state in state_dict["state"].values():
        state["step"] = torch.tensor(float(state["step"]))
    assert state_dict["param_groups"][0].keys() == {"lr", "betas", "weight_decay", "params"}
    return state_dict


@pytest.mark.parametrize("filter", [None, "ema"])
def test_run_of_the_package_continues(filter: str | None) -> None:
    """A filter starts at the next gradient."""
    params = make_params(torch.float64)
    truth = ATan2(params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.3)
    rows = make_grads(params, 12)
    train(truth, rows[:6])
    ours = AdamATan2(clone_params(params), filter=filter, lamb=2.0)
    ours.load_state_dict(package_dict(truth))
    train(ours, rows[6:7])
    # The mean starts at the gradient, so the first filtered one is three times the gradient.
    gain = 1.0 if filter is None else 3.0
    train(truth, [[gain * grad for grad in rows[6]]])
    assert_close(ours.param_groups[0]["params"], params)
    if filter is None:
        train(ours, rows[7:])
        train(truth, rows[7:])
        assert_close(ours.param_groups[0]["params"], params)


def test_filterless_dict_has_nothing_that_the_package_does_not_know() -> None:
    optimizer = AdamATan2(make_params(), **TRM)
    train(optimizer, make_grads(optimizer.param_groups[0]["params"], 2))
    state_dict = optimizer.state_dict()
    assert all(s.keys() == {"step", "exp_avg", "exp_avg_sq"} for s in state_dict["state"].values())
    twin = ATan2(clone_params(optimizer.param_groups[0]["params"]))
    twin.load_state_dict(state_dict)


def test_state_of_bfloat16_weights_is_float32() -> None:
    param = one(1.0, dtype=torch.bfloat16)
    optimizer = AdamATan2([param])
    step_with(optimizer, torch.ones(1, dtype=torch.bfloat16))
    dtypes = {value.dtype for value in snapshot(optimizer)[0].values() if value.dim() == 0}
    assert dtypes == {torch.float32}
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32


# Options that cannot be

BAD: list[tuple[str, Any]] = [
    ("lr", -1.0), ("lr", torch.ones(2)), ("lr", "x"), ("betas", (1.0, 0.9)), ("betas", (0.9, -0.1)),
    ("betas", 0.9), ("betas", (0.9,)), ("weight_decay", -1.0), ("weight_decay", float("nan")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_bad_option_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^AdamATan2: {name}"):
        AdamATan2([one(1.0)], **{name: value})


@pytest.mark.parametrize("name", ["eps", "amsgrad", "decoupled_weight_decay"])
def test_options_of_adam_that_have_no_meaning_are_none(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        AdamATan2([one(1.0)], **{name: 0.0})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("filter", [None, "ema", "highpass", "projection", "ma"])
def test_gradients_go_through_a_differentiable_step(filter: str | None) -> None:
    """Away from gradients of zero, where the root of v has a kink."""

    def two_steps(start: Tensor, first: Tensor, second: Tensor) -> Tensor:
        param = start.clone()
        optimizer = AdamATan2([param], filter=filter, window=2, differentiable=True)
        for grad in (first, second):
            param.grad = grad
            optimizer.step()
        return param

    inputs = [randn(3, seed=seed, dtype=torch.float64).abs() + 0.1 for seed in range(3)]
    assert torch.autograd.gradcheck(two_steps, [value.requires_grad_() for value in inputs])
