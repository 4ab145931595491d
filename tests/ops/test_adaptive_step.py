"""The numbers of adaptive_step_: every backend against the formula of its page in float64."""

import math

import pytest
import torch

from trm_fast._dispatch import OPS
from trm_fast.ops import Settings
from trm_fast.ops import _adaptive_filters as page
from trm_fast.ops._adaptive_settings import RULES as ALL_RULES

from ..conftest import NO_GPU
from .adaptive_checks import (
    assert_right,
    assert_same_bits,
    assert_step,
    bits,
    copies,
    make,
    run,
    without,
)
from .adaptive_truth import Item, truth

RULES = [rule for rule in ALL_RULES if rule not in ("sgd", "momentum", "filter")]
# Those that look at whole tensors, or at the last gradients, are in test_adaptive_step_filters.py
# and test_adaptive_step_rings.py.
FILTERS = [name for name in page.FILTERS if name not in (*page.REDUCING, *page.WINDOWED)]
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
# More than one thread's share is 8 blocks of 1024 on the CPU.
SIZES = ((), (0,), (0, 3), (1,), (1023,), (1024,), (1025,), (5000,), (8 * 1024 + 1,), (3, 5, 7))
DEFAULT = {"lr": 1e-2, "weight_decay": 0.1, "filter": "ema", "lamb": 2.0, "weight_ema": 0.9}


def settings_with(**changes) -> Settings:
    return Settings(**(DEFAULT | changes))


def new_grad(item: Item, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    item["grad"] = torch.randn(item["grad"].shape, generator=generator).to(item["grad"])


# Each step starts from what the backend made of the last one, so its error does not add up.
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("rule", RULES)
def test_each_step_is_the_formula(backend, device, rule, filter_, dtype):
    # In the interpreter a step takes 20 ms.
    steps = 8 if dtype != torch.float32 or (backend == "triton" and NO_GPU) else 50
    item = make(param=dtype, step=0.0, grok_step=0.0, device=device)
    for name in ("exp_avg", "exp_avg_sq"):
        item[name].zero_()
    settings = settings_with(rule=rule, filter=filter_)
    for seed in range(steps):
        new_grad(item, seed)
        assert_step([item], settings, backend)
    assert item["step"] == steps


@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("rule", RULES)
def test_50_steps_in_float64_are_the_formula(rule, filter_):
    item = make(param=torch.float64, states=torch.float64, step=0.0, grok_step=0.0)
    settings, expected = settings_with(rule=rule, filter=filter_), copies(item)
    for seed in range(50):
        new_grad(item, seed)
        expected |= truth(expected | {"grad": item["grad"]}, settings)
        run([item], settings, "reference")
    for name in ("param", "exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema"):
        # 50 steps of at most 26 roundings of values below 10; 1 / (1 - beta2) enlarges the first.
        assert (item[name] - expected[name]).abs().max() < 50 * 26 * 1000 * 2.0**-53, name


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size_is_right(backend, device, shape):
    assert_step([make(shape, device=device)], settings_with(), backend)


def test_many_tensors_of_different_sizes_are_right_together(backend, device):
    items = [make(shape, seed=i, device=device) for i, shape in enumerate(SIZES)]
    assert_step(items, settings_with(), backend)


def test_no_tensors_are_no_work(backend):
    run([], settings_with(), None if backend == "cuda" else backend)


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", STORAGE)
@pytest.mark.parametrize("param", STORAGE)
def test_every_pairing_of_storage_is_right(backend, device, param, grad, states):
    assert_step([make((130,), param, grad, states, device=device)], settings_with(), backend)


def test_mixed_storage_is_right_in_one_call(backend, device):
    kinds = [(p, g, s) for p in STORAGE for g in STORAGE for s in STORAGE[:2]]
    items = [make((33 + i,), *kind, seed=i, device=device) for i, kind in enumerate(kinds)]
    mixed = {"exp_avg": STORAGE[1], "exp_avg_sq": STORAGE[0]}
    mixed |= {"grok_exp_avg": STORAGE[1], "weight_ema": STORAGE[0]}
    items.append(make((70,), STORAGE[1], STORAGE[0], mixed, device=device))
    assert_step(items, settings_with(), backend)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema"])
def test_a_0d_tensor_takes_a_state_in_bfloat16(backend, device, name):
    states = dict.fromkeys(("exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema"), torch.float32)
    item = make((), states=states | {name: torch.bfloat16}, device=device)
    assert_step([item], settings_with(), backend)


@pytest.mark.parametrize("absent", [("weight_ema",), ("grok_exp_avg", "grok_step")])
def test_absent_states_are_left_out(backend, device, absent):
    item = without(make((1025,), device=device), *absent)
    assert_step([item, without(make((3,), device=device), *absent)], settings_with(), backend)


def test_filter_none_leaves_a_given_filter_state_alone(backend, device):
    item = make(device=device)
    before = copies(item)
    run([item], settings_with(filter="none"), backend)
    for name in ("grok_exp_avg", "grok_step"):
        assert bits(item[name]) == bits(before[name])


def test_tensors_at_different_steps_use_their_own_counters(backend, device):
    counts = ((0, 0), (1, 0), (1, 1), (1000, 3), (0, 0), (7, 7))
    items = [
        make((40,), seed=i, step=float(t), grok_step=float(k), device=device)
        for i, (t, k) in enumerate(counts)
    ]
    assert_step(items, settings_with(), backend)
    assert [float(item["step"]) for item in items] == [t + 1 for t, _ in counts]


def test_grok_step_0_seeds_the_filter_whatever_it_held(backend, device):
    item = make(grok_step=0.0, device=device)
    item["grok_exp_avg"].fill_(math.nan)
    run([item], settings_with(), backend)
    assert bits(item["grok_exp_avg"]) == bits(item["grad"])


@pytest.mark.parametrize("filter_", ["ema", "highpass"])
def test_maximize_negates_before_the_filter_and_its_seed(backend, device, filter_):
    item = make(grok_step=0.0, device=device)
    negated = copies(item) | {"grad": -item["grad"]}
    run([item], settings_with(filter=filter_, maximize=True), backend)
    run([negated], settings_with(filter=filter_), backend)
    assert_same_bits(without(item, "grad"), without(negated, "grad"))


def test_after_step_withholds_the_filter_until_it_is_passed(backend, device):
    item = make(step=0.0, grok_step=0.0, device=device)
    settings = settings_with(after_step=2)
    for seed, filtered in enumerate((0, 0, 1, 2)):
        new_grad(item, seed)
        assert_step([item], settings, backend)
        assert item["grok_step"] == filtered


def test_after_step_is_compared_with_the_counter_of_each_tensor(backend, device):
    counts = ((0, 0), (9, 3), (2, 0), (3, 0))
    items = [
        make((40,), seed=i, step=float(t), grok_step=float(k), device=device)
        for i, (t, k) in enumerate(counts)
    ]
    assert_step(items, settings_with(after_step=3), backend)
    assert [float(item["grok_step"]) for item in items] == [0, 4, 0, 1]


def test_the_first_active_step_seeds_after_after_step(backend, device):
    item = make(step=2.0, grok_step=0.0, device=device)
    run([item], settings_with(after_step=2), backend)
    assert bits(item["grok_exp_avg"]) == bits(item["grad"])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("clip", [None, 0.25, 0.3])
@pytest.mark.parametrize("grad_scale", [None, 65536.0, 3.0])
def test_the_gradient_is_scaled_clipped_and_signed(backend, device, grad_scale, clip, maximize):
    given = {"grad_scale": grad_scale, "clip": clip}
    tensors = {k: None if v is None else torch.tensor(v, device=device) for k, v in given.items()}
    item = make(device=device)
    assert_step([item], settings_with(maximize=maximize, **tensors), backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "lamb"])
