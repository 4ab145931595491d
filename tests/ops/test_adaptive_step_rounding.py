"""How adaptive_step_ rounds bfloat16 states: by the bits of its page, without bias."""

import math

import numpy as np
import pytest
import torch

from trm_fast.ops import Settings

from .adaptive_checks import assert_same_bits, bits, copies, make, run, without
from .adaptive_truth import STATES, Item

# With these, m = g, v = fl(g * g), mu = g and e = param exactly, before they are rounded.
EXACT = {"lr": 0.0, "beta1": 0.0, "beta2": 0.0, "filter": "ema", "lamb": 0.0, "weight_ema": 0.0}
LANE = {"exp_avg": 0, "grok_exp_avg": 0, "exp_avg_sq": 1, "weight_ema": 1}
SHIFT = {"exp_avg": 0, "grok_exp_avg": 16, "exp_avg_sq": 0, "weight_ema": 16}
UNIT = 2.0**-7  # distance of bfloat16 numbers in [1, 2)


def exact_item(size: int, step: float, device: torch.device) -> Item:
    item = make((size,), states=torch.bfloat16, step=step, grok_step=0.0, device=device)
    for name in STATES:
        item[name].zero_()
    return item


def before_rounding(item: Item) -> dict[str, np.ndarray]:
    g, p = item["grad"].cpu().numpy(), item["param"].cpu().numpy()
    return {"exp_avg": g, "exp_avg_sq": g * g, "grok_exp_avg": g, "weight_ema": p}


def mix(h: np.ndarray) -> np.ndarray:
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def rounded(value: np.ndarray, step: float, name: str) -> list[int]:
    """The page's rounding of elements 0, 1, ... of a state, written again with 32-bit words."""
    with np.errstate(over="ignore"):
        key = mix(np.array([int(step) + 1 + 0x9E3779B9 * LANE[name] & 0xFFFFFFFF], np.uint32))
        words = mix(key ^ np.arange(value.size, dtype=np.uint32)) >> np.uint32(SHIFT[name])
    raised = value.view(np.uint32).astype(np.uint64) + (words & np.uint32(0xFFFF))
    return (raised >> np.uint64(16)).astype(np.uint16).tolist()


def halves(tensor: torch.Tensor) -> list[int]:
    return tensor.cpu().view(torch.uint16).tolist()


@pytest.mark.parametrize("step", [0.0, 8.0, 2.0**24 - 1])
@pytest.mark.parametrize("name", STATES)
def test_the_bits_are_those_of_the_page(backend, device, name, step):
    item = exact_item(2500, step, device)
    expected = rounded(before_rounding(item)[name], step, name)
    run([item], Settings(**EXACT), backend)
    assert halves(item[name]) == expected


@pytest.mark.parametrize("step", [0.0, 8.0])
def test_the_bits_of_a_ring_are_those_of_the_page(backend, device, step):
    item = exact_item(2500, step, device)
    item["grok_exp_avg"] = item["grok_exp_avg"].float()
    item["grok_ring"] = torch.full((3, 2500), math.nan, dtype=torch.bfloat16, device=device)
    expected = rounded(before_rounding(item)["grok_exp_avg"], step, "grok_exp_avg")
    run([item], Settings(**EXACT | {"filter": "ma"}), backend)
    assert halves(item["grok_ring"][0]) == expected
    assert torch.equal(item["grok_exp_avg"], item["grok_ring"][0].float())


def test_the_bits_follow_the_place_in_memory(backend, device):
    flat = exact_item(24, 3.0, device)
    turned = {k: v.view(4, 6).t() if v.dim() else v.clone() for k, v in copies(flat).items()}
    run([flat], Settings(**EXACT), backend)
    run([turned], Settings(**EXACT), backend)
    for name in STATES:
        assert halves(turned[name].t().reshape(-1)) == halves(flat[name])


def test_the_bits_follow_the_state_where_the_parameter_has_gaps(backend, device):
    flat = exact_item(24, 3.0, device)
    gaps = copies(flat) | {"param": torch.stack((flat["param"], flat["param"]), 1)[:, 0]}
    run([flat], Settings(**EXACT), backend)
    run([gaps], Settings(**EXACT), backend)
    assert_same_bits(without(gaps, "param"), without(flat, "param"))


@pytest.mark.parametrize("name", STATES)
def test_rounding_is_unbiased(backend, device, name):
    size = 1 << 14
    item = exact_item(size, 5.0, device)
    item["grad"].fill_(1.0 + 0.3 * UNIT)
    item["param"].fill_(1.0 + 0.3 * UNIT)
    exact = before_rounding(item)[name][0].item()
    run([item], Settings(**EXACT), backend)
    # One element is off by a Bernoulli variable of at most half a unit's deviation; five deviations
    # of the mean. Round to nearest would be off by 0.3 units.
    bound = 5 * 0.5 * UNIT / math.sqrt(size)
    assert abs(item[name].double().mean().item() - exact) < bound


@pytest.mark.parametrize("pair", [("exp_avg", "grok_exp_avg"), ("exp_avg", "exp_avg_sq"),
                                  ("exp_avg_sq", "weight_ema")], ids="-".join)  # fmt: skip
