"""torch's optimizer checks on all of the registry: dtypes, layouts, what a step leaves alone."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from .registry import (
    Case,
    each_adamw_input,
    each_case,
    each_form,
    each_input,
    each_input_and_any_flag,
    each_input_and_flag,
    each_of_any_shape,
    each_own,
)
from .torch_checks import (
    FLOATS,
    Options,
    assert_same,
    assert_within,
    build,
    clone_params,
    each_float,
    each_implementation,
    everything,
    make_grads,
    make_params,
    randn,
    set_grads,
    snapshot,
    train,
    unclipped,
    without_grads,
)

# Dtypes and layouts


@each_form
def test_mixed_group_equals_an_optimizer_for_each_parameter(case: Case) -> None:
    """All dtypes and layouts in one group, each as if it were alone; "cpp" has no float64."""
    dtypes = FLOATS[1:] if case.options.get("backend") == "cpp" else FLOATS
    params = [param for dtype in dtypes for param in case.params(dtype)]
    alone = clone_params(params)
    grads = make_grads(params, steps=4)
    optimizer = unclipped(case(params))
    train(optimizer, grads)
    for index, param in enumerate(alone):
        single = unclipped(case([param]))
        train(single, [[row[index]] for row in grads])
        assert_same(snapshot(optimizer)[index], snapshot(single)[0], f"[{index}]")


@each_case
def test_group_order_changes_nothing(case: Case) -> None:
    params, reverse = case.params(), case.params()
    grads = make_grads(params, steps=5)
    forward, backward = case(params), case(reverse[::-1])
    train(forward, grads)
    train(backward, [row[::-1] for row in grads])
    if forward.clip_norm is None:  # the norm adds up in another order
        assert_same(snapshot(backward)[::-1], snapshot(forward))
    for param, twin in zip(params, reverse, strict=True):
        assert_within(param, twin, 5 * 8 * 2**-24 * (1 + twin.detach().abs()), "param")


@pytest.mark.parametrize(
    "more", [{"foreach": True}, {"fused": True}, {"capturable": True}, {"foreach": False}], ids=str
)
@each_own
def test_flags_of_torch_change_nothing(case: Case, more: Options) -> None:
    params, twins = case.params(), case.params()
    rows = make_grads(params, 4)
    flagged, plain = case(params, **more), case(twins)
    train(flagged, rows)
    train(plain, rows)
    assert_same(snapshot(flagged), snapshot(plain))


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


@each_adamw_input
def test_complex_parameter_equals_its_real_view(case: Case) -> None:
    """Same numbers in the same order, but not the same loop: an implementation may contract a
    multiply-add in one and not in the other, which is an ulp of the parameter and of the update,
    and the update is at most 3.2 * lr <= 0.032 (Kingma and Ba 2014, section 2.1)."""
    steps = 3
    params = complex_params()
    reals = [Parameter(as_real(param).clone()) for param in params]
    grads = [[randn(*p.shape, seed=i, dtype=p.dtype) for p in params] for i in range(steps)]
    train(case(params), grads)
    train(case(reals), [[as_real(grad) for grad in row] for row in grads])
    for param, real in zip(params, reals, strict=True):
        bound = steps * torch.finfo(torch.float32).eps * (real.detach().abs().double() + 0.1)
        assert_within(as_real(param), real, bound, "param")


@each_of_any_shape
def test_states_of_a_complex_parameter_equal_those_of_its_real_view(case: Case) -> None:
    """The numbers lie in one order; multiply-adds may be contracted in one loop and not in the
    other."""
    param = Parameter(randn(6, 3, dtype=torch.complex64))
    real = Parameter(torch.view_as_real(param.detach()).clone())
    first, second = case([param]), case([real])
    for seed in range(5):
        grad = randn(6, 3, seed=seed, dtype=torch.complex64)
        train(first, [[grad]])
        train(second, [[torch.view_as_real(grad)]])
    states = first.state[param].items()
    pairs = {name: (v, second.state[real][name]) for name, v in states if v.is_complex()}
    pairs["param"] = (param, real)
    for name, (ours, twin) in pairs.items():
        bound = 5 * 8 * 2**-23 * (1 + twin.detach().abs())
        assert_within(torch.view_as_real(ours.detach()), twin, bound, name)


@each_adamw_input
def test_complex_parameter_equals_two_real_ones(case: Case) -> None:
    """Real and imaginary part as two parameters; tolerance as above."""
    steps = 3
    param = Parameter(randn(9, dtype=torch.complex64))
    parts = [Parameter(part.detach().clone()) for part in (param.real, param.imag)]
    grads = [randn(9, seed=i, dtype=torch.complex64) for i in range(steps)]
    train(case([param]), [[grad] for grad in grads])
    train(case(parts), [[grad.real, grad.imag] for grad in grads])
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


@each_case
def test_zero_gradients_without_decay_keep_new_parameters(case: Case) -> None:
    params = case.params()
    before = [param.detach().clone() for param in params]
    optimizer = case(params, weight_decay=0.0)
    train(optimizer, [[torch.zeros_like(param) for param in params]] * 3)
    assert_same([param.detach() for param in params], before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@each_input_and_any_flag
def test_step_without_gradients_changes_nothing(case: Case) -> None:
    params = case.params()
    leaves = [p * 1 for p in params] if case.options.get("differentiable") else params
    optimizer = case(leaves)
    before = snapshot(optimizer)
    loss = torch.tensor([1.0])
    assert optimizer.step(lambda: loss) is loss
    assert_same(snapshot(optimizer), before)


@each_input_and_flag
def test_step_after_gradients_went_away_changes_nothing(case: Case) -> None:
    params = case.params()
    optimizer = case(params)
    train(optimizer, make_grads(params, 2))
    optimizer.zero_grad(set_to_none=True)
    before = everything(optimizer)
    optimizer.step()
    assert_same(everything(optimizer), before)


@each_input_and_any_flag
def test_frozen_parameters_get_no_state(case: Case) -> None:
    optimizer = case([randn(2, 3), randn(3, 3)])
    optimizer.step()
    assert [optimizer.state.get(p, {}) for p in optimizer.param_groups[0]["params"]] == [{}, {}]


@each_input
def test_late_gradient_starts_a_parameter_afresh(case: Case) -> None:
    """Its step count and its filter start at its own first gradient, not at the optimizer's."""
    params = case.params()
    late = clone_params(params[1:2])
    grads = make_grads(params, steps=7)
    optimizer, fresh = unclipped(case(params)), unclipped(case(late))
    train(optimizer, [[row[0], None, *row[2:]] for row in grads[:3]])
    train(optimizer, grads[3:])
    train(fresh, [[row[1]] for row in grads[3:]])
    assert_same(snapshot(optimizer)[1], snapshot(fresh)[0])


