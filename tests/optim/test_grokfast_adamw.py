"""What GrokFastAdamW adds to AdamW: the filter, its state, weight averages, 16-bit states, errors.

The truth is the paper's filter, written below, in front of torch's own AdamW or Adam in float64.
"""

import re
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from trm_fast import GrokFastAdamW

from .torch_checks import (
    STATES,
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

# At most 25 roundings of 2**-53 per step, relative to terms no larger than the largest value: after
# 200 steps below 200 * 25 * 2**-53 = 5.6e-13.
RTOL = 1e-12


def filtered(
    rows: Sequence[Sequence[Tensor | None]],
    alpha: float = 0.98,
    lamb: float = 2.0,
    filter: str | None = "ema",
    after_step: int = 0,
) -> list[list[Tensor | None]]:
    """The gradients behind the filter: mean_1 = g_1, mean = alpha * mean + (1 - alpha) * g."""
    means: dict[int, Tensor] = {}
    result = []
    for t, row in enumerate(rows):
        out: list[Tensor | None] = []
        for i, g in enumerate(row):
            if g is None or filter is None or t < after_step:
                out.append(g)
                continue
            means[i] = alpha * means[i] + (1 - alpha) * g if i in means else g.clone()
            out.append(g + lamb * (means[i] if filter == "ema" else g - means[i]))
        result.append(out)
    return result


def mean_of(rows: Sequence[Tensor], alpha: float = 0.98) -> Tensor:
    mean = rows[0]
    for grad in rows[1:]:
        mean = alpha * mean + (1 - alpha) * grad
    return mean


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for index, (ours, truth) in enumerate(zip(actual, expected, strict=True)):
        largest = truth.abs().max().item() if truth.numel() else 0.0
        assert_within(ours, truth, RTOL * largest, f"tensor {index}")


def assert_follows_paper(
    options: dict[str, Any], filter_options: dict[str, Any], steps: int = 20
) -> None:
    """Parameters of every layout end where torch's AdamW ends on the filtered gradients."""
    params = make_params(torch.float64)
    rows = make_grads(params, steps)
    truth = torch.optim.AdamW(clone_params(params), **options)
    train(GrokFastAdamW(params, **options, **filter_options), rows)
    train(truth, filtered(rows, **filter_options))
    assert_close(params, truth.param_groups[0]["params"])


# The filter


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("filter", ["ema", "highpass", None])
@pytest.mark.parametrize("inner", [torch.optim.AdamW, torch.optim.Adam])
def test_200_steps_equal_the_paper_in_front_of_torch(
    inner: type[torch.optim.Optimizer], filter: str | None, maximize: bool
) -> None:
    params = make_params(torch.float64)
    options = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1, "maximize": maximize}
    rows = make_grads(params, 200)
    truth = inner(clone_params(params), **options)
    train(truth, filtered(rows, filter=filter))
    decoupled = inner is torch.optim.AdamW
    train(GrokFastAdamW(params, filter=filter, decoupled_weight_decay=decoupled, **options), rows)
    assert_close(params, truth.param_groups[0]["params"])


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("lamb", [0.1, 5.0])
def test_alpha_and_lamb_are_those_of_the_paper(alpha: float, lamb: float) -> None:
    assert_follows_paper({"lr": 1e-2}, {"alpha": alpha, "lamb": lamb})


def test_defaults_are_those_of_the_paper_and_of_adamw() -> None:
    params = make_params(torch.float64)
    rows = make_grads(params, 20)
    truth = torch.optim.AdamW(clone_params(params))
    train(GrokFastAdamW(params), rows)
    train(truth, filtered(rows, alpha=0.98, lamb=2.0))
    assert_close(params, truth.param_groups[0]["params"])


@pytest.mark.parametrize("maximize", [False, True])
def test_mean_starts_at_the_first_gradient(maximize: bool) -> None:
    param, grad = one(1.0, 2.0), torch.tensor([3.0, -4.0])
    optimizer = GrokFastAdamW([param], maximize=maximize)
    step_with(optimizer, grad)
    assert_same(optimizer.state[param]["grok_exp_avg"], -grad if maximize else grad)


