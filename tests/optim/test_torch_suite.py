"""torch's optimizer checks on GrokFastAdamW: arguments, direction, groups, lr, layouts, no-ops."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, optim_inputs_func_adamw

from trm_fast.optim import GrokFastAdamW

from .torch_checks import (
    FLOATS,
    IMPLEMENTATIONS,
    INFO,
    Options,
    assert_same,
    assert_within,
    build,
    clone_params,
    each_filter,
    each_float,
    each_implementation,
    each_input,
    each_input_and_any_flag,
    each_input_and_flag,
    make_grads,
    make_params,
    needs_cpp,
    randn,
    set_grads,
    snapshot,
    train,
    without_grads,
)

with torch.random.fork_rng():
    ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)
BASE_ERRORS = [error for error in ERRORS if error.optimizer_error_input.params is not None]
FLEXIBLE = [error for error in ERRORS if re.search("either both|not supported", error.error_regex)]
RANGE_ERRORS = [error for error in ERRORS if error not in BASE_ERRORS + FLEXIBLE]
AMSGRAD = [case for case in optim_inputs_func_adamw("cpu") if case.kwargs.get("amsgrad")]


def error_id(error: ErrorOptimizerInput) -> str:
    return error.optimizer_error_input.desc[:50]


# Arguments


@pytest.mark.parametrize("error", BASE_ERRORS, ids=error_id)
def test_refuses_bad_parameters_in_the_words_of_torch(error: ErrorOptimizerInput) -> None:
    case = error.optimizer_error_input
    expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expected(error.error_type, match=error.error_regex):
        GrokFastAdamW(case.params, **case.kwargs)


@pytest.mark.parametrize("error", RANGE_ERRORS, ids=error_id)
def test_refuses_bad_numbers_of_torchs_inputs(error: ErrorOptimizerInput) -> None:
    """Same type as in torch; the words are those of this package, and name the argument."""
    case = error.optimizer_error_input
    name = next(word for word in ("weight_decay", "beta", "lr") if word in case.desc)
    with pytest.raises(error.error_type, match=rf"GrokFastAdamW: {name}\S* must be .*; got "):
        GrokFastAdamW([Parameter(torch.ones(1))], **case.kwargs)


@needs_cpp
@pytest.mark.parametrize("error", FLEXIBLE, ids=error_id)
def test_takes_tensors_that_only_torchs_own_loops_refuse(error: ErrorOptimizerInput) -> None:
    """The numbers are taken out of tensors on the CPU, so each form means the same."""
    kwargs = error.optimizer_error_input.kwargs
    numbers = kwargs | {
        "lr": float(kwargs["lr"]),
        "betas": tuple(map(float, kwargs.get("betas", (0.9, 0.999)))),
    }
    params, plain = make_params(), make_params()
    grads = make_grads(params, steps=2)
    train(build(params, **kwargs), grads)
    train(build(plain, **numbers), grads)
    assert_same(params, plain)


@pytest.mark.parametrize("other", ["foreach", "differentiable"])
def test_fused_excludes(other: str) -> None:
    with pytest.raises(RuntimeError, match=rf"`fused`.*`{other}`"):
        GrokFastAdamW([Parameter(torch.ones(2))], fused=True, **{other: True})


@pytest.mark.parametrize("case", AMSGRAD, ids=lambda case: case.desc)
def test_amsgrad_is_no_argument(case: Any) -> None:
    with pytest.raises(TypeError, match="amsgrad"):
        GrokFastAdamW([Parameter(torch.ones(2))], **case.kwargs)


def sparse_grad() -> Tensor:
    return torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2), check_invariants=True)


@each_filter
def test_sparse_gradient_is_refused(kwargs: Options) -> None:
    param = Parameter(torch.ones(3, 2))
    optimizer = build([param], **kwargs)
    param.grad = sparse_grad()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_refused_sparse_gradient_changes_nothing() -> None:
    """The dense parameter in front of the sparse one is not half a step ahead."""
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3, 2))]
    optimizer = build(params)
    params[0].grad = torch.ones(3)
    before = snapshot(optimizer)
    params[1].grad = sparse_grad()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    params[1].grad = None
    assert_same(snapshot(optimizer), before)


def test_fused_step_refuses_meta_parameters() -> None:
    param = Parameter(torch.ones(2, 3, device="meta"))
    param.grad = torch.ones(2, 3, device="meta")
    message = "`fused=True` requires all the params to be floating point Tensors"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        build([param], fused=True).step()


def test_fused_step_refuses_complex_parameters() -> None:
    param = Parameter(torch.ones(2, dtype=torch.complex64))
    param.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="`fused=True` requires"):
        build([param], fused=True).step()


# Direction


def quadratic(contiguous: bool) -> tuple[Parameter, Parameter, Callable[[], Tensor]]:
    """A weight, a bias and their loss."""
    if contiguous:
        weight, bias = Parameter(randn(10, 5, seed=1)), Parameter(randn(10, seed=2))
    else:
        weight = Parameter(randn(10, 5, 2, seed=1)[..., 0])
        bias = Parameter(randn(10, 2, seed=2)[..., 0])
    data = randn(5, seed=3)
    return weight, bias, lambda: (weight.mv(data) + bias).pow(2).sum()


def run_steps(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], schedulers: Any = ()
) -> tuple[float, float]:
    """The loss before and after 20 steps."""
    first = loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        for scheduler in schedulers:
            args = (value.detach(),) if isinstance(scheduler, ReduceLROnPlateau) else ()
            scheduler.step(*args)
    return first, loss().item()


def assert_direction(first: float, last: float, maximize: bool) -> None:
    assert (last > first) if maximize else (last < first), f"loss went from {first} to {last}"


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@each_input_and_flag
def test_loss_goes_the_right_way(kwargs: Options, contiguous: bool) -> None:
    weight, bias, loss = quadratic(contiguous)
    first, last = run_steps(build([weight, bias], **kwargs), loss)
    assert_direction(first, last, kwargs.get("maximize", False))


@pytest.mark.parametrize("schedulers", INFO.scheduler_inputs, ids=lambda s: f"{len(s)}_schedulers")
@each_filter
def test_loss_goes_the_right_way_with_schedulers(kwargs: Options, schedulers: Any) -> None:
    weight, bias, loss = quadratic(contiguous=True)
    optimizer = build([weight, bias], maximize=True, **kwargs)
    first, last = run_steps(optimizer, loss, [make(optimizer) for make in schedulers])
    assert_direction(first, last, maximize=True)


@pytest.mark.parametrize("schedulers", INFO.scheduler_inputs, ids=lambda s: f"{len(s)}_schedulers")
def test_groups_with_schedulers_go_the_right_way(schedulers: Any) -> None:
    weight, bias, loss = quadratic(contiguous=True)
    optimizer = build([{"params": [weight]}, {"params": [bias], "lr": 0.01}])
    first, last = run_steps(optimizer, loss, [make(optimizer) for make in schedulers])
    assert_direction(first, last, maximize=False)


@each_input
def test_maximize_equals_minimising_the_negated_gradient(kwargs: Options) -> None:
    """Negation is exact, so this is equality, seed of the filter included."""
    other = kwargs | {"maximize": not kwargs.get("maximize", False)}
    params, negated = make_params(), make_params()
    grads = make_grads(params, steps=4)
    optimizer, opposite = build(params, **kwargs), build(negated, **other)
    train(optimizer, grads)
    train(opposite, [[-grad for grad in row] for row in grads])
    assert_same(without_grads(snapshot(opposite)), without_grads(snapshot(optimizer)))


# Groups


GROUP_OPTIONS = {
    "lr": 0.1,
    "betas": (0.5, 0.6),
    "eps": 0.3,
    "weight_decay": 0.2,
    "maximize": True,
    "lamb": 5.0,
    "alpha": 0.5,
    "filter": "highpass",
    "decoupled_weight_decay": False,
}


@pytest.mark.parametrize("key", GROUP_OPTIONS)
@each_implementation
def test_group_option_equals_an_optimizer_of_its_own(implementation: Options, key: str) -> None:
    params, apart = make_params(), make_params()
    grads = make_grads(params, steps=3)
    option = {key: GROUP_OPTIONS[key]}
    together = build([{"params": params[:2]}, {"params": params[2:], **option}], **implementation)
    train(together, grads)
    train(build(apart[:2], **implementation), [row[:2] for row in grads])
    train(build(apart[2:], **implementation, **option), [row[2:] for row in grads])
    assert_same(params, apart)


@pytest.mark.parametrize("key", GROUP_OPTIONS)
def test_group_option_changes_the_result(key: str) -> None:
    params, plain = make_params()[:1], make_params()[:1]
    grads = make_grads(params, steps=3)
    train(build([{"params": params, key: GROUP_OPTIONS[key]}]), grads)
    train(build(plain), grads)
    assert not torch.equal(params[0], plain[0])


@each_input_and_flag
def test_group_without_weight_decay_goes_the_right_way(kwargs: Options) -> None:
    weight, bias, loss = quadratic(contiguous=True)
    plain = kwargs | {"weight_decay": 0.0}
    build([weight], **kwargs)
    groups = [{"params": [weight], **kwargs}, {"params": [bias], **plain}]
    first, last = run_steps(GrokFastAdamW(groups), loss)
    assert_direction(first, last, kwargs.get("maximize", False))


@each_input_and_flag
def test_lr_of_another_group_does_not_leak(kwargs: Options) -> None:
    """With an lr of 1e-28 an update is below half an ulp of every value, so nothing moves."""
    moving, still = Parameter(randn(10)), Parameter(randn(10, seed=1))
    before = still.detach().clone()
    options = {"lr": 1e-3} | kwargs
    build([moving], **kwargs)
    optimizer = GrokFastAdamW([{"params": [moving], **options}, {"params": [still]}], lr=1e-28)
    train(optimizer, make_grads([moving, still], steps=5))
    assert_same(still.detach(), before)
    assert (moving != randn(10)).all()


@each_filter
def test_added_group_trains_like_an_optimizer_of_its_own(kwargs: Options) -> None:
    params, apart = make_params(), make_params()
    first, second = make_grads(params, 3, seed=1), make_grads(params, 3, seed=2)
    optimizer = build(params[:2], **kwargs)
    train(optimizer, [row[:2] for row in first])
    optimizer.add_param_group({"params": params[2:], "lr": 0.01})
    train(optimizer, second)
    late = build(apart[2:], lr=0.01, **kwargs)
    train(late, [row[2:] for row in second])
    assert_same(snapshot(optimizer)[2:], snapshot(late))


@each_filter
def test_added_group_has_state_at_once(kwargs: Options) -> None:
    params = make_params()
    optimizer = build(params[:2], **kwargs)
    optimizer.add_param_group({"params": params[2:]})
    keys = {"step", "exp_avg", "exp_avg_sq"}
    keys |= {"grok_exp_avg", "grok_step"} if kwargs["lamb"] else set()
    assert [set(optimizer.state[param]) for param in params] == [keys] * len(params)


# Learning rate


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=["0d", "1d", "2d"])
@each_input_and_flag
def test_tensor_lr_equals_float_lr(kwargs: Options, shape: tuple[int, ...]) -> None:
    """2**-10 is the same number as a float and as a float32.

    A step may take lr in float32 where it took a double: the update then has 4 roundings more, and
    |update| <= lr * 3.2 (Kingma and Ba 2014, section 2.1) for beta (0.9, 0.999). Each of the two
    runs rounds the parameter twice per step, by decay and update, half an ulp each.
    """
    kwargs = {key: value for key, value in kwargs.items() if key != "lr"}
    steps, lr = 5, 2.0**-10
    params, other = make_params(), make_params()
    grads = make_grads(params, steps)
    train(build(params, lr=lr, **kwargs), grads)
    train(build(other, lr=torch.full(shape, lr), **kwargs), grads)
    eps = torch.finfo(torch.float32).eps
    for param, tensor_lr in zip(params, other, strict=True):
        size = param.detach().abs().double() + steps * 3.2 * lr
        assert_within(tensor_lr, param, steps * eps * (2 * size + 4 * 3.2 * lr), "param")


# torch refuses a tensor lr with foreach=True, and so does this optimizer.
takes_tensor_lr = pytest.mark.parametrize(
    "implementation",
    [options for options in IMPLEMENTATIONS.values() if not options.get("foreach")],
)


@takes_tensor_lr
def test_tensor_lr_is_read_at_every_step(implementation: Options) -> None:
    param = Parameter(randn(5))
    lr = torch.tensor(0.1)
    optimizer = build([param], lr=lr, **implementation)
    train(optimizer, make_grads([param], 1))
    lr.zero_()
    before = param.detach().clone()
    train(optimizer, make_grads([param], 1))
    assert_same(param.detach(), before)


@takes_tensor_lr
def test_step_does_not_write_a_tensor_lr(implementation: Options) -> None:
    param = Parameter(randn(5))
    lr = torch.tensor(0.1)
    optimizer = build([param], lr=lr, **implementation)
    train(optimizer, make_grads([param], 2))
    assert (optimizer.param_groups[0]["lr"] is lr, lr._version) == (True, 0)


@each_filter
def test_scheduler_moves_a_tensor_lr_like_a_float_lr(kwargs: Options) -> None:
    """All values are powers of two, so the learning rates are equal exactly."""
    rates = []
    for lr in (0.5, torch.tensor([0.5])):
        optimizer = build([Parameter(randn(3))], lr=lr, **kwargs)
        scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert rates == [2.0**-4, 2.0**-4]


@pytest.mark.parametrize("lr", [0.0, 0, torch.tensor(0.0)], ids=["float", "int", "tensor"])
@each_filter
def test_zero_lr_keeps_the_parameters(kwargs: Options, lr: Any) -> None:
    params = make_params()
    before = [param.detach().clone() for param in params]
    train(build(params, lr=lr, weight_decay=0.1, **kwargs), make_grads(params, 3))
    assert_same([param.detach() for param in params], before)


@each_filter
def test_zero_lr_moves_the_moments(kwargs: Options) -> None:
    """So that warm-up from 0 starts with the moments of the gradients already seen."""
    params = make_params()[:2]
    grads = make_grads(params, 3)
    still, moving = build(params, lr=0.0, **kwargs), build(clone_params(params), **kwargs)
    train(still, grads)
    train(moving, grads)
    states = [[row["exp_avg"] for row in snapshot(o)] for o in (still, moving)]
    assert_same(*states)


# Dtypes and layouts


@each_implementation
@each_filter
def test_mixed_group_equals_an_optimizer_for_each_parameter(
    kwargs: Options, implementation: Options
) -> None:
    """All dtypes and layouts in one group, each as if it were alone; "cpp" has no float64."""
    options = kwargs | implementation
    dtypes = FLOATS[1:] if "cpp" in implementation.values() else FLOATS
    params = [param for dtype in dtypes for param in make_params(dtype)]
    alone = clone_params(params)
    grads = make_grads(params, steps=3)
    optimizer = build(params, **options)
    train(optimizer, grads)
    for index, param in enumerate(alone):
        single = build([param], **options)
        train(single, [[row[index]] for row in grads])
        assert_same(snapshot(optimizer)[index], snapshot(single)[0], f"[{index}]")


@each_filter
def test_group_order_changes_nothing(kwargs: Options) -> None:
    params, reverse = make_params(), make_params()
    grads = make_grads(params, steps=3)
    forward, backward = build(params, **kwargs), build(reverse[::-1], **kwargs)
    train(forward, grads)
    train(backward, [row[::-1] for row in grads])
    assert_same(snapshot(backward)[::-1], snapshot(forward))


@pytest.mark.parametrize("default", [torch.float64, torch.float32, torch.float16])
def test_step_is_float32_whatever_the_default_dtype(default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        param = Parameter(torch.ones(3, dtype=torch.float32))
        optimizer = build([param])
        train(optimizer, [[torch.ones(3, dtype=torch.float32)]])
    finally:
        torch.set_default_dtype(before)
    step = optimizer.state[param]["step"]
    assert (step.dtype, step.shape, step.item()) == (torch.float32, (), 1)


# Complex parameters


def complex_params() -> list[Parameter]:
    """Two complex and a real parameter, to be mixed in one group."""
    dtype = torch.complex64
    return [
        Parameter(randn(10, 5, dtype=dtype)),
        Parameter(randn(10, seed=1, dtype=dtype)),
        Parameter(randn(10, 5, seed=2)),
    ]


def as_real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@each_input
def test_complex_parameter_equals_its_real_view(kwargs: Options) -> None:
    """Same numbers in the same order, but not the same loop: an implementation may contract a
    multiply-add in one and not in the other, which is an ulp of the parameter and of the update,
    and the update is at most 3.2 * lr <= 0.032 (Kingma and Ba 2014, section 2.1)."""
    steps = 3
    params = complex_params()
    reals = [Parameter(as_real(param).clone()) for param in params]
    grads = [[randn(*p.shape, seed=i, dtype=p.dtype) for p in params] for i in range(steps)]
    train(build(params, **kwargs), grads)
    train(build(reals, **kwargs), [[as_real(grad) for grad in row] for row in grads])
    for param, real in zip(params, reals, strict=True):
        bound = steps * torch.finfo(torch.float32).eps * (real.detach().abs().double() + 0.1)
        assert_within(as_real(param), real, bound, "param")


@each_input
def test_complex_parameter_equals_two_real_ones(kwargs: Options) -> None:
    """Real and imaginary part as two parameters; tolerance as above."""
    steps = 3
    param = Parameter(randn(9, dtype=torch.complex64))
    parts = [Parameter(part.detach().clone()) for part in (param.real, param.imag)]
    grads = [randn(9, seed=i, dtype=torch.complex64) for i in range(steps)]
    train(build([param], **kwargs), [[grad] for grad in grads])
    train(build(parts, **kwargs), [[grad.real, grad.imag] for grad in grads])
    expected = torch.stack([part.detach() for part in parts], dim=-1)
    bound = steps * torch.finfo(torch.float32).eps * (expected.abs().double() + 0.1)
    assert_within(as_real(param), expected, bound, "param")


# What a step must leave alone


@each_float
@each_implementation
def test_zero_gradients_without_decay_keep_the_parameters(
    implementation: Options, dtype: torch.dtype
) -> None:
    params = make_params(dtype)
    before = [param.detach().clone() for param in params]
    optimizer = build(params, weight_decay=0.0, **implementation)
    train(optimizer, [[torch.zeros_like(param) for param in params]] * 3)
    assert_same([param.detach() for param in params], before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@each_input_and_any_flag
def test_step_without_gradients_changes_nothing(kwargs: Options) -> None:
    params = make_params()
    leaves = [p * 1 for p in params] if kwargs.get("differentiable") else params
    optimizer = build(leaves, **kwargs)
    before = snapshot(optimizer)
    loss = torch.tensor([1.0])
    assert optimizer.step(lambda: loss) is loss
    assert_same(snapshot(optimizer), before)


@each_input_and_flag
def test_step_after_gradients_went_away_changes_nothing(kwargs: Options) -> None:
    params = make_params()
    optimizer = build(params, **kwargs)
    train(optimizer, make_grads(params, 2))
    optimizer.zero_grad(set_to_none=True)
    before = snapshot(optimizer)
    optimizer.step()
    assert_same(snapshot(optimizer), before)


@each_input_and_any_flag
def test_frozen_parameters_get_no_state(kwargs: Options) -> None:
    optimizer = build([randn(2, 3), randn(3)], **kwargs)
    optimizer.step()
    assert [optimizer.state.get(p, {}) for p in optimizer.param_groups[0]["params"]] == [{}, {}]


@each_input
def test_late_gradient_starts_a_parameter_afresh(kwargs: Options) -> None:
    """Its step count and its filter start at its own first gradient, not at the optimizer's."""
    params = make_params()
    late = clone_params(params[1:2])
    grads = make_grads(params, steps=6)
    optimizer, fresh = build(params, **kwargs), build(late, **kwargs)
    train(optimizer, [[row[0], None, *row[2:]] for row in grads[:3]])
    train(optimizer, grads[3:])
    train(fresh, [[row[1]] for row in grads[3:]])
    assert_same(snapshot(optimizer)[1], snapshot(fresh)[0])


