"""``clip_norm``: all gradients together are scaled down, as torch's own function would before.

The truth is ``torch.nn.utils.clip_grad_norm_`` in float64.
"""

from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from trm_fast.optim import GradFilter, GrokFastAdamW, GrokFastSGD

from .filter_checks import (
    Family,
    assert_close,
    each_backend,
    each_family,
    each_filter,
    few_params,
    filtered,
)
from .torch_checks import (
    Options,
    assert_same,
    assert_within,
    clone_params,
    make_grads,
    make_params,
    one,
    set_grads,
    snapshot,
    step_with,
    train,
)

Rows = list[list[Tensor]]


def clipped(rows: Rows, norm: float) -> Rows:
    """The gradients that torch's function leaves, and nothing of ours."""
    result = []
    for row in rows:
        params = [Parameter(torch.zeros_like(grad)) for grad in row]
        set_grads(params, row)
        torch.nn.utils.clip_grad_norm_(params, norm)
        result.append([param.grad for param in params])
    return result


def norm_of(row: list[Tensor]) -> float:
    return torch.cat([grad.double().flatten() for grad in row]).norm().item()


@each_family
@each_filter
def test_clipped_step_equals_torchs_function_before_it(family: Family, options: Options) -> None:
    """In front of the filter, so that an outlier does not reach the state. The norm is about 9;
    ours is handed over as float32, which is 2**-24 of each gradient: at most 20 steps of lr = 0.01
    times 6 for the largest gain, and 20 for the momentum."""
    params = few_params()
    truth = family.truth(clone_params(params), **family.options)
    rows = make_grads(params, 20)
    optimizer = family.ours(params, clip_norm=2.0, **options, **family.options)
    for row in rows:
        train(optimizer, [row])
        assert optimizer.grad_norm.item() == pytest.approx(norm_of(row), rel=2**-23)
    train(truth, filtered(clipped(rows, 2.0), **options))
    for param, expected in zip(params, truth.param_groups[0]["params"], strict=True):
        assert_within(param, expected, 20 * 0.01 * 6 * 20 * 2**-24 * 2.0, "param")


@each_backend
@pytest.mark.parametrize("filter", ["ema", "projection"])
def test_float32_is_clipped_alike(filter: str, backend: str) -> None:
    """A clipped gradient has 3 roundings more; the same bound as in float64, plus those."""
    params = make_params()
    exact = [Parameter(param.detach().double()) for param in params]
    rows = make_grads(params, 10)
    options: Options = {"lr": 0.01, "filter": filter}
    train(GrokFastSGD(params, clip_norm=1.0, backend=backend, **options), rows)
    doubles = [[grad.double() for grad in row] for row in rows]
    train(torch.optim.SGD(exact, lr=0.01), filtered(clipped(doubles, 1.0), filter=filter))
    for param, truth in zip(params, exact, strict=True):
        assert_within(param, truth, 10 * 2**-24 * (2 * truth.detach().abs() + 0.01 * 3 * 10), "p")


def test_groups_share_one_norm() -> None:
    params = few_params()
    twins = clone_params(params)
    rows = make_grads(params, 5)
    groups = [{"params": params[:1], "lamb": 0.0}, {"params": params[1:], "filter": "projection"}]
    optimizer = GrokFastSGD(groups, lr=0.1, clip_norm=1.0)
    train(optimizer, rows)
    small = clipped(rows, 1.0)
    train(torch.optim.SGD(twins[:1], lr=0.1), [row[:1] for row in small])
    after = filtered([row[1:] for row in small], filter="projection")
    train(torch.optim.SGD(twins[1:], lr=0.1), after)
    for param, twin in zip(params, twins, strict=True):
        assert_within(param, twin, 5 * 0.1 * 3 * 4 * 2**-24, "param")
    assert optimizer.grad_norm.item() == pytest.approx(norm_of(rows[-1]), rel=2**-23)


def test_groups_of_two_arithmetics_share_one_norm() -> None:
    """Of float64 and float32 parameters, with a complex one among them."""
    params: Any = [
        one(1.0, dtype=torch.float64), one(2.0), Parameter(torch.ones(1, dtype=torch.complex64)),
    ]  # fmt: skip
    optimizer = GrokFastSGD(params, lr=1.0, filter=None, clip_norm=1.0)
    grads = [torch.tensor([2.0]).double(), torch.tensor([4.0]), torch.tensor([2.0 + 5.0j])]
    set_grads(params, grads)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(7.0, rel=2**-23)
    found = [p.detach().to(torch.complex128) for p in params]
    starts = (1.0, 2.0, 1.0)
    for start, value, grad in zip(starts, found, grads, strict=True):
        # Rounded as float32 once, and 1e-6 is added to the norm as in torch.
        assert abs(value - (start - grad / 7)).item() < 1e-6