def test_mean_does_not_alias_the_gradient() -> None:
    param = one(1.0, 2.0)
    optimizer = GrokFastAdamW([param])
    step_with(optimizer, torch.ones(2))
    param.grad.zero_()
    assert_same(optimizer.state[param]["grok_exp_avg"], torch.ones(2))


@pytest.mark.parametrize("after_step", [1, 7])
@pytest.mark.parametrize("filter", ["ema", "highpass"])
def test_after_step_withholds_the_filter(filter: str, after_step: int) -> None:
    assert_follows_paper({"lr": 1e-2}, {"filter": filter, "after_step": after_step})


def test_mean_starts_behind_after_step() -> None:
    param = one(1.0, 2.0)
    optimizer = GrokFastAdamW([param], after_step=2)
    grads = [torch.full((2,), float(value)) for value in (5, 6, 7)]
    train(optimizer, [[grad] for grad in grads])
    assert_same(optimizer.state[param]["grok_exp_avg"], grads[2])


def test_after_step_counts_the_steps_of_each_parameter() -> None:
    late, early = one(1.0), one(1.0)
    optimizer = GrokFastAdamW([late, early], after_step=2)
    train(optimizer, [[None, torch.ones(1)]] * 2 + [[torch.ones(1)] * 2])
    counts = [optimizer.state[param]["grok_step"].item() for param in (late, early)]
    assert counts == [0, 1]


def test_groups_have_their_own_filter() -> None:
    filters = [{"alpha": 0.9, "lamb": 1.0}, {"filter": "highpass"}, {"filter": None}, {"lamb": 0.0}]
    params = [Parameter(randn(5, 3, seed=seed, dtype=torch.float64)) for seed in range(4)]
    groups = [{"params": [p]} | options for p, options in zip(params, filters, strict=True)]
    rows = make_grads(params, 20)
    truths = []
    for i, options in enumerate(filters):
        truth = torch.optim.AdamW(clone_params([params[i]]), lr=1e-2)
        train(truth, filtered([[row[i]] for row in rows], **options))
        truths += truth.param_groups[0]["params"]
    train(GrokFastAdamW(groups, lr=1e-2), rows)
    assert_close(params, truths)


def test_late_parameter_equals_one_that_starts_then() -> None:
    """It neither decays nor counts steps before its first gradient, and its mean starts there."""
    late, twin, early = one(1.0, 2.0), one(1.0, 2.0), one(3.0)
    optimizer, alone = GrokFastAdamW([early, late], lr=0.1), GrokFastAdamW([twin], lr=0.1)
    rows = [[torch.ones(1), None]] * 3 + make_grads([early, late], 3)
    train(optimizer, rows)
    train(alone, [row[1:] for row in rows[3:]])
    assert_same(snapshot(optimizer)[1], snapshot(alone)[0])


def test_missing_gradient_pauses_the_mean() -> None:
    param, other = one(1.0), one(1.0)
    optimizer = GrokFastAdamW([param, other])
    train(optimizer, [[torch.ones(1)] * 2, [None, torch.ones(1)]])
    assert optimizer.state[param]["grok_step"].item() == 1


# lamb = 0 and no filter


@pytest.mark.parametrize("options", [{"lamb": 0.0}, {"filter": None}], ids=["lamb0", "no_filter"])
def test_no_filter_allocates_no_filter_state(options: dict[str, Any]) -> None:
    param = one(1.0, 2.0)
    optimizer = GrokFastAdamW([param], **options)
    step_with(optimizer, torch.ones(2))
    assert optimizer.state[param].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("options", "on"),
    [({"lamb": 0.0}, {"lamb": 2.0}), ({"filter": None}, {"filter": "ema"})],
    ids=["lamb0", "no_filter"],
)
def test_filter_that_is_switched_on_starts_at_the_next_gradient(
    options: dict[str, Any], on: dict[str, Any]
) -> None:
    params = make_params(torch.float64)
    optimizer = GrokFastAdamW(params, lr=1e-2, **options)
    rows = make_grads(params, 12)
    truth = torch.optim.AdamW(clone_params(params), lr=1e-2)
    train(optimizer, rows[:5])
    optimizer.param_groups[0].update(on)
    train(optimizer, rows[5:])
    train(truth, rows[:5] + filtered(rows[5:]))
    assert_close(params, truth.param_groups[0]["params"])


