"""Every gradient filter inside every optimizer, and what may change between two steps.

The truth is the published filter, in float64, in front of torch's own optimizer.
"""

from typing import Any

import pytest
import torch

from trm_fast.optim import AdamATan2, GrokFastAdamW, GrokFastSGD

from .filter_checks import (
    FAMILIES,
    FILTERS,
    Family,
    Filter,
    assert_close,
    each_family,
    each_filter,
    few_params,
    filtered,
    in_other_order,
)
from .torch_checks import (
    Options,
    assert_same,
    clone_params,
    make_grads,
    one,
    randn,
    set_grads,
    snapshot,
    step_with,
    train,
)

MEANS = ("ema", "highpass", "projection", "cosine_gate")
STATES = {
    "ma": {"grok_sum", "grok_step", "grok_ring"},
    **{name: {"grok_exp_avg", "grok_step"} for name in MEANS},
}


def keys_of(optimizer: torch.optim.Optimizer) -> set[str]:
    (state,) = optimizer.state.values()
    return {key for key in state if key.startswith("grok")}


# The formula


@each_family
@each_filter
def test_200_steps_equal_the_filter_in_front_of_the_optimizer(
    family: Family, options: Options
) -> None:
    params = few_params()
    rows = [list(map(in_other_order, row)) for row in make_grads(params, 200)]
    truth = family.truth(clone_params(params), **family.options)
    train(truth, filtered(rows, **options))
    train(family.ours(params, **options, **family.options), rows)
    assert_close(params, truth.param_groups[0]["params"])


@each_family
@each_filter
def test_after_step_withholds_the_filter(family: Family, options: Options) -> None:
    options = options | {"after_step": 4, "window": 2}
    params = few_params()
    rows = make_grads(params, 12)
    truth = family.truth(clone_params(params), **family.options)
    train(truth, filtered(rows, **options))
    train(family.ours(params, **options, **family.options), rows)
    assert_close(params, truth.param_groups[0]["params"])


@each_family
def test_groups_have_their_own_filters(family: Family) -> None:
    """Of each group its own alpha, lamb and kind, in one step."""
    params = [torch.nn.Parameter(randn(5, 3, seed=seed, dtype=torch.float64)) for seed in range(6)]
    wanted = [*FILTERS.values(), {"filter": None}]
    rows = make_grads(params, 10)
    truths = []
    for index, options in enumerate(wanted):
        truth = family.truth(clone_params([params[index]]), **family.options)
        train(truth, filtered([[row[index]] for row in rows], **options))
        truths += truth.param_groups[0]["params"]
    groups = [{"params": [p]} | options for p, options in zip(params, wanted, strict=True)]
    train(family.ours(groups, **family.options), rows)
    assert_close(params, truths)


@each_family
def test_missing_gradients_pause_the_filter(family: Family) -> None:
    """Of one parameter, without a trace; the other goes on."""
    params = few_params()[:2]
    rows: Any = make_grads(params, 10)
    for t in (0, 1, 5):
        rows[t][1] = None
    truth = family.truth(clone_params(params), **family.options)
    train(truth, filtered(rows, filter="ma", window=3))
    train(family.ours(params, filter="ma", window=3, **family.options), rows)
    assert_close(params, truth.param_groups[0]["params"])


@pytest.mark.parametrize("filter", ["projection", "cosine_gate"])
def test_filters_with_a_direction_take_each_tensor_for_itself(filter: str) -> None:
    """Two parameters in one step equal two optimizers."""
    params = few_params()[:2]
    apart = clone_params(params)
    rows = make_grads(params, 5)
    train(GrokFastSGD(params, filter=filter), rows)
    for index, param in enumerate(apart):
        train(GrokFastSGD([param], filter=filter), [[row[index]] for row in rows])
    assert_same(params, apart)


def test_projection_leaves_a_gradient_alone_below_proj_eps() -> None:
    param = one(1.0, 2.0, dtype=torch.float64)
    grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for proj_eps, gain in ((25.0, 1.0), (24.9, 3.0)):
        before = param.detach().clone()
        optimizer = GrokFastSGD([param], lr=0.5, filter="projection", proj_eps=proj_eps)
        step_with(optimizer, grad)
        assert_close([before - param.detach()], [0.5 * gain * grad])


@pytest.mark.parametrize(("second", "gain"), [(1.0, 4.0), (-1.0, 0.25), (0.0, 0.25)])
def test_gate_divides_what_is_not_aligned(second: float, gain: float) -> None:
    """A zero gradient has no direction and counts as not aligned; its product is zero anyway."""
    param = one(1.0, dtype=torch.float64)
    optimizer = GrokFastSGD([param], lr=0.5, filter="cosine_gate", lamb=4.0)
    step_with(optimizer, torch.ones(1, dtype=torch.float64))
    before = param.detach().clone()
    step_with(optimizer, torch.full((1,), second, dtype=torch.float64))
    assert_close([before - param.detach()], [torch.tensor([0.5 * gain * second]).double()])


