"""torch's optimizer checks on all of the registry: arguments, direction, groups, learning rate."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, optim_inputs_func_adamw

from trm_fast.optim import AdamATan2, GrokFastAdamW, GrokFastSGD

from .registry import (
    INFO,
    SHAPES,
    Case,
    each_adamw,
    each_adamw_input_and_flag,
    each_case,
    each_input_and_flag,
    each_own,
    each_own_input,
)
from .torch_checks import (
    IMPLEMENTATIONS,
    Options,
    assert_same,
    assert_within,
    build,
    clone_params,
    each_implementation,
    everything,
    make_grads,
    make_params,
    needs_cpp,
    randn,
    set_grads,
    snapshot,
    train,
    unclipped,
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


BAD: list[Options] = [{"lr": -1.0}, {"lr": torch.ones(2)}, {"weight_decay": -1.0}]


@pytest.mark.parametrize("options", BAD, ids=str)
@each_own
def test_refuses_bad_numbers_and_adds_no_group(case: Case, options: Options) -> None:
    (name,) = options
    first, second, *_ = case.params()
    with pytest.raises(ValueError, match=f"{name} must be"):
        case([first], **options)
    optimizer = case([first])
    with pytest.raises(ValueError, match=f"{name} must be"):
        optimizer.add_param_group({"params": [second]} | options)
    assert (len(optimizer.param_groups), len(optimizer.state)) == (1, 1)


@each_case
def test_duplicate_parameter_is_refused(case: Case) -> None:
    param = case.params()[0]
    optimizer = case([param])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


@each_own
def test_refused_group_keeps_the_first_from_its_step(case: Case) -> None:
    """Whatever is wrong with the last group is found before the first one moves."""
    first, shared, *_ = case.params()
    bad = Parameter(shared.detach()[:1])
    optimizer = case([{"params": [first]}, {"params": [shared, bad]}])
    set_grads([first, shared, bad], [torch.ones_like(p) for p in (first, shared, bad)])
    before = everything(optimizer)
    with pytest.raises(ValueError, match="disjoint in memory"):
        optimizer.step()
    assert_same(everything(optimizer), before)


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


@each_case
def test_refused_sparse_gradient_changes_nothing(case: Case) -> None:
    """The dense parameter in front of the sparse one is not half a step ahead."""
    params = [case.params()[0], Parameter(torch.ones(3, 2))]
    optimizer = case(params)
    params[0].grad = torch.ones(10, 5)
    before = snapshot(optimizer)
    params[1].grad = sparse_grad()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    params[1].grad = None
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("where", [{"device": "meta"}, {"dtype": torch.complex64}], ids=str)
@each_own
def test_fused_refuses_in_the_words_of_torch(case: Case, where: Options) -> None:
    message = "`fused=True` requires all the params to be floating point Tensors"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        case([Parameter(torch.ones(2, 3, **where))], fused=True)


@pytest.mark.parametrize("kind", [AdamATan2, GrokFastSGD])
def test_drop_ins_take_the_positional_arguments_of_what_they_replace(kind: Any) -> None:
    """adam_atan2: lr, betas, weight_decay; torch.optim.SGD: lr, momentum, dampening, weight_decay,
    nesterov."""
    given: Any = {
        AdamATan2: ((0.5, (0.1, 0.2), 0.3), {"lr": 0.5, "betas": (0.1, 0.2), "weight_decay": 0.3}),
        GrokFastSGD: (
            (0.5, 0.9, 0.0, 0.3, True),
            {"lr": 0.5, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.3, "nesterov": True},
        ),
    }
    positional, named = given[kind]
    group = kind([Parameter(torch.ones(1))], *positional).param_groups[0]
    assert {name: group[name] for name in named} == named


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


def trainable(case: Case, *params: Parameter) -> list[Parameter]:
    """Those that the optimizer can step: matrices at least."""
    return [param for param in params if SHAPES in case.supports or param.dim() >= 2]


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
def test_loss_goes_the_right_way(case: Case, contiguous: bool) -> None:
    weight, bias, loss = quadratic(contiguous)
    first, last = run_steps(case(trainable(case, weight, bias)), loss)
    assert_direction(first, last, case.options.get("maximize", False))


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@each_case
def test_loss_goes_the_right_way_with_two_schedulers(case: Case, maximize: bool) -> None:
    weight, bias, loss = quadratic(contiguous=False)
    optimizer = case(trainable(case, weight, bias), maximize=maximize)
    schedulers = [StepLR(optimizer, 5, gamma=0.9), ReduceLROnPlateau(optimizer)]
    first, last = run_steps(optimizer, loss, schedulers)
    assert_direction(first, last, maximize)


@pytest.mark.parametrize("schedulers", INFO.scheduler_inputs, ids=lambda s: f"{len(s)}_schedulers")
@each_adamw
def test_loss_goes_the_right_way_with_schedulers(case: Case, schedulers: Any) -> None:
    weight, bias, loss = quadratic(contiguous=True)
    optimizer = case([weight, bias], maximize=True)
    first, last = run_steps(optimizer, loss, [make(optimizer) for make in schedulers])
    assert_direction(first, last, maximize=True)


@pytest.mark.parametrize("schedulers", INFO.scheduler_inputs, ids=lambda s: f"{len(s)}_schedulers")
def test_groups_with_schedulers_go_the_right_way(schedulers: Any) -> None:
    weight, bias, loss = quadratic(contiguous=True)
    optimizer = build([{"params": [weight]}, {"params": [bias], "lr": 0.01}])
    first, last = run_steps(optimizer, loss, [make(optimizer) for make in schedulers])
    assert_direction(first, last, maximize=False)


@each_own_input
def test_maximize_equals_minimising_the_negated_gradient(case: Case) -> None:
    """Negation is exact, so this is equality, seed of the filter, ring and sums included."""
    params, negated = case.params(), case.params()
    grads = make_grads(params, steps=5)
    optimizer = case(params)
    opposite = case(negated, maximize=not case.options.get("maximize", False))
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


@each_adamw_input_and_flag
def test_group_without_weight_decay_goes_the_right_way(case: Case) -> None:
    weight, bias, loss = quadratic(contiguous=True)
    optimizer = case([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}])
    first, last = run_steps(optimizer, loss)
    assert_direction(first, last, case.options.get("maximize", False))


@each_adamw_input_and_flag
def test_lr_of_another_group_does_not_leak(case: Case) -> None:
    """With an lr of 1e-28 an update is below half an ulp of every value, so nothing moves."""
    moving, still = Parameter(randn(10)), Parameter(randn(10, seed=1))
    before = still.detach().clone()
    lr = case.options.get("lr", 1e-3)
    optimizer = case([{"params": [moving], "lr": lr}, {"params": [still]}], lr=1e-28)
    train(optimizer, make_grads([moving, still], steps=5))
    assert_same(still.detach(), before)
    assert (moving != randn(10)).all()


@each_case
def test_added_group_trains_like_an_optimizer_of_its_own(case: Case) -> None:
    params, apart = case.params(), case.params()
    first, second = make_grads(params, 3, seed=1), make_grads(params, 3, seed=2)
    optimizer = unclipped(case(params[:2]))
    train(optimizer, [row[:2] for row in first])
    optimizer.add_param_group({"params": params[2:], "lr": 0.05})
    train(optimizer, second)
    late = unclipped(case(apart[2:], lr=0.05))
    train(late, [row[2:] for row in second])
    assert_same(snapshot(optimizer)[2:], snapshot(late))


@each_adamw
def test_added_group_has_state_at_once(case: Case) -> None:
    params = make_params()
    optimizer = case(params[:2])
    optimizer.add_param_group({"params": params[2:]})
    keys = {"step", "exp_avg", "exp_avg_sq"}
    keys |= {"grok_exp_avg", "grok_step"} if case.options["lamb"] else set()
    assert [set(optimizer.state[param]) for param in params] == [keys] * len(params)


# Learning rate


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=["0d", "1d", "2d"])
@each_adamw_input_and_flag
def test_tensor_lr_equals_float_lr(case: Case, shape: tuple[int, ...]) -> None:
    """2**-10 is the same number as a float and as a float32.

    A step may take lr in float32 where it took a double: the update then has 4 roundings more, and
    |update| <= lr * 3.2 (Kingma and Ba 2014, section 2.1) for beta (0.9, 0.999). Each of the two
    runs rounds the parameter twice per step, by decay and update, half an ulp each.
    """
    steps, lr = 5, 2.0**-10
    params, other = make_params(), make_params()
    grads = make_grads(params, steps)
    train(case(params, lr=lr), grads)
    train(case(other, lr=torch.full(shape, lr)), grads)
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


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=["0d", "1d", "2d"])
@each_own
def test_tensor_lr_that_changes_equals_float_lr_that_changes(
    case: Case, shape: tuple[int, ...]
) -> None:
    """Powers of two are the same number in every dtype; their products may be rounded to float32
    once more, in each of 4 steps."""
    params, twins = case.params(), case.params()
    lr = torch.full(shape, 2.0**-6)
    tensor, plain = case(params, lr=lr), case(twins, lr=2.0**-6)
    for row in make_grads(params, 4):
        train(tensor, [row])
        train(plain, [row])
        lr.mul_(0.5)
        plain.param_groups[0]["lr"] *= 0.5
    for param, twin in zip(params, twins, strict=True):
        assert_within(param, twin, 4 * 4 * 2**-24 * (1 + twin.detach().abs()), "param")


@takes_tensor_lr
def test_step_does_not_write_a_tensor_lr(implementation: Options) -> None:
    param = Parameter(randn(5))
    lr = torch.tensor(0.1)
    optimizer = build([param], lr=lr, **implementation)
    train(optimizer, make_grads([param], 2))
    assert (optimizer.param_groups[0]["lr"] is lr, lr._version) == (True, 0)


@each_own
def test_scheduler_moves_a_tensor_lr_like_a_float_lr(case: Case) -> None:
    """All values are powers of two, so the learning rates are equal exactly."""
    rates = []
    for lr in (0.5, torch.tensor([0.5])):
        optimizer = case(case.params()[:1], lr=lr)
        scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert rates == [2.0**-4, 2.0**-4]


@pytest.mark.parametrize("lr", [0.0, 0, torch.tensor(0.0)], ids=["float", "int", "tensor"])
@each_own
def test_zero_lr_keeps_the_parameters(case: Case, lr: Any) -> None:
    params = case.params()
    before = [param.detach().clone() for param in params]
    train(case(params, lr=lr, weight_decay=0.1), make_grads(params, 3))
    assert_same([param.detach() for param in params], before)


@each_adamw
def test_zero_lr_moves_the_moments(case: Case) -> None:
    """So that warm-up from 0 starts with the moments of the gradients already seen."""
    params = make_params()[:2]
    grads = make_grads(params, 3)
    still, moving = case(params, lr=0.0), case(clone_params(params))
    train(still, grads)
    train(moving, grads)
    states = [[row["exp_avg"] for row in snapshot(o)] for o in (still, moving)]
    assert_same(*states)
