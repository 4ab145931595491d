"""supervision_weights: their values, and what is refused."""

import math
import re

import pytest

from trm_fast.losses import supervision_weights


def test_uniform_weights():
    assert supervision_weights(4) == [0.25] * 4 and supervision_weights(1) == [1.0]


def test_each_step_has_half_the_weight_of_the_one_before():
    assert supervision_weights(3, "halving") == [4 / 7, 2 / 7, 1 / 7]


def test_a_floor_holds_late_steps_up():
    raised = [max(0.5**i, 0.1) for i in range(6)]
    expected = [weight / sum(raised) for weight in raised]
    assert supervision_weights(6, "halving", floor=0.1) == expected
    assert expected[4] == expected[5] != supervision_weights(6, "halving")[5]


def test_given_weights_are_divided_by_their_sum():
    assert supervision_weights(4, (1, 0, 2, 1.0)) == [0.25, 0.0, 0.5, 0.25]


@pytest.mark.parametrize("steps", [1, 2, 16, 1000])
@pytest.mark.parametrize("name", ["uniform", "halving"])
def test_weights_add_up_to_one(name, steps):
    weights = supervision_weights(steps, name)
    assert len(weights) == steps and math.fsum(weights) == pytest.approx(1, rel=steps * 2.0**-52)


NUMBERS = "weights must be >= 0, finite and not all 0; got"
WRONG = {
    "no steps": ((0,), {}, "steps must be an int >= 1; got 0"),
    "half a step": ((1.5,), {}, "steps must be an int >= 1; got 1.5"),
    "misspelt": (
        (3, "halvng"),
        {},
        "weights must be one of uniform, halving or 3 numbers; got 'halvng'; did you mean "
        "'halving'?",
    ),
    "too few": ((3, [1, 1]), {}, "weights must be 3 numbers, one for each step; got 2"),
    "negative": ((2, [1, -1]), {}, f"{NUMBERS} 1, -1"),
    "zero": ((2, [0, 0]), {}, f"{NUMBERS} 0, 0"),
    "nan": ((2, [1, math.nan]), {}, f"{NUMBERS} 1, nan"),
    "infinite": ((2, [1, math.inf]), {}, f"{NUMBERS} 1, inf"),
    "floor": ((2,), {"floor": -0.1}, "floor must be finite and >= 0; got -0.1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name):
    arguments, options, words = WRONG[name]
    with pytest.raises(ValueError, match=f"^{re.escape(f'supervision_weights: {words}')}$"):
        supervision_weights(*arguments, **options)
