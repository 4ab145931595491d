"""The rules of adaptive_step_ that are not Adam's: "sgd", "momentum" and "filter"."""

import math

import pytest
import torch

from trm_fast.ops import Settings
from trm_fast.ops._adaptive_filters import FILTERS, REDUCING, WINDOWED

from .adaptive_checks import (
    assert_same_bits,
    assert_step,
    bits,
    copies,
    fitted,
    make,
    run,
    without,
)
from .adaptive_truth import Item, truth

RULES = ("sgd", "momentum", "filter")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
DEFAULT = {"lr": 1e-2, "weight_decay": 0.1, "filter": "ema", "lamb": 2.0, "weight_ema": 0.9}
# Every combination that "sgd" knows, and those of "momentum".
SGD = [
    {"dampening": dampening, "nesterov": nesterov, "weight_decay": decay, "moment": moment}
    for dampening, nesterov in ((0.0, False), (0.0, True), (0.5, False), (1.0, True))
    for decay in (0.0, 0.1)
    for moment in (True, False)
]


def settings_with(**changes) -> Settings:
    return Settings(**(DEFAULT | changes))


def new_grad(item: Item, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    item["grad"] = torch.randn(item["grad"].shape, generator=generator).to(item["grad"])


@pytest.mark.parametrize("options", SGD, ids=str)
def test_sgd_is_the_formula(backend, device, options):
    moment = options["moment"]
    settings = settings_with(rule="sgd", **{k: v for k, v in options.items() if k != "moment"})
    item = fitted(make(step=0.0, grok_step=0.0, device=device), settings, moment=moment)
    for seed in range(3):
        new_grad(item, seed)
        assert_step([item], settings, backend)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rule", ["momentum", "filter"])
def test_output_rules_are_the_formula(backend, device, rule, nesterov):
    settings = settings_with(rule=rule, nesterov=nesterov)
    item = fitted(make(step=0.0, grok_step=0.0, device=device), settings)
    for seed in range(3):
        new_grad(item, seed)
        assert_step([item], settings, backend)


@pytest.mark.parametrize("filter_", [f for f in FILTERS if f not in (*REDUCING, *WINDOWED)])
@pytest.mark.parametrize("rule", RULES)
def test_every_pairing_of_storage_is_right(backend, device, rule, filter_):
    """The states of a row have any dtypes, and rows of several kinds share a call."""
    settings = settings_with(rule=rule, filter=filter_, nesterov=True)
    kinds = [(p, g, s) for p in STORAGE for g in STORAGE[:2] for s in STORAGE[:2]]
    items = [make((33 + i,), *kind, seed=i, device=device) for i, kind in enumerate(kinds)]
    assert_step([fitted(item, settings) for item in items], settings, backend)


@pytest.mark.parametrize("rule", RULES)
def test_every_size_is_right(backend, device, rule):
    settings = settings_with(rule=rule)
    sizes = ((), (0,), (1,), (1023,), (1025,), (8 * 1024 + 1,), (3, 5, 7))
    items = [make(shape, seed=i, device=device) for i, shape in enumerate(sizes)]
    assert_step([fitted(item, settings) for item in items], settings, backend)


# torch.optim is no truth, but it must be the same optimizer.


@pytest.mark.parametrize("options", [
    {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.0}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "maximize": True},
], ids=str)  # fmt: skip
def test_sgd_in_float64_is_that_of_torch(options):
    settings = {k: v for k, v in options.items() if k != "momentum"}
    settings = Settings(1e-2, rule="sgd", beta1=options["momentum"], **settings)
    item = make(param=torch.float64, states=torch.float64, step=0.0)
    item = fitted(item, settings, moment=options["momentum"] > 0)
    item = without(item, "grok_exp_avg", "grok_step", "weight_ema")
    other = torch.nn.Parameter(item["param"].clone())
    optimizer = torch.optim.SGD([other], 1e-2, **options)
    for seed in range(20):
        new_grad(item, seed)
        other.grad = item["grad"].clone()
        run([item], settings, "reference")
        optimizer.step()
    # At most 10 roundings a step of values below 10.
    assert (item["param"] - other.detach()).abs().max() < 20 * 10 * 10 * 2.0**-53


