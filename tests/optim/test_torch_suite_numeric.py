"""torch's optimizer checks on all of the registry: implementations, GradScaler; AdamW, autograd."""

import inspect
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from .registry import Case, each_adamw, each_adamw_input, each_case, each_form, each_other_own
from .torch_checks import (
    IMPLEMENTATIONS,
    Options,
    assert_same,
    assert_within,
    build,
    clone_params,
    each_float,
    each_implementation,
    make_grads,
    make_params,
    randn,
    set_grads,
    snapshot,
    train,
    without_grads,
)

Row = dict[str, Tensor]


# Implementations


def with_pauses(grads: list[list[Tensor]]) -> list[list[Tensor | None]]:
    """No gradient at all in step 2; the second parameter is frozen in steps 3 and 4."""
    rows: list[list[Tensor | None]] = [list(row) for row in grads]
    rows[2] = [None] * len(rows[2])
    rows[3][1] = rows[4][1] = None
    return rows


def step_bounds(before: Row, after: Row, grad: Tensor, group: Options) -> dict[str, Tensor]:
    """How far two right implementations can be apart after one step from equal values.

    Every value is a chain of at most 8 roundings, of half an ulp in each of the two: 8 eps times
    the terms that enter it. `size` is the sum of the terms of the filtered gradient, which may
    cancel. A 16-bit value is rounded once, from float32: an ulp if the two float32 values lie on
    two sides of a tie. Results below the normal range have an absolute ulp instead.
    """
    old, new = ({k: v.double().abs() for k, v in row.items()} for row in (before, after))
    mean = new.get("grok_exp_avg", torch.zeros(()))
    decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
    grad = grad.double().abs()
    size = grad + group["lamb"] * (grad + mean) + decay * old["param"]
    (beta1, beta2), alpha = group["betas"], group["alpha"]
    step = after["step"].item()

    def eps(key: str) -> float:
        dtype = after[key].dtype
        return torch.finfo(dtype).eps * (8 if dtype.itemsize >= 4 else 1)

    terms = {
        "exp_avg": old["exp_avg"] + (1 - beta1) * size,
        "exp_avg_sq": old["exp_avg_sq"] + (1 - beta2) * size**2,
    }
    if "grok_exp_avg" in after:
        seeding = before["grok_step"] == 0
        terms["grok_exp_avg"] = old["grok_exp_avg"] + grad * (1 if seeding else 1 - alpha)
    bounds = {key: eps(key) * value for key, value in terms.items()}
    root = (new["exp_avg_sq"] / (1 - beta2**step)).sqrt()
    update = group["lr"] / (1 - beta1**step) * terms["exp_avg"] / (root + group["eps"])
    bounds["param"] = eps("param") * (old["param"] + new["param"]) + eps("exp_avg") * update
    tiny = {key: torch.finfo(after[key].dtype).smallest_normal for key in bounds}
    bounds = {key: bound + eps(key) * tiny[key] for key, bound in bounds.items()}
    return bounds | {key: torch.zeros(()) for key in ("step", "grok_step") if key in after}


@torch.no_grad()
def copy_values(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    pairs = zip(source.param_groups[0]["params"], target.param_groups[0]["params"], strict=True)
    for one, other in pairs:
        other.copy_(one)
        for key, value in source.state[one].items():
            target.state[other][key].copy_(value)


@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.1, "lr": 0.01}, {"maximize": True, "decoupled_weight_decay": False}],
    ids=["adamw", "adam_maximize"],
)
@pytest.mark.parametrize(
    "implementation", list(IMPLEMENTATIONS.values())[1:], ids=list(IMPLEMENTATIONS)[1:]
)
@each_adamw
@each_float
def test_implementations_agree(
    dtype: torch.dtype, case: Case, implementation: Options, options: Options
) -> None:
    """Step by step from equal values, so that the bound is that of one step."""
    params = make_params(dtype)
    reference = case(params, **options, backend="reference")
    other = case(clone_params(params), **options, **implementation)
    for row in with_pauses(make_grads(params, steps=7)):
        before = snapshot(reference)
        train(reference, [row])
        train(other, [row])
        compare_step(before, snapshot(reference), snapshot(other), reference.param_groups[0])
        copy_values(reference, other)


