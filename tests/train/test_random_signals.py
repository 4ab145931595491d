"""Small runs, ended by signals at random moments; ``python -m tests.signals`` does the same."""

import signal

import pytest

from ..signals import NUMBERS, Plan, signal_often, signal_once, small_run
from .runs import result


@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.long)])
def test_a_run_that_a_signal_ends_goes_on_to_the_same_bits(count, memory):
    found = signal_often(memory, count, seed=count)
    assert found.failures == []
    assert found.moments.total() == count


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.long) for n in NUMBERS[1:])]
)
def test_a_signal_to_a_group_leaves_the_batch_that_is_waited_for(number, memory):
    small_run(memory / "whole").fit()
    plan = Plan(number, "data", 3, delay=0.0, group=True, workers=2)
    assert signal_once(memory / "run", result(memory / "whole"), plan) == ""
    events = (memory / "run" / "events.jsonl").read_text()
    assert f"interrupted by {number.name}" in events
    # No process of the loader has told of it too.
    assert (memory / "run.log").read_text().count(number.name) == 1
