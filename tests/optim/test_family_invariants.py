"""What torch's optimizer suite asks of every optimizer, of all rules and filters of the family.

GrokFastAdamW goes through the suite itself, input by input, in ``test_torch_suite*.py``. The same
checks are here once more in short, over ``OPTIMIZERS``: AdamATan2, GrokFastSGD, the filters with
sums and with a window, weight averages, clipping, and GradFilter around an optimizer of torch.
"""

import gc
import pickle
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from trm_fast.optim import AdamATan2, GrokFastSGD

from .filter_checks import Build, each_optimizer, each_own
from .torch_checks import (
    FLOATS,
    Options,
    assert_same,
    assert_within,
    clone_params,
    make_grads,
    make_params,
    one,
    randn,
    set_grads,
    snapshot,
    step_with,
    train,
    without_grads,
)

each_float = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])


def everything(optimizer: Any) -> Any:
    """Parameters, gradients, all state and the options, to be compared later."""
    return deepcopy((snapshot(optimizer), optimizer.state_dict()))


def trained(build: Build, steps: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    params = make_params(dtype)
    optimizer = build(params)
    train(optimizer, make_grads(params, steps))
    return optimizer


def unclipped(optimizer: Any) -> Any:
    """Without the one thing that parameters share in a step."""
    optimizer.clip_norm = None
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


# Errors

BAD: list[Options] = [{"lr": -1.0}, {"lr": torch.ones(2)}, {"weight_decay": -1.0}]


@pytest.mark.parametrize("options", BAD, ids=str)
@each_own
def test_refuses_bad_numbers_and_adds_no_group(build: Build, options: Options) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be"):
        build([one(1.0)], **options)
    optimizer = build([one(1.0)])
    with pytest.raises(ValueError, match=f"{name} must be"):
        optimizer.add_param_group({"params": [one(2.0)]} | options)
    assert (len(optimizer.param_groups), len(optimizer.state)) == (1, 1)


@pytest.mark.parametrize("device_or_dtype", ["meta", torch.complex64])
@each_own
def test_fused_refuses_in_the_words_of_torch(build: Build, device_or_dtype: Any) -> None:
    where = {"device": "meta"} if device_or_dtype == "meta" else {"dtype": device_or_dtype}
    message = "^`fused=True` requires all the params to be floating point Tensors"
    with pytest.raises(RuntimeError, match=message):
        build([Parameter(torch.ones(2, **where))], fused=True)


@each_optimizer
def test_duplicate_parameter_is_refused(build: Build) -> None:
    param = one(1.0)
    optimizer = build([param])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


@each_optimizer
def test_sparse_gradient_is_refused_and_nothing_moves(build: Build) -> None:
    params = [one(1.0, 2.0), Parameter(torch.ones(4, 2))]
    optimizer = build(params)
    params[0].grad, params[1].grad = torch.ones(2), torch.ones(4, 2).to_sparse()
    before = deepcopy((list(params), optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same((list(params), optimizer.state_dict()), before)


@each_own
def test_refused_group_keeps_the_first_from_its_step(build: Build) -> None:
    """Whatever is wrong with the last group is found before the first one moves."""
    shared = one(1.0, 2.0)
    first, bad = one(3.0), Parameter(shared.detach()[:1])
    optimizer = build([{"params": [first]}, {"params": [shared, bad]}])
    set_grads([first, shared, bad], [torch.ones(1), torch.ones(2), torch.ones(1)])
    before = everything(optimizer)
    with pytest.raises(ValueError, match="disjoint in memory"):
        optimizer.step()
    assert_same(everything(optimizer), before)


# Direction and learning rate


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@each_optimizer
def test_loss_goes_the_right_way(build: Build, maximize: bool, contiguous: bool) -> None:
    weight = Parameter(randn(10, 5) if contiguous else randn(10, 5, 2)[..., 0])
    data = randn(5, seed=3)
    optimizer = build([weight], maximize=maximize)
    scheduler = StepLR(optimizer, 5, gamma=0.9)
    plateau = ReduceLROnPlateau(optimizer)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = weight.mv(data).pow(2).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        plateau.step(loss.detach())
        losses.append(loss.item())
    assert (losses[-1] > losses[0]) is maximize


@each_own
def test_maximize_equals_minimising_the_negated_gradient(build: Build) -> None:
    """Negation is exact: bit for bit, seed, ring and sums included."""
    params = make_params()
    twins = clone_params(params)
    rows = make_grads(params, 5)
    ours, negated = build(params, maximize=True), build(twins)
    train(ours, rows)
    train(negated, [[-grad for grad in row] for row in rows])
    assert_same(without_grads(snapshot(ours)), without_grads(snapshot(negated)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@each_own
def test_lr_may_be_a_tensor_that_is_read_at_each_step(build: Build, shape: Any) -> None:
    """Powers of two are the same number in every dtype; their products may be rounded to float32
    once more, in each of 4 steps."""
    params = make_params()
    twins = clone_params(params)
    lr = torch.full(shape, 2.0**-6)
    tensor, plain = build(params, lr=lr), build(twins, lr=2.0**-6)
    for row in make_grads(params, 4):
        train(tensor, [row])
        train(plain, [row])
        lr.mul_(0.5)
        plain.param_groups[0]["lr"] *= 0.5
    for param, twin in zip(params, twins, strict=True):
        assert_within(param, twin, 4 * 4 * 2**-24 * (1 + twin.detach().abs()), "param")


@each_own
def test_lr_0_keeps_the_parameters(build: Build) -> None:
    params = make_params()
    before = [param.detach().clone() for param in params]
    train(build(params, lr=0.0, weight_decay=0.1), make_grads(params, 3))
    assert_same([param.detach() for param in params], before)


# Gradients


@each_optimizer
def test_gradients_are_only_read(build: Build) -> None:
    """Their binding, storage, version and value, at the first step and at those that are kept."""
    params = make_params()
    optimizer = build(params)
    for row in make_grads(params, 3):
        set_grads(params, row)
        held = [(id(p.grad), p.grad.data_ptr(), p.grad._version) for p in params]
        optimizer.step()
        assert [(id(p.grad), p.grad.data_ptr(), p.grad._version) for p in params] == held
        assert_same([param.grad for param in params], row)


@each_optimizer
def test_state_shares_no_memory_with_gradients(build: Build) -> None:
    optimizer = trained(build)
    before = without_grads(snapshot(optimizer))
    optimizer.zero_grad(set_to_none=False)
    assert_same(without_grads(snapshot(optimizer)), before)


@each_optimizer
def test_step_without_gradients_changes_nothing(build: Build) -> None:
    optimizer = trained(build)
    optimizer.zero_grad()
    before = everything(optimizer)
    optimizer.step()
    assert_same(everything(optimizer), before)


@each_optimizer
def test_zero_gradients_without_decay_keep_new_parameters(build: Build) -> None:
    params = make_params()
    before = [param.detach().clone() for param in params]
    train(build(params, weight_decay=0.0), [[torch.zeros_like(param) for param in params]] * 3)
    assert_same([param.detach() for param in params], before)


@each_optimizer
def test_late_parameter_equals_one_that_starts_then(build: Build) -> None:
    """No decay, no step, no filter state before its first gradient. Only the norm is shared."""
    params, twins = make_params(), make_params()
    optimizer, alone = unclipped(build(params)), unclipped(build(twins[3:4]))
    rows: Any = make_grads(params, 7)
    late = [[*row[:3], None, *row[4:]] for row in rows[:3]]
    train(optimizer, late + rows[3:])
    train(alone, [row[3:4] for row in rows[3:]])
    assert_same(snapshot(optimizer)[3], snapshot(alone)[0])


@each_optimizer
def test_pause_of_a_parameter_leaves_no_trace(build: Build) -> None:
    params, twins = make_params()[:2], make_params()[:1]
    optimizer, alone = unclipped(build(params)), unclipped(build(twins))
    rows: Any = make_grads(params, 8)
    train(optimizer, [[None if 2 <= t < 5 else row[0], row[1]] for t, row in enumerate(rows)])
    train(alone, [[row[0]] for t, row in enumerate(rows) if not 2 <= t < 5])
    assert_same(snapshot(optimizer)[0], snapshot(alone)[0])


# Order, dtypes and layouts


@each_optimizer
def test_order_of_the_parameters_changes_nothing(build: Build) -> None:
    params, reverse = make_params(), make_params()[::-1]
    rows = make_grads(params, 5)
    first, second = build(params), build(reverse)
    train(first, rows)
    train(second, [row[::-1] for row in rows])
    if first.clip_norm is None:  # the norm adds up in another order
        assert_same(snapshot(second)[::-1], snapshot(first))
    for param, twin in zip(params, reverse[::-1], strict=True):
        assert_within(param, twin, 5 * 8 * 2**-24 * (1 + twin.detach().abs()), "param")


@each_optimizer
def test_mixed_dtypes_step_as_if_each_were_alone(build: Build) -> None:
    params = [param for dtype in FLOATS for param in make_params(dtype)]
    alone = clone_params(params)
    rows = make_grads(params, 4)
    optimizer = unclipped(build(params))
    train(optimizer, rows)
    for index, param in enumerate(alone):
        single = unclipped(build([param]))
        train(single, [[row[index]] for row in rows])
        assert_same(snapshot(optimizer)[index], snapshot(single)[0], f"[{index}]")


@each_optimizer
def test_complex_parameter_equals_its_real_view(build: Build) -> None:
    """The numbers lie in one order, but for a scalar one; multiply-adds may be contracted in one
    loop and not in the other."""
    param = Parameter(randn(6, 3, dtype=torch.complex64))
    real = Parameter(torch.view_as_real(param.detach()).clone())
    first, second = build([param]), build([real])
    for seed in range(5):
        grad = randn(6, 3, seed=seed, dtype=torch.complex64)
        step_with(first, grad)
        step_with(second, torch.view_as_real(grad))
    ours = torch.view_as_real(param.detach())
    assert_within(ours, real, 5 * 8 * 2**-23 * (1 + real.detach().abs()), "param")
    for name, value in first.state[param].items():
        if value.is_complex():
            twin = second.state[real][name]
            bound = 5 * 8 * 2**-23 * (1 + twin.abs())
            assert_within(torch.view_as_real(value), twin, bound, name)


@pytest.mark.parametrize(
    "more", [{"foreach": True}, {"fused": True}, {"capturable": True}, {"foreach": False}], ids=str
)
@each_own
def test_flags_of_torch_change_nothing(build: Build, more: Options) -> None:
    params = make_params()
    twins = clone_params(params)
    rows = make_grads(params, 4)
    flagged, plain = build(params, **more), build(twins)
    train(flagged, rows)
    train(plain, rows)
    assert_same(snapshot(flagged), snapshot(plain))


@each_own
def test_reference_and_fused_form_agree(build: Build) -> None:
    """Each step from equal values: a chain of at most 12 roundings, and for 16 bits one more."""
    params = make_params()
    reference, other = build(params, backend="reference"), build(clone_params(params))
    for row in make_grads(params, 5):
        train(reference, [row])
        train(other, [row])
        for ours, theirs in zip(snapshot(other), snapshot(reference), strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                largest = 1 + (value.abs().max() if value.numel() else 0)
                assert_within(ours[name], value, 12 * 2**-23 * 5 * largest, name)


# GradScaler


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("good_steps", [0, 1, 4])
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=lambda dtype: str(dtype)[6:])
@each_optimizer
def test_overflow_changes_nothing(
    build: Build, dtype: torch.dtype, good_steps: int, bad: float
) -> None:
    """Bit for bit: parameters, moments, mean, ring, sum, counters and weight average."""
    params = make_params(dtype)
    optimizer = build(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    rows = make_grads(params, good_steps + 1)
    train(optimizer, rows[:-1])
    before = deepcopy((without_grads(snapshot(optimizer)), optimizer.state_dict()))
    set_grads(params, rows[-1])
    params[1].grad[5] = bad
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**5
    assert_same((without_grads(snapshot(optimizer)), optimizer.state_dict()), before)


@each_optimizer
def test_scaled_training_equals_unscaled(build: Build) -> None:
    """As every scale is a power of two; with an overflow in the middle, as if it had not been."""
    params = make_params()
    twins = clone_params(params)
    optimizer, plain = build(params), build(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
    for t, row in enumerate(make_grads(params, 7)):
        scale = scaler.scale(torch.ones(())).item()
        set_grads(params, [grad * scale for grad in row])
        if t == 3:
            params[0].grad[1, 1] = torch.inf
        else:
            train(plain, [row])
        scaler.step(optimizer)
        scaler.update()
    assert_same(without_grads(snapshot(optimizer)), without_grads(snapshot(plain)))


# State dicts


@each_float
@each_optimizer
def test_loaded_optimizer_continues_alike(build: Build, dtype: torch.dtype) -> None:
    """With all dtypes: float32 states of 16-bit parameters are not cast."""
    optimizer = trained(build, dtype=dtype)
    other = build(clone_params(params_of(optimizer)))
    other.load_state_dict(state_dict=deepcopy(optimizer.state_dict()))
    assert_same(without_grads(snapshot(other)), without_grads(snapshot(optimizer)))
    rows = make_grads(params_of(optimizer), 3)
    train(optimizer, rows)
    train(other, rows)
    assert_same(snapshot(other), snapshot(optimizer))


@each_optimizer
def test_file_needs_the_loader_of_weights_only(build: Build, tmp_path: Any) -> None:
    optimizer = trained(build)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert_same(torch.load(tmp_path / "optimizer.pt", weights_only=True), optimizer.state_dict())


@each_own
def test_older_dict_gets_the_defaults(build: Build) -> None:
    """A dict that knows nothing but the parameters, as one of before all options."""
    optimizer = trained(build)
    state_dict = deepcopy(optimizer.state_dict())
    state_dict["param_groups"] = [
        {"params": group["params"]} for group in state_dict["param_groups"]
    ]
    optimizer.load_state_dict(state_dict)
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in optimizer.defaults} == optimizer.defaults
    train(optimizer, make_grads(params_of(optimizer), 1))


@each_own
def test_counters_may_be_numbers(build: Build) -> None:
    optimizer = trained(build)
    state_dict = deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = state["step"].item()
    before = without_grads(snapshot(optimizer))
    optimizer.load_state_dict(state_dict)
    assert_same(without_grads(snapshot(optimizer)), before)


@each_optimizer
def test_bad_dict_changes_nothing(build: Build) -> None:
    optimizer = trained(build)
    before = everything(optimizer)
    for spoil in (drop_parameter, other_shape, negative_lamb):
        state_dict = deepcopy(optimizer.state_dict())
        if spoil(state_dict):
            with pytest.raises(ValueError, match=r"match|must be"):
                optimizer.load_state_dict(state_dict)
            assert_same(everything(optimizer), before)
    train(optimizer, make_grads(params_of(optimizer), 1))


def drop_parameter(state_dict: Any) -> bool:
    state_dict["param_groups"][0]["params"].pop()
    return True


def other_shape(state_dict: Any) -> bool:
    state = state_dict["state"][0]
    names = [name for name, value in state.items() if value.dim() == 2]
    for name in names:
        state[name] = state[name][:3]
    return bool(names)


def negative_lamb(state_dict: Any) -> bool:
    state_dict["param_groups"][0]["lamb"] = -1.0
    return state_dict["param_groups"][0]["filter"] is not None


@each_optimizer
def test_names_of_parameters_survive(build: Build) -> None:
    names = ["matrix", "vector"]
    optimizer = build(list(zip(names, make_params()[:2], strict=True)))
    other = build(list(zip(names, make_params()[:2], strict=True)))
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    assert other.state_dict()["param_groups"][0]["param_names"] == names


@each_optimizer
def test_state_is_there_from_construction(build: Build) -> None:
    """So that checkpoint tools need not invent gradients to learn its keys."""
    params = make_params()
    optimizer = build(params)
    keys = [set(optimizer.state[param]) for param in params]
    assert all(keys)
    train(optimizer, make_grads(params, 1))
    assert [set(optimizer.state[param]) for param in params] == keys


@each_optimizer
def test_added_group_trains_like_an_optimizer_of_its_own(build: Build) -> None:
    params, twins = make_params(), make_params()
    optimizer, alone = unclipped(build(params[:2])), unclipped(build(twins[2:]))
    rows = make_grads(params, 5)
    train(optimizer, [row[:2] for row in rows[:2]])
    optimizer.add_param_group({"params": params[2:]})
    train(optimizer, rows[2:])
    train(alone, [row[2:] for row in rows[2:]])
    assert_same(snapshot(optimizer)[2:], snapshot(alone))


# Copies, text, hooks, closures, lifetime

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@each_optimizer
def test_copy_continues_alike_and_leaves_the_original_alone(build: Build, copy: Any) -> None:
    optimizer = trained(build)
    other = copy(optimizer)
    before = everything(optimizer)
    assert {k for k in vars(other) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
    rows = make_grads(params_of(optimizer), 3)
    train(other, rows)
    assert_same(everything(optimizer), before)
    train(optimizer, rows)
    assert_same(snapshot(other), snapshot(optimizer))


@each_optimizer
def test_text_shows_the_options(build: Build) -> None:
    optimizer = build([one(1.0)], weight_decay=0.125)
    assert repr(optimizer).startswith(f"{type(optimizer).__name__} (\nParameter Group 0\n")
    assert "weight_decay: 0.125\n" in repr(optimizer)


@each_optimizer
def test_hooks_and_closure_run_in_order(build: Build) -> None:
    param = one(1.0, 2.0)
    optimizer = build([param])
    calls: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    loss = torch.tensor(3.0)

    def closure() -> Tensor:
        calls.append((torch.is_grad_enabled(), param.detach().clone().tolist()))
        param.grad = torch.ones(2)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is loss
    assert calls == ["before", (True, [1.0, 2.0]), "after"]
    assert param.detach().tolist() != [1.0, 2.0]


@each_optimizer
def test_load_hooks_see_and_change_what_is_loaded(build: Build) -> None:
    optimizer = trained(build)
    seen = []

    def change(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.375
        return state_dict

    optimizer.register_load_state_dict_pre_hook(change)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    assert seen == [0.375]


@each_optimizer
def test_optimizer_dies_with_its_last_reference(build: Build) -> None:
    optimizer = trained(build)
    gc.disable()
    try:
        dead = weakref.ref(optimizer)
        del optimizer
        assert dead() is None
    finally:
        gc.enable()


@each_optimizer
def test_step_leaves_no_graph(build: Build) -> None:
    optimizer = trained(build)
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    assert not any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
    assert all(param.grad_fn is None and param.is_leaf for param in params_of(optimizer))


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
    group = kind([one(1.0)], *positional).param_groups[0]
    assert {name: group[name] for name in named} == named
