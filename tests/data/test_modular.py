"""The equations modulo a prime and their split into training and validation halves."""

import pytest
import torch

from trm_fast.data.synthetic.modular import modular_equations, split_equations


def test_published_task_has_9312_equations_of_99_tokens():
    equations = modular_equations(97)
    assert equations.shape == (5, 9312)
    assert equations.dtype == torch.int64
    assert equations.unique().tolist() == list(range(99))


def test_tokens_are_x_operation_y_equals_result():
    x, operation, y, equals, result = modular_equations(97)
    assert torch.equal(result, x * y % 97)
    assert operation.unique().tolist() == [98]
    assert equals.unique().tolist() == [97]
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    assert pairs == [(a, b) for a in range(97) for b in range(1, 97)]


@pytest.mark.parametrize("operation", ["x*y", "x/y", "x+y", "x-y"])
def test_results_solve_the_equation(operation):
    x, _, y, _, result = modular_equations(11, operation)
    # Division is checked by multiplying back; the others by Python's own arithmetic.
    for a, b, c in zip(x.tolist(), y.tolist(), result.tolist(), strict=True):
        assert 0 <= c < 11
        if operation == "x/y":
            assert c * b % 11 == a
        else:
            assert c == eval(operation, {"x": a, "y": b}) % 11


@pytest.mark.parametrize("prime", [-3, 0, 1, 4, 9, 96])
def test_a_modulus_that_is_not_prime_is_refused(prime):
    with pytest.raises(ValueError, match=f"prime must be a prime number; got {prime}"):
        modular_equations(prime)


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match=r"operation must be one of x\*y, .*; got 'x\*\*y'"):
        modular_equations(97, "x**y")


def test_halves_are_disjoint_and_together_everything():
    equations = modular_equations(97)
    train, validation = split_equations(equations, torch.Generator().manual_seed(0))
    assert train.shape == validation.shape == (5, 4656)
    both = torch.cat([train, validation], dim=1)
    # One equation per column, so sorting columns by (x, y) has to restore the whole task.
    order = (both[0] * 97 + both[2]).argsort()
    assert torch.equal(both[:, order], equations)


def test_the_split_is_the_permutation_of_the_generator():
    equations = modular_equations(7)
    train, validation = split_equations(equations, torch.Generator().manual_seed(3))
    order = torch.randperm(42, generator=torch.Generator().manual_seed(3))
    assert torch.equal(train, equations[:, order[:21]])
    assert torch.equal(validation, equations[:, order[21:]])


def test_an_odd_count_gives_validation_one_more():
    train, validation = split_equations(modular_equations(7)[:, :5], torch.Generator())
    assert (train.shape[1], validation.shape[1]) == (2, 3)