def test_lamb_0_is_a_value_and_the_mean_goes_on() -> None:
    param = one(1.0, 2.0, dtype=torch.float64)
    optimizer = GrokFastAdamW([param])
    grads = [randn(2, seed=seed, dtype=torch.float64) for seed in range(6)]
    train(optimizer, [[grad] for grad in grads[:3]])
    optimizer.param_groups[0]["lamb"] = 0.0
    train(optimizer, [[grad] for grad in grads[3:]])
    assert_close([optimizer.state[param]["grok_exp_avg"]], [mean_of(grads)])


def test_lamb_set_to_0_passes_gradients_as_they_are() -> None:
    params = make_params(torch.float64)
    optimizer = GrokFastAdamW(params, lr=1e-2)
    rows = make_grads(params, 6)
    truth = torch.optim.AdamW(clone_params(params), lr=1e-2)
    train(optimizer, rows[:3])
    optimizer.param_groups[0]["lamb"] = 0.0
    train(optimizer, rows[3:])
    train(truth, filtered(rows[:3]) + rows[3:])
    assert_close(params, truth.param_groups[0]["params"])


# normalize_lr


def test_normalized_lr_is_divided_by_1_plus_lamb() -> None:
    params = make_params()
    twins = clone_params(params)
    rows = make_grads(params, 5)
    train(GrokFastAdamW(params, lr=3e-3, lamb=2.0, normalize_lr=True), rows)
    train(GrokFastAdamW(twins, lr=3e-3 / 3.0, lamb=2.0), rows)
    assert_same(params, twins)


def test_normalized_lr_follows_group_and_lamb() -> None:
    params = make_params()
    twins = clone_params(params)
    rows = make_grads(params, 4)
    optimizer = GrokFastAdamW(params, lr=3e-3, normalize_lr=True)
    other = GrokFastAdamW(twins, lr=3e-3 / 3.0)
    train(optimizer, rows[:2])
    train(other, rows[:2])
    optimizer.param_groups[0].update(lr=8e-3, lamb=4.0)
    other.param_groups[0].update(lr=8e-3 / 5.0, lamb=4.0)
    train(optimizer, rows[2:])
    train(other, rows[2:])
    assert_same(params, twins)


def test_group_shows_the_lr_that_was_given() -> None:
    param = one(1.0)
    optimizer = GrokFastAdamW([param], lr=3e-3, normalize_lr=True)
    step_with(optimizer, torch.ones(1))
    assert optimizer.param_groups[0]["lr"] == 3e-3


@pytest.mark.parametrize("filter", ["highpass", None])
def test_normalize_lr_is_for_the_ema_filter_only(filter: str | None) -> None:
    params = make_params()
    twins = clone_params(params)
    rows = make_grads(params, 2)
    train(GrokFastAdamW(params, filter=filter, normalize_lr=True), rows)
    train(GrokFastAdamW(twins, filter=filter), rows)
    assert_same(params, twins)


# The average of the weights


def test_weight_average_follows_its_formula() -> None:
    """e starts at the weights, then e = decay * e + (1 - decay) * param after each step."""
    param = Parameter(randn(5, 3, dtype=torch.float64))
    optimizer = GrokFastAdamW([param], lr=0.1, weight_ema=0.9)
    average = param.detach().clone()
    for row in make_grads([param], 20):
        train(optimizer, [row])
        average = 0.9 * average + 0.1 * param.detach()
    assert_close([optimizer.state[param]["weight_ema"]], [average])


