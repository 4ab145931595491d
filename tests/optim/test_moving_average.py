"""The filter "ma": the window of the published code, and its state between two runs.

The truth is a deque of gradients, summed anew at each step; of a resumed run, the run that was
never interrupted.
"""

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from trm_fast.optim import AdamATan2, GradFilter, GrokFastAdamW, GrokFastSGD

from .filter_checks import assert_close, each_backend, few_params, filtered
from .torch_checks import (
    Options,
    assert_same,
    clone_params,
    make_grads,
    make_params,
    one,
    randn,
    set_grads,
    snapshot,
    train,
    without_grads,
)

KINDS: dict[str, Callable[..., Any]] = {
    "adamw": lambda params, **options: GrokFastAdamW(params, filter="ma", **options),
    "sgd": lambda params, **options: GrokFastSGD(params, momentum=0.9, filter="ma", **options),
    "atan2": lambda params, **options: AdamATan2(params, filter="ma", **options),
    "around_sgd": lambda params, **options: GradFilter(
        torch.optim.SGD(params, lr=0.1, momentum=0.9), filter="ma", **options
    ),
}
each_kind = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)


def through_file(value: Any) -> Any:
    """What a safe load reads back."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# The window


@pytest.mark.parametrize(
    ("window", "steps"), [(1, 5), (2, 9), (3, 20), (100, 205)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("after_step", [0, 4])
@pytest.mark.parametrize("warmup", [True, False], ids=["warmup", "at_once"])
def test_window_is_that_of_the_published_deque(
    window: int, steps: int, warmup: bool, after_step: int
) -> None:
    options = {"window": window, "warmup": warmup, "after_step": after_step, "lamb": 5.0}
    params = few_params()[1:3]
    rows = make_grads(params, steps)
    truth = torch.optim.SGD(clone_params(params), lr=0.1)
    train(truth, filtered(rows, filter="ma", **options))
    train(GrokFastSGD(params, lr=0.1, filter="ma", **options), rows)
    assert_close(params, truth.param_groups[0]["params"])


@each_backend
def test_float32_follows_the_deque_for_long(backend: str) -> None:
    """Sums are made anew once in two windows, so that their rounding does not pile up.

    A sum of w gradients below 6 has at most 4 w roundings of 2**-24 since it was made anew, each of
    at most 6 w; its mean adds one, and lamb * lr = 0.5 of it reaches the weights: after 300 steps
    300 * 0.5 * (4 * 6 w + 6) * 2**-24 < 2e-3 with w = 9. Without new sums the same 300 steps had
    600 roundings.
    """
    param = Parameter(randn(3000))
    twin = Parameter(param.detach().double())
    rows = make_grads([param], 300)
    assert max(row[0].abs().max() for row in rows) < 6
    train(GrokFastSGD([param], lr=0.1, lamb=5.0, filter="ma", window=9, backend=backend), rows)
    exact = filtered(
        [[grad.double() for grad in row] for row in rows], filter="ma", lamb=5.0, window=9
    )
    train(torch.optim.SGD([twin], lr=0.1), exact)
    assert (param.double() - twin).abs().max() < 2e-3


def test_window_of_1_multiplies_the_gradient() -> None:
    params = few_params()
    twins = clone_params(params)
    rows = make_grads(params, 3)
    train(GrokFastSGD(params, lr=0.1, lamb=3.0, filter="ma", window=1), rows)
    train(torch.optim.SGD(twins, lr=0.1), [[4.0 * grad for grad in row] for row in rows])
    assert_close(params, twins)


def test_ring_holds_the_last_gradients() -> None:
    """In order of their steps, each in the memory order of its parameter."""
    params = make_params()
    optimizer = GrokFastSGD(params, filter="ma", window=3)
    rows = make_grads(params, 5)
    train(optimizer, rows)
    for index, param in enumerate(params):
        ring = optimizer.state[param]["grok_ring"]
        assert_same(ring, torch.stack([rows[t][index] for t in (3, 4, 2)]))
        dense = param.is_contiguous() or index == 3  # the permuted one; a strided view has gaps
        assert ring[0].stride() == (param.stride() if dense else (4, 1))


# Saved and resumed in the middle of a window

STORAGE: dict[str, Options] = {
    "float32": {},
    "bfloat16": {"state_dtype": torch.bfloat16},
    "bfloat16_ring": {"state_dtype": {"grok_ring": torch.bfloat16}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", STORAGE.values(), ids=STORAGE)
@pytest.mark.parametrize("saved_at", [2, 5, 9])
@each_kind
def test_resumed_run_equals_uninterrupted(
    build: Callable[..., Any], dtype: torch.dtype, options: Options, saved_at: int
) -> None:
    """Bit for bit: before the window of 4 is full, and in the middle of its second and third turn.

    Stochastic rounding included, as its bits depend on step, place and state.
    """
    params = make_params(dtype)
    optimizer = build(params, window=4, **options)
    rows = make_grads(params, 12)
    train(optimizer, rows[:saved_at])
    resumed = build(clone_params(params), window=4, **options)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    train(optimizer, rows[saved_at:])
    train(resumed, rows[saved_at:])
    assert_same(snapshot(resumed), snapshot(optimizer))


@each_kind
def test_buffers_of_a_bfloat16_model_survive(build: Callable[..., Any]) -> None:
    """Dtypes and bits; torch's own load would cast all of them to bfloat16."""
    params = make_params(torch.bfloat16)
    optimizer = build(params, window=3)
    train(optimizer, make_grads(params, 4))
    rows = without_grads(snapshot(optimizer))
    float32 = {v.dtype for row in rows for k, v in row.items() if k.startswith("grok")}
    assert float32 == {torch.float32}
    other = build(clone_params(params), window=3)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert_same(without_grads(snapshot(other)), rows)