def test_states_are_rounded_independently(backend, device, pair):
    size = 1 << 14
    item = exact_item(size, 5.0, device)
    item["grad"].fill_(1.0 + 0.5 * UNIT)
    item["param"].fill_(1.0 + 0.5 * UNIT)
    run([item], Settings(**EXACT), backend)
    up = [item[name].double() > item[name].double().mean() for name in pair]
    share = (up[0] == up[1]).double().mean().item()
    # Fair and independent coins agree half of the time (v is rounded up with probability
    # 1/2 + 1/2^10); five deviations.
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(size)


def test_neighbouring_steps_are_rounded_independently(backend, device):
    size, ups = 1 << 14, []
    for step in (5.0, 6.0):
        item = exact_item(size, step, device)
        item["grad"].fill_(1.0 + 0.5 * UNIT)
        run([item], Settings(**EXACT), backend)
        ups.append(item["exp_avg"] > 1)
    share = (ups[0] == ups[1]).double().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(size)


@pytest.mark.interpreted(name=["exp_avg"])
@pytest.mark.parametrize("name", ["grok_exp_avg", "exp_avg", "weight_ema"])
def test_a_mean_moves_though_each_step_is_less_than_a_unit(backend, device, name):
    """A step moves the mean by at most 0.02 * 0.1, a quarter of a unit: nearest would stay at 1."""
    size, steps, kept = 4096, 20, 0.98
    item = make((size,), states=torch.bfloat16, step=9.0, device=device)
    for tensor in ("param", "grad"):
        item[tensor].fill_(1.1)
    for state in STATES:
        item[state].fill_(1.0)
    settings = Settings(0.0, beta1=kept, alpha=kept, filter="ema", lamb=0.0, weight_ema=kept)
    for _ in range(steps):
        run([item], settings, backend)
    expected = 1.1 - 0.1 * kept**steps
    # Errors of at most half a unit's deviation, forgotten at the rate of the mean itself.
    deviation = 0.5 * UNIT / math.sqrt(1 - kept**2)
    assert abs(item[name].double().mean().item() - expected) < 5 * deviation / math.sqrt(size)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 0.0, 1.5, -(2.0**-133)])
def test_what_bfloat16_holds_is_stored_exactly(backend, device, value):
    item = exact_item(1025, 5.0, device)
    item["grad"].fill_(value)
    run([item], Settings(**EXACT), backend)
    assert set(halves(item["grok_exp_avg"])) == set(halves(item["grad"].bfloat16()))


def test_nan_is_stored_as_nan_whatever_its_payload(backend, device):
    item = exact_item(1025, 5.0, device)
    item["grad"].view(torch.int32).fill_(0x7FFFFFFF)  # bits added to it would overflow
    run([item], Settings(**EXACT), backend)
    assert item["grok_exp_avg"].isnan().all()


def test_a_negative_number_keeps_its_sign_and_rounds_away_from_zero_at_random(backend, device):
    item = exact_item(1025, 5.0, device)
    item["grad"].fill_(-(1.0 + 0.5 * UNIT))
    run([item], Settings(**EXACT), backend)
    assert set(item["grok_exp_avg"].tolist()) == {-1.0, -(1.0 + UNIT)}


def test_withheld_filter_states_keep_their_bits(backend, device):
    item = make((1025,), states=torch.bfloat16, step=0.0, device=device)
    before = bits(item["grok_exp_avg"])
    run([item], Settings(1e-2, filter="ema", lamb=2.0, after_step=5), backend)
    assert bits(item["grok_exp_avg"]) == before


def skip_where_bfloat16_is_truncated(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16; a GPU shows the rounding")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_rounded_to_nearest(backend, device, dtype):
    skip_where_bfloat16_is_truncated(backend, device, dtype)
    item = make((1025,), dtype, torch.float32, device=device)
    exact = {k: v.float() if k == "param" else v for k, v in copies(item).items()}
    settings = Settings(1e-2, weight_decay=0.1)
    run([item], settings, backend)
    run([exact], settings, backend)
    assert bits(item["param"]) == bits(exact["param"].to(dtype))


@pytest.mark.parametrize(("dtype", "units"), [(torch.bfloat16, 128), (torch.float16, 1024)])
@pytest.mark.parametrize("lost", [2.5, 7.5])
def test_parameters_halfway_are_rounded_to_even(backend, device, dtype, units, lost):
    """The decay takes 2.5 or 7.5 units from 1.25, which is 0 modulo 4 units."""
    skip_where_bfloat16_is_truncated(backend, device, dtype)
    item = without(make((5,), dtype, device=device), "grok_exp_avg", "grok_step", "weight_ema")
    for name in ("grad", "exp_avg", "exp_avg_sq"):
        item[name].zero_()
    item["param"].fill_(1.25)
    run([item], Settings(1.0, weight_decay=lost / units / 1.25), backend)
    assert set(item["param"].tolist()) == {1.25 - {2.5: 2, 7.5: 8}[lost] / units}