def test_a_first_moment_starts_with_the_gradient_whatever_it_held(backend, device):
    settings = Settings(1e-2, rule="sgd", dampening=0.5)
    item = fitted(make(step=0.0, device=device), settings)
    item["exp_avg"].fill_(math.nan)
    run([item], settings, backend)
    assert bits(item["exp_avg"]) == bits(item["grad"])


def test_dampening_1_holds_what_the_first_gradient_was(backend, device):
    settings = Settings(1e-2, rule="sgd", dampening=1.0, beta1=0.5)
    item = fitted(make(step=0.0, device=device), settings)
    first = item["grad"].clone()
    for seed in range(3):
        run([item], settings, backend)
        new_grad(item, seed)
    assert torch.equal(item["exp_avg"], first / 4)


@pytest.mark.parametrize("rule", ["momentum", "filter"])
@pytest.mark.parametrize("dtype", STORAGE)
def test_what_an_output_held_does_not_matter(backend, device, rule, dtype):
    settings = settings_with(rule=rule)
    one = fitted(make((1500,), dtype, states=torch.float32, device=device), settings)
    other = copies(one)
    other["param"].fill_(math.nan)
    run([one], settings, backend)
    run([other], settings, backend)
    assert_same_bits(one, other)


@pytest.mark.parametrize("rule", ["momentum", "filter"])
def test_lr_and_decay_do_not_reach_an_output(backend, device, rule):
    one = fitted(make(device=device), settings_with(rule=rule))
    other = copies(one)
    run([one], settings_with(rule=rule), backend)
    run([other], settings_with(rule=rule, lr=5.0, weight_decay=3.0), backend)
    assert_same_bits(one, other)


def test_filter_without_a_filter_gives_the_scaled_gradient(backend, device):
    scale = torch.tensor(4.0, device=device)
    settings = Settings(0.0, rule="filter", grad_scale=scale, maximize=True)
    item = without(fitted(make(device=device), settings), "grok_exp_avg", "grok_step")
    run([item], settings, backend)
    assert bits(item["param"]) == bits(item["grad"] / -4)


def test_an_output_may_have_gaps(backend, device):
    settings = settings_with(rule="filter")
    item = fitted(make((6, 8), device=device), settings)
    memory = torch.full((6, 16), -77.0, device=device)
    item["param"] = memory[:, ::2]
    assert_step([item], settings, backend)
    assert (memory[:, 1::2] == -77).all()


@pytest.mark.parametrize("states", STORAGE[:2])
@pytest.mark.parametrize("rule", RULES)
def test_found_inf_leaves_everything_bitwise_alone(backend, device, rule, states):
    settings = settings_with(rule=rule, found_inf=torch.ones((), device=device))
    item = fitted(make((1500,), states=states, device=device), settings)
    item["grad"].fill_(math.inf)
    before = copies(item)
    run([item], settings, backend)
    assert_same_bits(item, before)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_an_infinite_gradient_does_as_the_formula(backend, device, rule, nesterov):
    settings = settings_with(rule=rule, filter="none", nesterov=nesterov)
    item = fitted(make(device=device), settings)
    item["grad"][5] = math.inf
    expected = truth(item, settings)
    run([item], settings, backend)
    for name in ("param", "exp_avg"):
        if name in item:
            assert torch.equal(item[name].isfinite(), expected[name].isfinite()), name
            # Looking ahead, g + beta1 * (m - g), it is infinite or NaN as the terms are sorted.
            assert nesterov or torch.equal(item[name].isnan(), expected[name].isnan()), name


def test_late_steps_of_sgd_are_right(backend, device):
    settings = settings_with(rule="sgd", dampening=0.5)
    item = make(step=2.0**24 - 2, grok_step=2.0**24 - 2, device=device)
    assert_step([fitted(item, settings)], settings, backend)
