"""The filters of adaptive_step_ that look at a whole tensor or at the last w gradients."""

import math
from collections import deque

import pytest
import torch
from torch import Tensor

from trm_fast.ops import Settings
from trm_fast.ops._adaptive_filters import REDUCING

from .adaptive_checks import (
    NEW,
    WINDOW,
    assert_right,
    assert_same_bits,
    assert_step,
    bits,
    copies,
    fitted,
    item_for,
    kept_step,
    make,
    new_grad,
    run,
    settings_with,
)
from .adaptive_truth import Item, truth

# A ring is summed anew by chunks of 1024.
SIZES = ((), (0,), (1,), (1023,), (1024,), (1025,), (3, 5, 7), (3000,))


def only_filter(shape: tuple[int, ...], dtype: torch.dtype, window: int | None, **options) -> Item:
    """What rule "filter" needs, at the start of a training."""
    item = make(
        shape, dtype, states=dtype, step=0.0, grok_step=0.0, window=window, ring=dtype, **options
    )
    return fitted(item, Settings(0.0, rule="filter", filter="ma" if window else "ema"))


# The published forms, written again, one gradient after the other.


def last_gradients(grads: list[Tensor], window: int, lamb: float, warmup: bool) -> list[Tensor]:
    kept: deque[Tensor] = deque(maxlen=window)
    found = []
    for g in grads:
        kept.append(g)
        amplified = not warmup or len(kept) == window
        found.append(g + lamb * sum(kept) / len(kept) if amplified else g)
    return found


def projected(grads: list[Tensor], alpha: float, lamb: float, eps: float) -> list[Tensor]:
    mean, found = grads[0], []
    for g in grads:
        mean = alpha * mean + (1 - alpha) * g
        square = torch.dot(mean, mean)
        found.append(g + lamb * torch.dot(g, mean) / square * mean if square > eps else g)
    return found


def gated(grads: list[Tensor], alpha: float, lamb: float) -> list[Tensor]:
    mean, found = grads[0], []
    for g in grads:
        mean = alpha * mean + (1 - alpha) * g
        cosine = torch.dot(g, mean) / (torch.linalg.norm(g) * torch.linalg.norm(mean))
        found.append(lamb * g if cosine > 0.5 else g / lamb)
    return found