# lamb


@each_family
@each_filter
def test_lamb_may_change_before_each_step(family: Family, options: Options) -> None:
    """0 is a value: the state goes on while it is (the gate has no 0)."""
    lambs = [2.0, 0.0, 0.0, 0.5, 3.0, 0.0, 1.0, 1.0]
    if options["filter"] == "cosine_gate":
        lambs = [lamb or 0.25 for lamb in lambs]
    params = few_params()
    truth = family.truth(clone_params(params), **family.options)
    optimizer = family.ours(params, **family.options, **options | {"window": 3})
    filters = [Filter(**options | {"window": 3}) for _ in params]
    for row, lamb in zip(make_grads(params, len(lambs)), lambs, strict=True):
        optimizer.param_groups[0]["lamb"] = lamb
        for f in filters:
            f.lamb = lamb
        train(optimizer, [row])
        train(truth, [[f(grad) for f, grad in zip(filters, row, strict=True)]])
    assert_close(params, truth.param_groups[0]["params"])


@each_family
@pytest.mark.parametrize("filter", [name for name in STATES if name != "cosine_gate"])
def test_lamb_that_was_always_0_has_no_state(family: Family, filter: str) -> None:
    param = one(1.0, 2.0)
    optimizer = family.ours([param], filter=filter, lamb=0.0)
    step_with(optimizer, torch.ones(2))
    assert keys_of(optimizer) == set()
    optimizer.param_groups[0]["lamb"] = 1.0
    step_with(optimizer, torch.ones(2))
    assert keys_of(optimizer) == STATES[filter]


@each_family
@pytest.mark.parametrize("filter", [name for name in STATES if name != "cosine_gate"])
def test_filter_starts_when_lamb_is_switched_on(family: Family, filter: str) -> None:
    options: Options = {"filter": filter, "window": 3}
    params = few_params()
    rows = make_grads(params, 12)
    optimizer = family.ours(params, lamb=0.0, **options, **family.options)
    truth = family.truth(clone_params(params), **family.options)
    train(optimizer, rows[:5])
    optimizer.param_groups[0]["lamb"] = 2.0
    train(optimizer, rows[5:])
    train(truth, rows[:5] + filtered(rows[5:], **options))
    assert_close(params, truth.param_groups[0]["params"])


@each_family
@each_filter
def test_lamb_may_be_a_tensor(family: Family, options: Options) -> None:
    """Of one element, which is read at each step; 0.25 is the same in any dtype."""
    params = few_params(torch.float32)
    twins = clone_params(params)
    lamb = torch.tensor([0.5])
    ours = family.ours(params, **options | {"lamb": lamb, "window": 2})
    plain = family.ours(twins, **options | {"lamb": 0.5, "window": 2})
    rows = make_grads(params, 6)
    train(ours, rows[:3])
    train(plain, rows[:3])
    lamb.fill_(0.25)
    plain.param_groups[0]["lamb"] = 0.25
    train(ours, rows[3:])
    train(plain, rows[3:])
    assert_same(params, twins)


