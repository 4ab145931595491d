"""The coefficients of newton_schulz: what the sets do, and where their Gram form restarts."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from trm_fast.ops import newton_schulz
from trm_fast.ops._newton_schulz_forms import form_of
from trm_fast.ops._newton_schulz_sets import SETS, restarts_of

NORM_IN_BFLOAT16 = 1.004  # a singular value whose norm is 1, with every element rounded upwards


def composite(name: str, steps: int, s: Tensor) -> Tensor:
    for a, b, c in SETS[name].steps(steps):
        s = s * (a + b * s**2 + c * s**4)
    return s


@pytest.mark.parametrize("steps", [*range(1, 11), 20])
@pytest.mark.parametrize("name", SETS)
def test_every_set_stays_positive_and_bounded(name, steps):
    s = torch.linspace(0, NORM_IN_BFLOAT16, 400_001, dtype=torch.float64)[1:]
    found = composite(name, steps, s)
    assert found.min() > 0
    assert found.max() < 2  # after the first step; 1.3 is the most that any set ends with
    assert steps < len(SETS[name].triples) or found.max() < 1.31


# What five steps make of singular values from 0.01 to 1; as published, where it is published, and
# within what a safety factor of 1.01 changes.
SPREAD = {"polar_express": (0.86, 1.13), "keller": (0.67, 1.21), "you": (0.96, 1.15),
          "cans": (0.86, 1.13), "cubic5": (0.76, 1.31)}  # fmt: skip


@pytest.mark.parametrize("name", SPREAD)
def test_five_steps_bring_small_values_near_1(name):
    found = composite(name, 5, torch.linspace(0.01, 1, 100_001, dtype=torch.float64))
    low, high = SPREAD[name]
    assert low < found.min() and found.max() < high


@pytest.mark.parametrize(("name", "steps"), [("polar_express", 8), ("deepseekv4", 10)])
def test_longer_sets_converge(name, steps):
    found = composite(name, steps, torch.linspace(0.01, 1, 100_001, dtype=torch.float64))
    assert (found - 1).abs().max() < 0.01


@pytest.mark.parametrize("name", SETS)
def test_a_short_set_repeats_its_last_triple_and_a_long_one_is_cut(name):
    count = len(SETS[name].triples)
    longer, whole = SETS[name].steps(count + 3), SETS[name].steps(count)
    assert longer == whole + whole[-1:] * 3
    for steps in range(1, count):
        assert SETS[name].steps(steps) == whole[:steps]


def test_one_triple_is_every_step():
    x, triple = torch.eye(3, 4, dtype=torch.float64) + 0.5, (1.5, -0.5, 0.0)
    assert torch.equal(newton_schulz(x, 4, triple), newton_schulz(x, 4, [triple] * 4))
    assert torch.equal(newton_schulz(x, 4, triple), newton_schulz(x, 4, "cubic"))


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PUBLISHED = {torch.bfloat16: (1, 3), torch.float16: (2,), torch.float32: (2,), torch.float64: ()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_restarts_of_five_steps_are_those_that_were_published(dtype):
    assert restarts_of(SETS["polar_express"].steps(5), dtype) == PUBLISHED[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
@pytest.mark.parametrize("name", SETS)
def test_restarts_are_the_best_of_the_fewest(name, steps, dtype):
    """Against all choices of as many or fewer restarts."""
    gains = [a * a for a, _, _ in SETS[name].steps(steps)[:-1]]
    rounding = {torch.bfloat16: 3.2e-3, torch.float16: 4e-4, torch.float32: 1e-6}
    allowed = 0.1 / rounding.get(dtype, 1e-14)

    def drift(cuts) -> float:
        ends = (0, *cuts, steps)
        return max(math.prod(gains[i : j - 1]) for i, j in itertools.pairwise(ends))

    found = restarts_of(SETS[name].steps(steps), dtype)
    assert all(0 < restart < steps for restart in found) and sorted(set(found)) == [*found]
    every = list(range(1, steps))
    fewer = itertools.chain(*(itertools.combinations(every, k) for k in range(len(found))))
    assert all(drift(cuts) > allowed for cuts in fewer)
    same = itertools.combinations(every, len(found))
    assert drift(found) <= min(map(drift, same)) * (1 + 1e-6)


def test_auto_takes_the_gram_form_where_it_was_measured_to_win():
    assert form_of("auto", (512, 512), "cpp", "cpu") == "symmetric"
    assert form_of("auto", (512, 1536), "cpp", "cpu") == "gram"
    assert form_of("auto", (1536, 512), "cpp", "cpu") == "gram"
    assert form_of("auto", (512, 512), "reference", "cpu") == "standard"
    assert form_of("standard", (512, 1536), "cpp", "cpu") == "standard"