def compare_step(before: list[Row], after: list[Row], actual: list[Row], group: Options) -> None:
    for old, expected, got in zip(before, after, actual, strict=True):
        assert got.keys() == expected.keys()
        if "grad" not in expected:
            assert_same(got, expected)
            continue
        for key, bound in step_bounds(old, expected, expected["grad"], group).items():
            assert got[key].dtype == expected[key].dtype
            assert_within(got[key], expected[key], bound, key)


@each_other_own
def test_reference_and_fused_form_agree(case: Case) -> None:
    """Each step from equal values: a chain of at most 12 roundings, and for 16 bits one more."""
    params = case.params()
    reference, other = case(params, backend="reference"), case(clone_params(params))
    for row in make_grads(params, 5):
        train(reference, [row])
        train(other, [row])
        for ours, theirs in zip(snapshot(other), snapshot(reference), strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                largest = 1 + (value.abs().max() if value.numel() else 0)
                assert_within(ours[name], value, 12 * 2**-23 * 5 * largest, name)


# torch.optim.Adam and torch.optim.AdamW

TORCH_INPUTS: list[Options] = [
    {},
    {"lr": 0.01},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"betas": (0.9, 0.95), "eps": 1e-3},
]


@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("options", TORCH_INPUTS, ids=str)
@pytest.mark.parametrize("torch_class", [torch.optim.AdamW, torch.optim.Adam])
@each_implementation
def test_lamb_0_is_torch(
    torch_class: Any, implementation: Options, options: Options, dtype: torch.dtype, steps: int
) -> None:
    """Each of the two runs rounds the parameter twice per step, by decay and update: 2 eps |param|
    together. The update has 10 roundings in each and |update| <= 3.2 * lr (Kingma and Ba 2014,
    section 2.1): 32 eps lr."""
    decay = {} if torch_class is torch.optim.AdamW else {"weight_decay": 0.0}
    ours = {"lr": 1e-3, "decoupled_weight_decay": not decay, "lamb": 0.0} | decay | options
    params = make_params(dtype)
    theirs = clone_params(params)
    optimizer, expected = build(params, **ours, **implementation), torch_class(theirs, fused=True)
    expected.param_groups[0].update(options)
    largest = [param.detach().abs().double() for param in params]
    for row in make_grads(params, steps):
        train(optimizer, [row])
        train(expected, [row])
        largest = [torch.maximum(a, p.detach().abs()) for a, p in zip(largest, theirs, strict=True)]
    eps = torch.finfo(dtype).eps
    for param, reference, size in zip(params, theirs, largest, strict=True):
        assert_within(param, reference, steps * eps * (2 * size + 32 * ours["lr"]), "param")
        assert optimizer.state[param]["step"].item() == steps


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@each_implementation
def test_lamb_0_has_the_moments_of_torch(implementation: Options, key: str) -> None:
    """A moment is a mean of the gradients or their squares with 4 roundings per step and run, and
    what was rounded at one step decays like what it belongs to."""
    steps = 50
    params = make_params()
    theirs = clone_params(params)
    grads = make_grads(params, steps)
    optimizer = build(params, lamb=0.0, **implementation)
    expected = torch.optim.AdamW(theirs, fused=True)
    train(optimizer, grads)
    train(expected, grads)
    for index, (param, reference) in enumerate(zip(params, theirs, strict=True)):
        size = torch.stack([row[index].abs() for row in grads]).amax(0)
        size = size if key == "exp_avg" else size**2
        bound = 4 * steps * torch.finfo(torch.float32).eps * size
        assert_within(optimizer.state[param][key], expected.state[reference][key], bound, key)


# GradScaler