def test_bfloat16_ring_is_half_as_large() -> None:
    (param,) = (Parameter(randn(5)),)
    chosen = {"state_dtype": {"grok_ring": torch.bfloat16}}
    state = GrokFastAdamW([param], filter="ma", window=3, **chosen).state[param]
    dtypes = {name: state[name].dtype for name in ("grok_ring", "grok_sum")}
    assert dtypes == {"grok_ring": torch.bfloat16, "grok_sum": torch.float32}


def test_sum_of_a_window_stays_exact() -> None:
    with pytest.raises(ValueError, match=r"state_dtype must name.*got 'grok_sum'"):
        GrokFastAdamW([one(1.0)], filter="ma", state_dtype={"grok_sum": torch.bfloat16})


# What a state dict must not change


def trained(build: Callable[..., Any], window: int = 4) -> Any:
    params = make_params()
    optimizer = build(params, window=window)
    train(optimizer, make_grads(params, 6))
    return optimizer


def window_is_3(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["window"] = 3


def ring_is_longer(state_dict: dict[str, Any]) -> None:
    state = state_dict["state"][3]
    state["grok_ring"] = torch.cat([state["grok_ring"]] * 2)


def ring_of_another_shape(state_dict: dict[str, Any]) -> None:
    state_dict["state"][3]["grok_ring"] = torch.zeros(4, 2, 2)


def ring_is_a_list(state_dict: dict[str, Any]) -> None:
    state_dict["state"][3]["grok_ring"] = list(state_dict["state"][3]["grok_ring"])


def filter_is_unknown(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["filter"] = "mean"


def window_is_negative(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["window"] = -1


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (window_is_3, "window must be 4, as in the grok_ring of parameter 0; got 3"),
        (ring_is_longer, "window must be 8"),
        (
            ring_of_another_shape,
            r"grok_ring of parameter 3 must be a tensor \[window, \*\(8, 3\)\]",
        ),
        (ring_is_a_list, "grok_ring of parameter 3 must be a tensor"),
        (filter_is_unknown, "filter must be"),
        (window_is_negative, "window must be"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@each_kind
def test_spoilt_state_dict_is_refused_before_anything_changes(
    build: Callable[..., Any], spoil: Callable[[dict[str, Any]], None], named: str
) -> None:
    optimizer = trained(build)
    params = optimizer.param_groups[0]["params"]
    other = build(clone_params(params), window=4)
    train(other, make_grads(params, 2, seed=5))
    before = deepcopy((snapshot(other), other.state_dict()))
    state_dict = deepcopy(optimizer.state_dict())
    spoil(state_dict)
    with pytest.raises(ValueError, match=named):
        other.load_state_dict(state_dict)
    assert_same((snapshot(other), other.state_dict()), before)
    set_grads(other.param_groups[0]["params"], make_grads(params, 1)[0])
    other.step()


@each_kind
def test_window_of_a_state_dict_wins_over_that_of_the_optimizer(build: Callable[..., Any]) -> None:
    """As every option of a group does in torch."""
    optimizer = trained(build)
    params = optimizer.param_groups[0]["params"]
    other = build(clone_params(params), window=7)
    other.load_state_dict(deepcopy(optimizer.state_dict()))  # torch's optimizers do not copy
    rows = make_grads(params, 5)
    train(optimizer, rows)
    train(other, rows)
    assert other.param_groups[0]["window"] == 4
    assert_same(snapshot(other), snapshot(optimizer))


@pytest.mark.parametrize("missing", ["grok_ring", "grok_sum"])
@each_kind
def test_window_without_one_of_its_parts_starts_anew(
    build: Callable[..., Any], missing: str
) -> None:
    """A sum whose gradients are gone, or gradients without their sum, would be wrong for long."""
    optimizer = trained(build)
    params = optimizer.param_groups[0]["params"]
    state_dict = deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        del state[missing]
    optimizer.load_state_dict(state_dict)
    rows = make_grads(params, 2)
    train(optimizer, rows)
    for index, param in enumerate(params):
        state = optimizer.state[param]
        assert state["grok_step"].item() == 2
        assert_same(state["grok_ring"][:2], torch.stack([row[index] for row in rows]))
        # The order of two terms does not matter.
        assert_same(state["grok_sum"], rows[0][index] + rows[1][index])
