"""Small runs, ended by signals at random moments; ``python -m tests.signals`` does the same."""

import pytest

from ..signals import signal_often


@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.long)])
def test_a_run_that_a_signal_ends_goes_on_to_the_same_bits(count, memory):
    found = signal_often(memory, count, seed=count)
    assert found.failures == []
    assert found.moments.total() == count