def scaled_backward(
    scaler: torch.amp.GradScaler, params: Sequence[Tensor], row: Sequence[Tensor]
) -> None:
    """A loss whose gradient is `row`, times the scale: exact, as every scale is a power of two."""
    for param in params:
        param.grad = None
    scale = scaler.scale(torch.ones(())).item()
    for param, grad in zip(params, row, strict=True):
        param.backward(grad * scale)


def make_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)


@each_form
@each_float
def test_scaled_training_equals_unscaled(dtype: torch.dtype, case: Case) -> None:
    params = case.params(dtype)
    plain, scaler = clone_params(params), make_scaler()
    grads = make_grads(params, steps=5)
    optimizer, expected = case(params), case(plain)
    if dtype == torch.float16 and not optimizer._step_supports_amp_scaling:
        pytest.skip("GradScaler itself refuses to unscale gradients in float16")
    train(expected, grads)
    for row in grads:
        scaled_backward(scaler, params, row)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**8
    assert_same(without_grads(snapshot(optimizer)), without_grads(snapshot(expected)))


@each_implementation
def test_unscaled_and_clipped_training_equals_plain(implementation: Options) -> None:
    """After `unscale_` the gradients are what they are, and are not divided again."""
    params = make_params()
    plain, scaler = clone_params(params), make_scaler()
    optimizer, expected = build(params, **implementation), build(plain, **implementation)
    for row in make_grads(params, steps=3):
        scaled_backward(scaler, params, row)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        set_grads(plain, row)
        torch.nn.utils.clip_grad_norm_(plain, 1.0)
        expected.step()
    assert_same(snapshot(optimizer), snapshot(expected))


@each_implementation
def test_scale_is_forgotten_after_the_step(implementation: Options) -> None:
    params = make_params()
    plain, scaler = clone_params(params), make_scaler()
    optimizer, expected = build(params, **implementation), build(plain, **implementation)
    first, second = make_grads(params, steps=2)
    scaled_backward(scaler, params, first)
    scaler.step(optimizer)
    train(optimizer, [second])
    train(expected, [first, second])
    assert_same(snapshot(optimizer), snapshot(expected))


@each_form
def test_scaled_gradients_are_not_written(case: Case) -> None:
    params = case.params()
    scaler = make_scaler()
    optimizer = case(params)
    scaled_backward(scaler, params, make_grads(params, steps=1)[0])
    before = [param.grad.clone() for param in params]
    scaler.step(optimizer)
    if optimizer._step_supports_amp_scaling:
        assert_same([param.grad for param in params], before)
    else:  # the scaler itself has divided them
        assert_same([param.grad * 2.0**6 for param in params], before)