def drawn_gradients(steps: int, size: int = 40) -> list[Tensor]:
    """Half signal, half noise, so that the gate opens and closes."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(size, generator=generator, dtype=torch.float64)
    noise = torch.randn(steps, size, generator=generator, dtype=torch.float64)
    return [0.5 * signal + n for n in noise]


def filtered(item: Item, settings: Settings, grads: list[Tensor]) -> list[Tensor]:
    found = []
    for g in grads:
        item["grad"] = g.clone()
        run([item], settings, "reference")
        found.append(item["param"].clone())
    return found


# 200 sums of at most w terms below 10 in float64.
BOUND = 200 * 100 * 10 * 2.0**-53


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    worst = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    assert worst < BOUND


@pytest.mark.parametrize(("window", "warmup"), [(1, False), (7, True), (40, False)])
def test_200_steps_of_ma_are_the_published_ones(window, warmup):
    grads = drawn_gradients(200)
    settings = Settings(0.0, rule="filter", filter="ma", lamb=5.0, warmup=warmup)
    found = filtered(only_filter((40,), torch.float64, window), settings, grads)
    assert_close(found, last_gradients(grads, window, 5.0, warmup))


def test_200_steps_of_projection_are_the_published_ones():
    grads = drawn_gradients(200)
    settings = Settings(0.0, rule="filter", filter="projection", lamb=2.0, alpha=0.9)
    found = filtered(only_filter((40,), torch.float64, None), settings, grads)
    assert_close(found, projected(grads, 0.9, 2.0, 1e-10))


def test_200_steps_of_cosine_gate_are_the_published_ones():
    grads = drawn_gradients(200)
    settings = Settings(0.0, rule="filter", filter="cosine_gate", lamb=3.0, alpha=0.9)
    found = filtered(only_filter((40,), torch.float64, None), settings, grads)
    expected = gated(grads, 0.9, 3.0)
    opened = [bool((e.abs() > g.abs()).all()) for e, g in zip(expected, grads, strict=True)]
    assert 20 < sum(opened) < 180
    assert_close(found, expected)


@pytest.mark.parametrize(("storage", "steps"), [(torch.float32, 2), (torch.bfloat16, 1)])
@pytest.mark.parametrize("filter_", NEW)
def test_the_first_steps_are_the_formula_in_every_size(backend, device, filter_, storage, steps):
    items = [
        item_for(filter_, shape, param=storage, states=storage, ring=storage, seed=i, step=0.0,
                 grok_step=0.0, device=device)
        for i, shape in enumerate(SIZES)
    ]  # fmt: skip
    for seed in range(steps):
        for item in items:
            new_grad(item, seed)
        assert_step(items, settings_with(filter_), backend)
    assert all(item["grok_step"] == item["step"] for item in items)


@pytest.mark.parametrize("ring", [torch.float32, torch.bfloat16])
def test_each_step_of_a_ring_is_the_formula(backend, device, ring):
    """Through all turns of the ring, and of each chunk."""
    item = item_for("ma", (1100,), ring=ring, step=0.0, grok_step=0.0, device=device)
    for seed in range(4 * WINDOW + 3):
        new_grad(item, seed)
        assert_step([item], settings_with("ma"), backend)


@pytest.mark.parametrize("rule", ["adam", "atan2", "sgd", "momentum", "filter"])
@pytest.mark.parametrize("filter_", NEW)
def test_every_rule_takes_the_filtered_gradient(backend, device, filter_, rule):
    settings = settings_with(filter_, rule=rule, nesterov=True)
    items = [fitted(item_for(filter_, (n,), device=device), settings) for n in (40, 1500)]
    assert_step(items, settings, backend)


@pytest.mark.parametrize("filter_", NEW)
def test_tensors_are_filtered_each_by_itself(backend, device, filter_):
    items = [item_for(filter_, (n,), seed=n, device=device) for n in (700, 5000, 1025)]
    items[1]["grad"] *= 100
    single = [copies(item) for item in items]
    run(items, settings_with(filter_), backend)
    for item in single:
        run([item], settings_with(filter_), backend)
    for one, other in zip(items, single, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("filter_", NEW)
def test_tensors_at_different_steps_use_their_own_counters(backend, device, filter_):
    counts = ((0, 0), (1, 1), (3, 0), (100, 4), (7, 7))
    items = [
        item_for(filter_, (40,), seed=i, step=float(t), grok_step=float(k), device=device)
        for i, (t, k) in enumerate(counts)
    ]
    assert_step(items, settings_with(filter_), backend)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("clip", [None, 0.25])
@pytest.mark.parametrize("filter_", NEW)
def test_sums_are_of_gradients_before_scale_clip_and_sign(backend, device, filter_, clip, maximize):
    item = item_for(filter_, (1500,), device=device)
    item["grad"] *= 1024
    scalars = {"grad_scale": torch.tensor(1000.0, device=device), "maximize": maximize}
    if clip:
        scalars["clip"] = torch.tensor(clip, device=device)
    assert_step([item], settings_with(filter_, **scalars), backend)


@pytest.mark.parametrize("filter_", NEW)
@pytest.mark.parametrize("name", ["lr", "weight_decay", "lamb"])
def test_a_scalar_may_be_a_tensor(backend, device, name, filter_):
    value = torch.tensor(0.5, device=device)
    assert_step(
        [item_for(filter_, device=device)], settings_with(filter_, **{name: value}), backend
    )


@pytest.mark.parametrize("ring", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filter_", NEW)
def test_found_inf_leaves_everything_bitwise_alone(backend, device, filter_, ring):
    items = [item_for(filter_, (n,), ring=ring, seed=n, device=device) for n in (1, 1500)]
    items[1]["grad"].fill_(math.inf)
    before = [copies(item) for item in items]
    settings = settings_with(filter_, found_inf=torch.ones((), device=device))
    run(items, settings, backend)
    for old, new in zip(before, items, strict=True):
        assert_same_bits(new, old)


@pytest.mark.parametrize("filter_", REDUCING)
def test_threads_do_not_change_a_bit(backend, device, filter_):
    """Shares of 8 blocks of at most 2048: this is more than one of them, with a rest."""
    item, results, before = make((20_001,), device=device), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(copies(item))
            run([results[-1]], settings_with(filter_), backend)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


# Permuted parameters, whose states lie as they do, and one with gaps, whose states are contiguous.


def turned(item: Item) -> Item:
    """The same numbers with the memory of the two dimensions exchanged."""
    return {
        name: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t.clone()
        for name, t in item.items()
    }


def gapped(item: Item) -> Item:
    item = copies(item)
    return item | {"param": torch.stack((item["param"], item["param"]), -1)[..., 0]}


@pytest.mark.parametrize("layout", [turned, gapped])
@pytest.mark.parametrize("filter_", NEW)
def test_other_orders_of_memory_are_right(backend, device, filter_, layout):
    item = layout(item_for(filter_, (40, 60), device=device))
    assert not item["param"].is_contiguous()
    for _ in range(2):
        assert_step([item], settings_with(filter_), backend)


@pytest.mark.parametrize("turns", ["grad", "all but grad"])
@pytest.mark.parametrize("filter_", NEW)
def test_a_gradient_in_another_order_than_its_mean_is_right(backend, device, filter_, turns):
    item = item_for(filter_, (40, 60), device=device)
    other = turned(item)
    mixed = item | {"grad": other["grad"]} if turns == "grad" else other | {"grad": item["grad"]}
    assert_step([mixed], settings_with(filter_), backend)


@pytest.mark.parametrize("start", [1, 2, 3])
@pytest.mark.parametrize("ring", [torch.float32, torch.bfloat16])
def test_a_misaligned_ring_leaves_its_neighbours(backend, device, ring, start):
    item = item_for("ma", (1029,), ring=ring, device=device)
    memory = torch.full((WINDOW * 1029 + 9,), -77.0, dtype=ring, device=device)
    view = memory[start:].as_strided((WINDOW, 1029), (1029, 1), start)
    item["grok_ring"] = view.copy_(item["grok_ring"])
    assert_step([item], settings_with("ma"), backend)
    assert (memory[:start] == -77).all() and (memory[start + WINDOW * 1029 :] == -77).all()


# "projection" and "cosine_gate".


@pytest.mark.parametrize(("eps", "pulled"), [(3.9, True), (4.1, False)])
def test_projection_leaves_a_short_mean_alone(backend, device, eps, pulled):
    """mu becomes (1, 1, 1, 1), so its square is 4."""
    settings = Settings(0.0, rule="filter", filter="projection", lamb=2.0, proj_eps=eps)
    item = fitted(make((4,), grok_step=0.0, device=device), settings)
    item["grad"].fill_(1.0)
    run([item], settings, backend)
    assert item["param"].tolist() == [3.0 if pulled else 1.0] * 4


def test_projection_is_on_the_mean_of_this_step(backend, device):
    """g = (1, 0), mu = (1, 1): g.mu / ||mu||^2 is 1/2."""
    settings = Settings(0.0, rule="filter", filter="projection", lamb=2.0, alpha=0.5)
    item = fitted(make((2,), device=device), settings)
    item["grad"].copy_(torch.tensor([1.0, 0.0]))
    item["grok_exp_avg"].copy_(torch.tensor([1.0, 2.0]))
    run([item], settings, backend)
    assert item["param"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize(("second", "factor"), [(1.7, 4.0), (1.8, 0.25), (-1.7, 4.0)])
def test_the_gate_opens_where_the_angle_is_below_60_degrees(backend, device, second, factor):
    """g = (1, second) and mu = (1, 0), whose angle has the tangent ``second``; that of 60 degrees
    is 1.732."""
    settings = Settings(0.0, rule="filter", filter="cosine_gate", lamb=4.0, alpha=1.0)
    item = fitted(make((2,), device=device), settings)
    item["grad"].copy_(torch.tensor([1.0, second]))
    item["grok_exp_avg"].copy_(torch.tensor([1.0, 0.0]))
    run([item], settings, backend)
    assert item["param"].tolist() == (factor * item["grad"]).tolist()


def test_the_gate_stays_shut_for_zero_gradients(backend, device):
    settings = Settings(0.0, rule="filter", filter="cosine_gate", lamb=4.0)
    item = fitted(make((5,), device=device), settings)
    item["grad"].zero_()
    run([item], settings, backend)
    assert item["param"].tolist() == [0.0] * 5


@pytest.mark.parametrize("filter_", REDUCING)
def test_a_first_filtered_step_seeds_the_mean_whatever_it_held(backend, device, filter_):
    item = make((40,), grok_step=0.0, device=device)
    item["grok_exp_avg"].fill_(math.nan)
    run([item], settings_with(filter_), backend)
    assert bits(item["grok_exp_avg"]) == bits(item["grad"])


@pytest.mark.parametrize("filter_", REDUCING)
def test_sums_that_were_measured_are_used_as_they_are(backend, device, filter_):
    """A sharded tensor takes the sums of all its parts from whoever has added them up."""
    whole = make((900,), device=device)
    item = {k: t[:300].clone() if t.dim() else t.clone() for k, t in whole.items()}
    step = kept_step(item, backend)
    sums = step.measure([item["grad"]])
    # The gradients and means of the two other parts.
    for part in (slice(300, 600), slice(600, 900)):
        g, mu = (whole[name][part].double() for name in ("grad", "grok_exp_avg"))
        sums += torch.stack([(g * mu).sum(), (g * g).sum(), (mu * mu).sum()])
    with torch.no_grad():
        step([item["grad"]], settings_with(filter_))
    before = copies(whole)
    run([whole], settings_with(filter_), backend)
    assert_right(before, whole, settings_with(filter_))
    # Sums in another order: at most 45 roundings each, of which the update shrinks the effect.
    assert torch.allclose(item["param"], whole["param"][:300], rtol=0, atol=45 * 2.0**-24)


@pytest.mark.parametrize("filter_", NEW)
def test_steps_repeat_bit_for_bit(backend, device, filter_):
    results = []
    for _ in range(2):
        item = item_for(filter_, (1500,), ring=torch.bfloat16, device=device)
        for seed in range(3):
            new_grad(item, seed)
            run([item], settings_with(filter_), backend)
        results.append(item)
    assert_same_bits(*results)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("filter_", NEW)
def test_a_gradient_that_is_not_finite_is_not_hidden(backend, device, filter_, value):
    item = item_for(filter_, (40,), device=device)
    item["grad"][5] = value
    expected = truth(item, settings_with(filter_))
    run([item], settings_with(filter_), backend)
    for name in ("param", "exp_avg", "grok_exp_avg"):
        assert torch.equal(item[name].isfinite(), expected[name].isfinite()), name