def test_a_scalar_may_be_a_tensor(backend, device, name, shape, dtype):
    value = torch.full(shape, DEFAULT[name], device=device, dtype=dtype)
    assert_step([make(device=device)], settings_with(**{name: value}), backend)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", ["grad_scale", "found_inf", "clip"])
def test_an_optional_scalar_has_one_element_of_any_shape(backend, device, name, shape):
    value = torch.full(shape, 0.0 if name == "found_inf" else 2.0, device=device)
    assert_step([make((), device=device)], settings_with(**{name: value}), backend)


def test_a_number_that_is_set_between_two_calls_counts(backend, device):
    settings = settings_with()
    assert_step([make(device=device)], settings, backend)
    settings.lr = 2 * settings.lr
    assert_step([make(device=device)], settings, backend)


def test_scalars_are_read_at_the_call_and_not_kept(backend, device):
    lr, settings = torch.tensor(1e-2, device=device), settings_with()
    settings.lr = lr
    item = make(device=device)
    assert_step([item], settings, backend)
    lr.mul_(10)
    assert_step([item], settings, backend)


ENDS = [
    {"lr": 0.0}, {"lr": 50.0}, {"weight_decay": 0.0}, {"beta1": 0.0}, {"beta2": 0.0}, {"eps": 0.0},
    {"beta1": 0.0, "beta2": 0.0}, {"alpha": 0.0}, {"alpha": 1.0}, {"lamb": 0.0},
    {"weight_ema": 0.0}, {"weight_ema": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("changes", ENDS, ids=str)
def test_the_ends_of_each_range_are_right(backend, device, changes):
    assert_step([make(device=device)], settings_with(**changes), backend)


def test_lamb_0_still_moves_the_filter_state(backend, device):
    item = make(device=device)
    before = copies(item)
    run([item], settings_with(lamb=0.0), backend)
    assert_right(before, item, settings_with(lamb=0.0))
    assert not torch.equal(item["grok_exp_avg"], before["grok_exp_avg"])


@pytest.mark.parametrize("step", [998.0, 2.0**20, 2.0**24 - 2])
def test_late_steps_are_right(backend, device, step):
    assert_step([make(step=step, grok_step=step, device=device)], settings_with(), backend)


def test_the_last_countable_step_is_counted(backend, device):
    item = make(step=2.0**24 - 1, grok_step=2.0**24 - 1, device=device)
    run([item], settings_with(), backend)
    assert item["step"] == item["grok_step"] == 2.0**24


def test_zero_gradients_without_decay_change_no_parameter(backend, device):
    item = make(device=device)
    for name in ("grad", "exp_avg", "exp_avg_sq", "grok_exp_avg"):
        item[name].zero_()
    for rule in RULES:
        before = item["param"].clone()
        run([item], settings_with(rule=rule, weight_decay=0.0), backend)
        assert torch.equal(item["param"], before), rule


def test_atan2_is_right_for_every_ratio(backend, device):
    """With g = 0, betas 1/2 and t = 1 the move is 2 atan2(m / 2, sqrt(v))."""
    heights = torch.logspace(-12, 12, 401, dtype=torch.float64).to(torch.float32)
    item = make((802,), step=0.0, device=device)
    item["grad"].zero_()
    item["param"].zero_()
    item["exp_avg"].copy_(torch.cat((heights, -heights)))
    item["exp_avg_sq"].fill_(1.0)
    settings = Settings(1.0, beta1=0.5, beta2=0.5, rule="atan2")
    expected = -2 * torch.atan2(item["exp_avg"].double() / 2, torch.ones((), dtype=torch.float64))
    run([without(item, "grok_exp_avg", "grok_step", "weight_ema")], settings, backend)
    # atan2 within 4 ulp (8 u); at most 4 u more from root, debias, product and subtraction.
    assert ((item["param"] - expected).abs() <= 12 * 2.0**-24 * expected.abs()).all()


@pytest.mark.parametrize("name", ["param", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("rule", RULES)
def test_a_nan_gradient_is_not_hidden(backend, device, rule, name):
    item = make(device=device)
    item["grad"][5] = math.nan
    run([item], settings_with(rule=rule), backend)
    assert item[name].isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("name", ["grok_exp_avg", "weight_ema"])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_a_nan_gradient_reaches_filter_and_average(backend, device, states, name):
    item = make(states=states, device=device)
    item["grad"][5] = math.nan
    run([item], settings_with(), backend)
    assert item[name].isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("rule", ["adamw", "atan2"])
def test_an_infinite_gradient_does_as_the_formula(backend, device, rule, value):
    item = make(device=device)
    item["grad"][5] = value
    settings = settings_with(rule=rule)
    expected = truth(item, settings)
    run([item], settings, backend)
    for name in ("param", "exp_avg", "exp_avg_sq", "grok_exp_avg"):
        finite = expected[name].isfinite()
        assert torch.equal(item[name].isnan(), expected[name].isnan()), name
        assert torch.equal(item[name].isfinite(), finite), name


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("found", [1.0, 2.0, math.inf, math.nan])
def test_found_inf_leaves_everything_bitwise_alone(backend, device, found, states):
    items = [make((n,), states=states, seed=n, device=device) for n in (1, 1500)]
    items[1]["grad"].fill_(math.inf)
    before = [copies(item) for item in items]
    run(items, settings_with(found_inf=torch.tensor(found, device=device)), backend)
    for old, new in zip(before, items, strict=True):
        assert_same_bits(new, old)


def test_found_inf_0_steps(backend, device):
    settings = settings_with(found_inf=torch.zeros((), device=device))
    assert_step([make(device=device)], settings, backend)


def test_found_inf_does_not_seed_the_filter(backend, device):
    item = make(grok_step=0.0, device=device)
    before = copies(item)
    run([item], settings_with(found_inf=torch.ones((), device=device)), backend)
    assert_same_bits(item, before)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", [(3, 5), (0,), (1025,)], ids=str)
def test_the_examples_of_the_op_keep_their_tolerance(backend, device, shape, dtype):
    """What ``trm-fast doctor`` runs on the machines of users."""
    for name, example in OPS["adaptive_step"].examples(shape, dtype, device).items():
        errors = example.errors(backend)
        assert errors.keys() == example.tolerance.keys()
        assert all(errors[key] <= example.tolerance[key] for key in errors), (name, errors)
