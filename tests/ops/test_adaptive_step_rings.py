"""The filter "ma" of adaptive_step_, which keeps the last w gradients in a ring."""

import math

import numpy as np
import pytest
import torch

from trm_fast.ops import Settings

from .adaptive_checks import (
    assert_same_bits,
    assert_step,
    bits,
    copies,
    fitted,
    make,
    new_grad,
    run,
    settings_with,
    without,
)
from .adaptive_truth import Item, is_due


def sum_of_ring(item: Item) -> np.ndarray:
    """From the oldest to the newest gradient in float32, as chunks are summed anew."""
    ring, k = item["grok_ring"].cpu().float().numpy(), int(item["grok_step"])
    total = np.zeros(ring.shape[1:], np.float32)
    for age in range(min(k, len(ring)), 0, -1):
        total = total + ring[(k - age) % len(ring)]
    return total


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("ring", [torch.float32, torch.bfloat16])
def test_a_chunk_whose_turn_it_is_holds_the_sum_of_its_ring(backend, device, ring, window):
    item = make(
        (3000,), step=0.0, grok_step=0.0, window=window, ring=ring, device=device
    )  # fmt: skip
    turns = torch.zeros(3000, dtype=torch.int64)
    for seed in range(8):
        new_grad(item, seed)
        due = is_due(item).cpu()
        run([item], settings_with("ma"), backend)
        exact = torch.from_numpy(sum_of_ring(item))
        assert bits(item["grok_exp_avg"].cpu()[due]) == bits(exact[due])
        turns += due
    assert turns.min() >= 8 // (2 * window) and turns.max() <= 4


def test_the_sum_of_a_bfloat16_ring_is_that_of_the_numbers_in_it(backend, device):
    item = make(
        (3000,), step=0.0, grok_step=0.0, window=4, ring=torch.bfloat16, device=device
    )  # fmt: skip
    for seed in range(11):
        new_grad(item, seed)
        run([item], settings_with("ma"), backend)
    # At most 2 roundings a step since its turn, at most 2 w steps ago, of sums below 4 * 5.
    assert item["grad"].abs().max() < 5
    bound = 2 * 8 * 20 * 2.0**-24
    exact = item["grok_ring"].double().sum(0)
    assert (item["grok_exp_avg"].double() - exact).abs().max() < bound


def test_the_sum_does_not_drift(backend, device):
    """Gradients that alternate between large and small lose bits of a running sum each time."""
    item = make((2100,), step=0.0, grok_step=0.0, window=4, device=device)
    grads = []
    for seed in range(25):
        new_grad(item, seed)
        item["grad"] *= 1e4 if seed % 2 else 1e-4
        grads.append(item["grad"].double())
        run([item], settings_with("ma"), backend)
    exact = torch.stack(grads[-4:]).sum(0)
    # 2 roundings a step of what is in the sum, at most 2 w steps after its turn.
    bound = 2 * 8 * 2.0**-24 * 4 * torch.stack(grads).abs().max()
    assert ((item["grok_exp_avg"].double() - exact).abs() <= bound).all()


def test_an_infinite_gradient_is_gone_after_a_window(backend, device):
    item = fitted(
        make((2100,), step=0.0, grok_step=0.0, window=3, device=device),
        Settings(0.0, rule="filter", filter="ma"),
    )
    settings = Settings(0.0, rule="filter", filter="ma", lamb=5.0, warmup=False)
    for seed in range(3):
        new_grad(item, seed)
        if seed == 0:
            item["grad"][::7] = math.inf
        run([item], settings, backend)
        assert not item["grok_exp_avg"][::7].isfinite().any()
    for seed in range(3, 9):
        new_grad(item, seed)
        run([item], settings, backend)
        assert item["grok_ring"].isfinite().all()
    # Each chunk had its turn in these six steps.
    assert item["grok_exp_avg"].isfinite().all() and item["param"].isfinite().all()
    new_grad(item, 9)
    assert_step([item], settings, backend)


def test_warmup_gives_the_gradient_until_the_window_is_full(backend, device):
    settings = Settings(0.0, rule="filter", filter="ma", lamb=5.0, warmup=True)
    item = fitted(make((40,), step=0.0, grok_step=0.0, window=3, device=device), settings)
    for seed in range(5):
        new_grad(item, seed)
        assert_step([item], settings, backend)
        assert (bits(item["param"]) == bits(item["grad"])) == (seed < 2)


def test_after_step_withholds_amplification_but_not_memory(backend, device):
    settings = Settings(0.0, rule="filter", filter="ma", lamb=5.0, warmup=False, after_step=2)
    item = fitted(make((40,), step=0.0, grok_step=0.0, window=3, device=device), settings)
    for seed in range(5):
        new_grad(item, seed)
        assert_step([item], settings, backend)
        assert item["grok_step"] == seed + 1
        assert (bits(item["param"]) == bits(item["grad"])) == (seed < 2)


def test_a_withheld_sum_may_be_infinite(backend, device):
    settings = Settings(0.0, rule="filter", filter="ma", lamb=5.0, after_step=100)
    item = fitted(make((40,), window=3, device=device), settings)
    item["grok_exp_avg"].fill_(math.inf)
    run([item], settings, backend)
    assert bits(item["param"]) == bits(item["grad"])


@pytest.mark.parametrize("window", [3, 4])
def test_late_steps_find_their_slot(backend, device, window):
    count = 2.0**24 - 2
    item = make((1030,), step=count, grok_step=count, window=window, device=device)
    assert_step([item], settings_with("ma"), backend)
    assert item["grok_step"] == count + 1


def test_ma_without_a_ring_state_leaves_the_gradient_alone(backend, device):
    item = without(make((40,), device=device), "grok_exp_avg", "grok_step")
    plain = copies(item)
    run([item], settings_with("ma"), backend)
    run([plain], settings_with("none"), backend)
    assert_same_bits(item, plain)


@pytest.mark.parametrize("filter_", ["none", "ma"])
def test_a_ring_may_rest(backend, device, filter_):
    item = make((40,), window=3, device=device)
    before = copies(item)
    run([item], settings_with(filter_), backend)
    same = [name for name in ("grok_ring", "grok_exp_avg", "grok_step")
            if bits(item[name]) == bits(before[name])]  # fmt: skip
    assert len(same) == (3 if filter_ == "none" else 0)


def test_the_version_of_a_ring_rises(backend, device):
    item = make((40,), window=3, device=device)
    before = item["grok_ring"]._version
    run([item], settings_with("ma"), backend)
    assert item["grok_ring"]._version > before