@each_family
@pytest.mark.parametrize("lamb", [0.0, -1.0])
def test_gate_refuses_a_lamb_it_cannot_divide_by(family: Family, lamb: float) -> None:
    optimizer = family.ours([one(1.0)], filter="cosine_gate")
    step_with(optimizer, torch.ones(1))
    before = snapshot(optimizer)
    optimizer.param_groups[0]["lamb"] = lamb
    with pytest.raises(ValueError, match=rf"^{family.ours.__name__}: lamb must be"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


# Another filter between two steps


def changed(
    family: Family, before: Options, between: Options, after: Options
) -> tuple[Any, Any, list[Any]]:
    """An optimizer after 5 steps with each of three options, the parameters and its gradients."""
    params = few_params()
    start = clone_params(params)
    rows = make_grads(params, 15)
    optimizer = family.ours(params, **{"window": 3} | before, **family.options)
    train(optimizer, rows[:5])
    optimizer.param_groups[0].update(between)
    train(optimizer, rows[5:10])
    optimizer.param_groups[0].update(after)
    train(optimizer, rows[10:])
    return params, start, rows


@each_family
@pytest.mark.parametrize("first", MEANS)
@pytest.mark.parametrize("second", MEANS)
def test_filters_with_a_mean_take_it_over(family: Family, first: str, second: str) -> None:
    params, start, rows = changed(family, {"filter": first}, {"filter": second}, {"filter": first})
    filters = [Filter(first) for _ in start]
    out = []
    for t, row in enumerate(rows):
        for f in filters:
            f.filter = second if 5 <= t < 10 else first
        out.append([f(grad) for f, grad in zip(filters, row, strict=True)])
    truth = family.truth(start, **family.options)
    train(truth, out)
    assert_close(params, start)


@each_family
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("window_first", [False, True], ids=["mean_first", "window_first"])
def test_window_and_mean_start_anew_after_each_other(
    family: Family, mean: str, window_first: bool
) -> None:
    """One does not hold what the other needs, and what an earlier turn has left would be stale."""
    one, other = ("ma", mean) if window_first else (mean, "ma")
    params, start, rows = changed(family, {"filter": one}, {"filter": other}, {"filter": one})
    first, second, third = (
        filtered(part, filter=filter, window=3)
        for part, filter in ((rows[:5], one), (rows[5:10], other), (rows[10:], one))
    )
    train(family.truth(start, **family.options), first + second + third)
    assert_close(params, start)


@each_family
@pytest.mark.parametrize(("first", "second"), [("ema", "ma"), ("ma", "ema")])
def test_state_of_the_other_kind_is_given_back(family: Family, first: str, second: str) -> None:
    param = torch.nn.Parameter(randn(3))
    optimizer = family.ours([param], filter=first)
    step_with(optimizer, torch.ones(3))
    optimizer.param_groups[0]["filter"] = second
    step_with(optimizer, torch.ones(3))
    assert keys_of(optimizer) == STATES[second]


@each_family
@pytest.mark.parametrize(("first", "second"), [("ema", "ma"), ("ma", "ema")])
def test_kind_may_change_while_lamb_is_0(family: Family, first: str, second: str) -> None:
    """The other filter starts when lamb is back."""
    params, start, rows = changed(
        family, {"filter": first}, {"filter": second, "lamb": 0.0}, {"lamb": 2.0}
    )
    before = filtered(rows[:5], filter=first, window=3)
    after = filtered(rows[10:], filter=second, window=3)
    train(family.truth(start, **family.options), before + rows[5:10] + after)
    assert_close(params, start)


@each_family
@each_filter
def test_no_filter_for_a_while_pauses_it(family: Family, options: Options) -> None:
    params, start, rows = changed(
        family, options | {"window": 3}, {"filter": None}, {"filter": options["filter"]}
    )
    seen = filtered(rows[:5] + rows[10:], **options | {"window": 3})
    train(family.truth(start, **family.options), seen[:5] + rows[5:10] + seen[5:])
    assert_close(params, start)


# Another window between two steps


@each_family
@pytest.mark.parametrize("lamb", [2.0, 0.0])
def test_other_window_is_refused_and_nothing_moves(family: Family, lamb: float) -> None:
    params = few_params(torch.float32)
    optimizer = family.ours(params, filter="ma", window=4)
    rows = make_grads(params, 3)
    train(optimizer, rows[:2])
    optimizer.param_groups[0].update(window=3, lamb=lamb)
    set_grads(params, rows[2])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"^{family.ours.__name__}: window must be 4, .* got 3"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    optimizer.param_groups[0].update(window=4, lamb=2.0)
    optimizer.step()


@each_family
def test_other_window_starts_anew_without_its_ring(family: Family) -> None:
    """What the message says is what helps."""
    params = few_params()
    start = clone_params(params)
    rows = make_grads(params, 12)
    optimizer = family.ours(params, filter="ma", window=4, **family.options)
    train(optimizer, rows[:6])
    optimizer.param_groups[0]["window"] = 3
    for state in optimizer.state.values():
        del state["grok_ring"]
    train(optimizer, rows[6:])
    parts = filtered(rows[:6], filter="ma", window=4) + filtered(rows[6:], filter="ma", window=3)
    train(family.truth(start, **family.options), parts)
    assert_close(params, start)


BAD: list[tuple[str, Any]] = [
    ("window", 0), ("window", -3), ("window", 2.5), ("window", True), ("window", None),
    ("proj_eps", -1.0), ("proj_eps", float("nan")), ("proj_eps", "x"), ("filter", "mean"),
    ("alpha", 1.5), ("lamb", -1.0), ("after_step", -1), ("weight_ema", 2.0),
]  # fmt: skip


@each_family
@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_bad_filter_option_is_refused_by_name(family: Family, name: str, value: Any) -> None:
    refused = pytest.raises((ValueError, TypeError), match=rf"^{family.ours.__name__}: {name}")
    with refused:
        family.ours([one(1.0)], **{"filter": "ema", name: value})
    optimizer = family.ours([one(1.0)], filter="ema")
    step_with(optimizer, torch.ones(1))
    before = snapshot(optimizer)
    optimizer.param_groups[0][name] = value
    with refused:
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_default_filters_are_those_that_the_pages_name() -> None:
    kinds = (GrokFastAdamW, GrokFastSGD, AdamATan2)
    assert [kind([one(1.0)]).defaults["filter"] for kind in kinds] == ["ema", "ema", None]
    assert {family.ours for family in FAMILIES.values()} == set(kinds)