def test_weight_average_starts_at_the_weights() -> None:
    param = one(1.0, 2.0)
    optimizer = GrokFastAdamW([param], weight_ema=0.9)
    assert_same(optimizer.state[param]["weight_ema"], param.detach())


@pytest.mark.parametrize(("decay", "copies"), [(0.0, "weights"), (1.0, "start")])
def test_weight_average_takes_0_and_1_as_values(decay: float, copies: str) -> None:
    param = one(1.0, 2.0)
    start = param.detach().clone()
    optimizer = GrokFastAdamW([param], lr=0.1, weight_ema=decay)
    step_with(optimizer, torch.ones(2))
    expected = param.detach() if copies == "weights" else start
    # The average goes through e + (1 - decay) * (param - e): two roundings of values below 4.
    assert_within(optimizer.state[param]["weight_ema"], expected, 4 * 2**-23, "average")


def test_weight_average_does_not_change_the_step() -> None:
    params = make_params()
    twins = clone_params(params)
    rows = make_grads(params, 3)
    train(GrokFastAdamW(params, weight_ema=0.9), rows)
    train(GrokFastAdamW(twins), rows)
    assert_same(params, twins)


def test_no_weight_average_allocates_nothing() -> None:
    param = one(1.0)
    optimizer = GrokFastAdamW([param], weight_ema=None)
    step_with(optimizer, torch.ones(1))
    assert "weight_ema" not in optimizer.state[param]


# Storage of the states


def dtypes_of(optimizer: GrokFastAdamW, param: Tensor) -> dict[str, torch.dtype]:
    return {name: optimizer.state[param][name].dtype for name in STATES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_are_float32_unless_asked(dtype: torch.dtype) -> None:
    param = one(1.0, 2.0, dtype=dtype)
    optimizer = GrokFastAdamW([param], weight_ema=0.9)
    step_with(optimizer, torch.ones(2, dtype=dtype))
    assert dtypes_of(optimizer, param) == dict.fromkeys(STATES, torch.float32)


def test_all_states_may_be_bfloat16() -> None:
    param = one(1.0, 2.0)
    optimizer = GrokFastAdamW([param], weight_ema=0.9, state_dtype=torch.bfloat16)
    step_with(optimizer, torch.ones(2))
    assert dtypes_of(optimizer, param) == dict.fromkeys(STATES, torch.bfloat16)


def test_some_states_may_be_bfloat16() -> None:
    param = one(1.0, 2.0)
    chosen = {"exp_avg": torch.bfloat16, "weight_ema": torch.bfloat16}
    optimizer = GrokFastAdamW([param], weight_ema=0.9, state_dtype=chosen)
    step_with(optimizer, torch.ones(2))
    assert dtypes_of(optimizer, param) == dict.fromkeys(STATES, torch.float32) | chosen


def test_states_of_float64_stay_float64() -> None:
    param = one(1.0, 2.0, dtype=torch.float64)
    optimizer = GrokFastAdamW([param], weight_ema=0.9, state_dtype=torch.bfloat16)
    step_with(optimizer, torch.ones(2, dtype=torch.float64))
    assert dtypes_of(optimizer, param) == dict.fromkeys(STATES, torch.float64)


@pytest.mark.parametrize(
    ("state_dtype", "named"),
    [
        (torch.float16, "torch.float16"),
        (torch.float64, "torch.float64"),
        ({"exp_avg": torch.int8}, "torch.int8"),
        ({"momentum": torch.bfloat16}, "momentum"),
        ({"step": torch.bfloat16}, "step"),
        ("bfloat16", "bfloat16"),
        (16, "16"),
    ],
    ids=str,
)
def test_bad_state_dtype_is_refused_by_name(state_dtype: Any, named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"state_dtype.*{re.escape(named)}"):
        GrokFastAdamW([one(1.0)], state_dtype=state_dtype)


def test_bfloat16_mean_drifts_where_rounding_to_nearest_would_stall() -> None:
    size, steps = 4096, 50
    grads = [torch.ones(size)] + [torch.full((size,), 1.1)] * (steps - 1)
    stalled = torch.tensor(1.0)
    for _ in grads[1:]:
        stalled = (0.98 * stalled + 0.02 * 1.1).bfloat16().float()
    assert stalled == 1.0, "each step moves the mean by less than half a unit, 2**-8"
    param = Parameter(torch.zeros(size))
    optimizer = GrokFastAdamW([param], state_dtype={"grok_exp_avg": torch.bfloat16})
    train(optimizer, [[grad] for grad in grads])
    # Each rounding is unbiased with a variance of at most (2**-7)**2 / 4, which later steps shrink
    # by 0.98**2 each: in sum below (2**-7)**2 / 4 / (1 - 0.98**2), divided by the number of
    # elements for their mean. Six standard deviations.
    bound = 6 * 2**-7 / 2 / (1 - 0.98**2) ** 0.5 / size**0.5
    mean = optimizer.state[param]["grok_exp_avg"].double().mean()
    assert_within(mean, mean_of([grad[0].double() for grad in grads]), bound, "mean of the means")


# Schedulers and GradScaler


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one_cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=12),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda t: 1 / (1 + t)),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=1),
}