@pytest.mark.parametrize("good_steps", [0, 2, 4])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@each_form
def test_overflow_changes_nothing(case: Case, bad: float, good_steps: int) -> None:
    """Bit for bit: parameters, moments, mean, ring, sum, counters, average and options."""
    assert_overflow(case, torch.float32, bad, good_steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("good_steps", [0, 1, 4])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@each_case
def test_overflow_changes_nothing_in_other_dtypes(
    case: Case, bad: float, good_steps: int, dtype: torch.dtype
) -> None:
    assert_overflow(case, dtype, bad, good_steps)


def assert_overflow(case: Case, dtype: torch.dtype, bad: float, good_steps: int) -> None:
    params, scaler = case.params(dtype), make_scaler()
    more = {"weight_ema": 0.9} if "weight_ema" in case([params[0]]).defaults else {}
    optimizer = case(params, **more)
    train(optimizer, make_grads(params, good_steps))
    row = make_grads(params, 1)[0]
    row[3][1, 2] = bad
    scaled_backward(scaler, params, row)
    before = deepcopy((without_grads(snapshot(optimizer)), optimizer.state_dict()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**5
    assert_same((without_grads(snapshot(optimizer)), optimizer.state_dict()), before)


@each_form
def test_training_goes_on_after_an_overflow(case: Case) -> None:
    """As if the step had not been; the scale is halved and still a power of two."""
    params, scaler = case.params(), make_scaler()
    plain = clone_params(params)
    optimizer, expected = case(params), case(plain)
    grads = make_grads(params, 6)
    bad = [torch.full_like(grad, torch.inf) for grad in grads[0]]
    for row in [*grads[:3], bad, *grads[3:]]:
        scaled_backward(scaler, params, row)
        scaler.step(optimizer)
        scaler.update()
    train(expected, grads)
    assert_same(without_grads(snapshot(optimizer)), without_grads(snapshot(expected)))


@pytest.mark.parametrize("grad_scale", [None, torch.tensor(4.0)], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("found_inf", [1.0, 2.0])
@each_implementation
def test_found_inf_may_be_a_sum_over_devices(
    implementation: Options, found_inf: float, grad_scale: Tensor | None
) -> None:
    params = make_params()
    optimizer = build(params, **implementation)
    set_grads(params, make_grads(params, 1)[0])
    before = snapshot(optimizer)
    optimizer.grad_scale, optimizer.found_inf = grad_scale, torch.tensor(found_inf)
    optimizer.step()
    assert_same(snapshot(optimizer), before)


@each_implementation
def test_scaler_hands_the_scale_to_the_step(implementation: Options) -> None:
    optimizer = build(make_params(), **implementation)
    assert optimizer._step_supports_amp_scaling is True
    assert "grad_scaler" not in inspect.signature(optimizer.step).parameters


# Autograd through a step


def differentiable_steps(kwargs: Options, seeded: bool, param: Tensor, *inputs: Tensor) -> Any:
    """Two steps from the given state; `inputs` are two gradients and the state tensors."""
    first, second, *values = [value.clone() for value in inputs]
    options = {"differentiable": True} | kwargs
    if isinstance(options.get("lr"), Tensor):
        options["lr"] = options["lr"].clone()
    param = param.clone() if options["differentiable"] else Parameter(param.detach().clone())
    optimizer = build([param], **options)
    state = optimizer.state[param]
    state["step"] = torch.tensor(10.0)
    keys = ["exp_avg", "exp_avg_sq"]
    if "grok_exp_avg" in state:
        keys.append("grok_exp_avg")
        state["grok_step"] = torch.tensor(10.0 if seeded else 0.0)
    state.update(zip(keys, values, strict=False))
    for grad in (first, second):
        param.grad = grad
        optimizer.step()
    return param, *(state[key] for key in keys)


def float64_inputs(count: int) -> list[Tensor]:
    """Parameter, two gradients and state, away from 0 where the second moment has a kink."""
    values = [randn(3, seed=seed, dtype=torch.float64).abs() + 0.1 for seed in range(count)]
    return [value.requires_grad_() for value in values]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("seeded", [True, False])
@each_adamw_input
def test_gradcheck_through_two_steps(case: Case, seeded: bool) -> None:
    def steps(*tensors: Tensor) -> Any:
        return differentiable_steps(case.options, seeded, *tensors)

    assert torch.autograd.gradcheck(steps, float64_inputs(6))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@each_adamw
def test_gradcheck_of_the_learning_rate(case: Case) -> None:
    def steps(lr: Tensor, *tensors: Tensor) -> Any:
        return differentiable_steps(case.options | {"lr": lr}, True, *tensors)[0]

    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(steps, (lr, *float64_inputs(6)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@each_adamw_input
def test_differentiable_step_has_the_values_of_a_plain_one(case: Case) -> None:
    """Two steps of 10 roundings, of values that no term exceeds (see step_bounds)."""
    inputs = float64_inputs(6)
    with torch.no_grad():
        expected = [value.clone() for value in inputs]
    param, *_ = differentiable_steps(case.options, True, *inputs)
    plain = differentiable_steps({**case.options, "differentiable": False}, True, *expected)[0]
    bound = 2 * 10 * torch.finfo(torch.float64).eps * expected[0]
    assert_within(param, plain, bound, "param")