@each_form
def test_frozen_layer_resumes_where_it_stopped(case: Case) -> None:
    params = case.params()
    paused = clone_params(params[:1])
    grads = make_grads(params, steps=8)
    optimizer, other = unclipped(case(params)), unclipped(case(paused))
    rows = [[None if 2 <= i < 5 else row[0], *row[1:]] for i, row in enumerate(grads)]
    train(optimizer, rows)
    train(other, [[row[0]] for row in [*grads[:2], *grads[5:]]])
    assert_same(snapshot(optimizer)[0], snapshot(other)[0])


@each_input_and_flag
def test_gradients_are_never_written(case: Case) -> None:
    """Neither their values nor their storage, not even with equal values, nor the binding."""
    params = case.params()
    optimizer = case(params)
    for row in make_grads(params, 3):
        set_grads(params, row)
        grads = [param.grad for param in params]
        before = [(grad._version, grad.data_ptr()) for grad in grads]
        optimizer.step()
        assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
        assert [(grad._version, grad.data_ptr()) for grad in grads] == before
        assert_same(grads, row)


@each_form
def test_state_shares_no_memory_with_gradients(case: Case) -> None:
    """A gradient zeroed in place after the step must not reach the filter."""
    params = case.params()
    optimizer = case(params)
    train(optimizer, make_grads(params, 1))
    before = without_grads(snapshot(optimizer))
    optimizer.zero_grad(set_to_none=False)
    assert_same(without_grads(snapshot(optimizer)), before)


@each_case
def test_state_is_there_from_construction(case: Case) -> None:
    """So that checkpoint tools need not invent gradients to learn its keys."""
    params = case.params()
    optimizer = case(params)
    before = [set(optimizer.state[param]) for param in params]
    assert all(before)
    train(optimizer, make_grads(params, 1))
    assert before == [set(optimizer.state[param]) for param in params]
