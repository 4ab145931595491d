"""The cost of a recursion: its table, its expectation, and what is refused."""

import itertools

import pytest
import torch

from trm_fast.losses import PHI, complexity, expected_complexity


def test_the_published_table():
    # The table has three decimals.
    table = [6.000, 15.708, 31.416, 56.833, 97.957]
    assert [complexity(T, 6) for T in range(1, 6)] == pytest.approx(table, abs=5e-4)


@pytest.mark.parametrize(("T", "n"), [(1, 1), (4, 6), (7, 3)])
def test_it_is_the_geometric_sum(T, n):
    # At most T roundings each of powers, products and sums: below 4 T 2^-52.
    expected = n * (PHI**T - 1) / (PHI - 1)
    assert complexity(T, n) == pytest.approx(expected, rel=4 * T * 2.0**-52)
    assert PHI == pytest.approx((1 + 5**0.5) / 2, rel=2.0**-52)


def outcomes(probs: list[float], n: int) -> float:
    """The expectation as a sum over the level after which it halts, at the last one anyway."""
    total, T = 0.0, len(probs)
    for last in range(T):
        reached = 1.0
        for level in range(last):
            reached *= 1 - probs[level]
        halts = probs[last] if last < T - 1 else 1.0
        total += reached * halts * sum(n * PHI**level for level in range(last + 1))
    return total


def test_expected_complexity_is_the_mean_over_outcomes():
    probs = torch.tensor([*itertools.product((0.0, 0.3, 1.0), repeat=3)], dtype=torch.float64)
    expected = [outcomes(row.tolist(), 6) for row in probs]
    # Below 20 roundings of 2^-53 in each.
    torch.testing.assert_close(
        expected_complexity(probs, 6), probs.new_tensor(expected), rtol=40 * 2.0**-53, atol=0
    )


def test_without_halting_it_is_the_complexity():
    found = expected_complexity(torch.zeros(2, 4, dtype=torch.float64), 6)
    assert found.tolist() == pytest.approx([complexity(4, 6)] * 2, rel=2.0**-50)


def test_gradients_are_those_of_finite_differences():
    probs = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda p: expected_complexity(p, 2), probs.requires_grad_())


def test_the_last_probability_has_no_part_and_the_others_lower_it():
    probs = torch.full((1, 3), 0.5, requires_grad=True)
    expected_complexity(probs).sum().backward()
    assert probs.grad is not None
    assert probs.grad[0, 2] == 0 and (probs.grad[0, :2] < 0).all()


WRONG = {
    "T": (lambda: complexity(0), "complexity: T must be a whole number >= 1; got 0"),
    "n": (lambda: complexity(1, 1.5), "complexity: n must be a whole number >= 1; got 1.5"),
    "dim": (
        lambda: expected_complexity(torch.ones(3)),
        "expected_complexity: halt_probs must be [batch, T] with T >= 1; got (3,)",
    ),
    "none": (
        lambda: expected_complexity(torch.ones(3, 0)),
        "expected_complexity: halt_probs must be [batch, T] with T >= 1; got (3, 0)",
    ),
    "steps": (
        lambda: expected_complexity(torch.ones(3, 1), 0),
        "expected_complexity: n must be a whole number >= 1; got 0",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