def scheduled(optimizer: torch.optim.Optimizer, name: str, rows: Any) -> list[Any]:
    """One step and one step of the scheduler for each row; the rates and momenta on the way."""
    scheduler = SCHEDULERS[name](optimizer)
    seen = []
    for row in rows:
        train(optimizer, [row])
        scheduler.step(*([1.0] if name == "plateau" else []))
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduled_training_equals_torch(name: str) -> None:
    params = make_params(torch.float64)
    twins = clone_params(params)
    rows = make_grads(params, 10)
    scheduled(GrokFastAdamW(params, lr=0.05), name, rows)
    scheduled(torch.optim.AdamW(twins, lr=0.05), name, filtered(rows))
    assert_close(params, twins)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_sets_what_it_sets_in_torch(name: str) -> None:
    rows = [[torch.ones(1)]] * 10
    seen = scheduled(GrokFastAdamW([one(1.0)], lr=0.05), name, rows)
    assert seen == scheduled(torch.optim.AdamW([one(1.0)], lr=0.05), name, rows)
    assert len({lr for lr, _ in seen}) > 1, "the scheduler has changed the learning rate"


def test_one_cycle_moves_the_momentum() -> None:
    seen = scheduled(GrokFastAdamW([one(1.0)]), "one_cycle", [[torch.ones(1)]] * 10)
    assert len({betas[0] for _, betas in seen}) > 1


def scaled_step(optimizer: GrokFastAdamW, scaler: torch.amp.GradScaler, factor: float) -> None:
    optimizer.zero_grad()
    for param in optimizer.param_groups[0]["params"]:
        scaler.scale((param * factor).sum()).backward()
    scaler.step(optimizer)
    scaler.update()


def test_filter_sees_gradients_without_their_scale() -> None:
    param = one(1.0, 2.0)
    optimizer = GrokFastAdamW([param])
    scaled_step(optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**10), 3.0)
    assert_same(optimizer.state[param]["grok_exp_avg"], torch.full((2,), 3.0))


@pytest.mark.parametrize("overflow", [0, 1], ids=["first_step", "later_step"])
def test_overflow_does_not_enter_the_mean(overflow: int) -> None:
    param = one(1.0, 2.0)
    optimizer = GrokFastAdamW([param], weight_ema=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(3):
        scaled_step(optimizer, scaler, inf if t == overflow else 3.0)
    state = optimizer.state[param]
    # mean = 0.98 * 3 + 0.02 * 3, in three roundings.
    assert_within(state["grok_exp_avg"], torch.full((2,), 3.0), 3 * 3 * 2**-24, "mean")
    assert state["grok_step"].item() == 2