@each_implementation
@each_filter
def test_frozen_layer_resumes_where_it_stopped(kwargs: Options, implementation: Options) -> None:
    params = make_params()
    paused = clone_params(params[:1])
    grads = make_grads(params, steps=6)
    options = kwargs | implementation
    optimizer, other = build(params, **options), build(paused, **options)
    rows = [[None if 2 <= i < 4 else row[0], *row[1:]] for i, row in enumerate(grads)]
    train(optimizer, rows)
    train(other, [[row[0]] for row in [*grads[:2], *grads[4:]]])
    assert_same(snapshot(optimizer)[0], snapshot(other)[0])


@each_input_and_flag
def test_gradients_are_never_written(kwargs: Options) -> None:
    """Neither their values nor their storage, not even with equal values, nor the binding."""
    params = make_params()
    optimizer = build(params, **kwargs)
    for row in make_grads(params, 3):
        set_grads(params, row)
        grads = [param.grad for param in params]
        before = [(grad._version, grad.data_ptr()) for grad in grads]
        optimizer.step()
        assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
        assert [(grad._version, grad.data_ptr()) for grad in grads] == before
        assert_same(grads, row)


@each_implementation
@each_filter
def test_state_shares_no_memory_with_gradients(kwargs: Options, implementation: Options) -> None:
    """A gradient zeroed in place after the step must not reach the filter."""
    params = make_params()
    optimizer = build(params, **kwargs, **implementation)
    train(optimizer, make_grads(params, 1))
    before = without_grads(snapshot(optimizer))
    optimizer.zero_grad(set_to_none=False)
    assert_same(without_grads(snapshot(optimizer)), before)


@each_filter
def test_state_is_there_from_construction(kwargs: Options) -> None:
    params = make_params()
    optimizer = build(params, **kwargs)
    before = [set(optimizer.state[param]) for param in params]
    train(optimizer, make_grads(params, 1))
    assert before == [set(optimizer.state[param]) for param in params]
    assert "exp_avg" in before[0]