@each_family
def test_gradients_below_the_norm_are_not_touched(family: Family) -> None:
    """The factor is then 1, and the step is that without clipping, bit for bit."""
    params = make_params()
    twins = clone_params(params)
    rows = make_grads(params, 5)
    optimizer = family.ours(params, clip_norm=1e3)
    train(optimizer, rows)
    train(family.ours(twins), rows)
    assert_same(params, twins)
    assert optimizer.grad_norm.item() == pytest.approx(norm_of(rows[-1]), rel=2**-22)


@each_family
def test_gradients_are_only_read(family: Family) -> None:
    params = make_params()
    row = make_grads(params, 1)[0]
    optimizer = family.ours(params, clip_norm=1e-3)
    set_grads(params, row)
    held = [(id(p.grad), p.grad.data_ptr(), p.grad._version) for p in params]
    optimizer.step()
    assert [(id(p.grad), p.grad.data_ptr(), p.grad._version) for p in params] == held
    assert_same([param.grad for param in params], row)


@each_family
def test_clip_norm_may_change_between_steps(family: Family) -> None:
    """None does not clip, and the factor of the step before is forgotten."""
    params = few_params()
    truth = family.truth(clone_params(params), **family.options)
    optimizer = family.ours(params, filter=None, clip_norm=0.5, **family.options)
    for row, norm in zip(make_grads(params, 6), (0.5, None, 2.0, None, None, 0.25), strict=True):
        optimizer.clip_norm = norm
        train(optimizer, [row])
        train(truth, [row] if norm is None else clipped([row], norm))
    for param, expected in zip(params, truth.param_groups[0]["params"], strict=True):
        assert_within(param, expected, 6 * 0.01 * 20 * 2**-24 * 2.0, "param")


@each_family
def test_step_without_gradients_has_no_norm(family: Family) -> None:
    optimizer = family.ours([one(1.0)], clip_norm=1.0)
    assert optimizer.grad_norm is None
    step_with(optimizer, torch.ones(1))
    assert optimizer.grad_norm.item() == 1.0
    step_with(optimizer, None)
    assert optimizer.grad_norm is None


@each_family
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("filter", ["ema", "projection"])
def test_scaled_gradients_are_clipped_as_they_are_unscaled(
    family: Family, filter: str, unscale: bool
) -> None:
    """A power of two scales without rounding, so the run without a scaler is equal to it."""
    params = make_params()
    twins = clone_params(params)
    optimizer = family.ours(params, filter=filter, clip_norm=1.0)
    plain = family.ours(twins, filter=filter, clip_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=1)
    for row in make_grads(params, 4):
        scale = scaler.scale(torch.ones(())).item()
        set_grads(params, [grad * scale for grad in row])
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        train(plain, [row])
        assert_same(optimizer.grad_norm, plain.grad_norm)
    assert_same(params, twins)


@each_family
def test_overflow_changes_nothing(family: Family) -> None:
    params = make_params()
    optimizer = family.ours(params, clip_norm=1.0, weight_ema=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    rows = make_grads(params, 2)
    train(optimizer, rows[:1])
    set_grads(params, rows[1])
    params[0].grad[0, 0] = inf
    before = snapshot(optimizer)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert_same(snapshot(optimizer), before)


def test_filter_outside_clips_as_the_filter_inside() -> None:
    params = few_params()
    twins = clone_params(params)
    rows = make_grads(params, 5)
    train(GradFilter(torch.optim.SGD(params, lr=0.1), clip_norm=1.0), rows)
    train(GrokFastSGD(twins, lr=0.1, clip_norm=1.0), rows)
    assert_close(params, twins)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, nan, inf, "1", torch.tensor(1.0)], ids=str)
@each_family
def test_bad_clip_norm_is_refused_by_name(family: Family, clip_norm: Any) -> None:
    refused = pytest.raises((ValueError, TypeError), match=rf"^{family.ours.__name__}: clip_norm")
    with refused:
        family.ours([one(1.0)], clip_norm=clip_norm)
    optimizer = family.ours([one(1.0)], clip_norm=1.0)
    step_with(optimizer, torch.ones(1))
    optimizer.clip_norm = clip_norm
    before = snapshot(optimizer)
    with refused:
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_clipping_is_refused_where_autograd_looks_on() -> None:
    """The norm would be a constant to it, and the derivative wrong without a word."""
    with pytest.raises(ValueError, match="clip_norm must be None with differentiable"):
        GrokFastAdamW([one(1.0)], differentiable=True, clip_norm=1.0)


def test_an_optimizer_inside_of_backward_does_not_clip_its_one_parameter() -> None:
    """Each parameter has an optimizer there, which would take the norm of one gradient."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    for clip_norm in (None, 0.1):
        model = torch.nn.Linear(3, 2)
        before = [param.detach().clone() for param in model.parameters()]
        options = {"lr": 0.1, "clip_norm": clip_norm}
        _apply_optimizer_in_backward(GrokFastAdamW, model.parameters(), options)
        value = model(torch.ones(4, 3)).sum()
        if clip_norm is None:
            value.backward()
            assert not any(map(torch.equal, model.parameters(), before))
        else:
            with pytest.raises(ValueError, match="clip_norm must be None for an optimizer that"):
                value.backward()
            assert all(map(torch.equal, model.parameters(), before))
