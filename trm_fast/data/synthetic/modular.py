"""Equations modulo a prime: the algorithmic task on which grokking was first seen.

Source: Power et al. 2022, arXiv:2201.02177 (the task); Lee et al. 2024, arXiv:2405.20233, and
ironjr/grokfast at commit 93b2248 (x from 0, y from 1, tokens, order, halves by one permutation).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Operation = Literal["x*y", "x/y", "x+y", "x-y"]


def modular_equations(prime: int, operation: Operation = "x*y") -> Tensor:
    """Builds every equation of x in [0, prime) and y in [1, prime), calculated modulo ``prime``.

    The tokens of one equation are ``x, prime + 1, y, prime, result``: numbers stand for themselves,
    ``prime`` is the equals sign and ``prime + 1`` the operation, so that a model needs
    ``prime + 2`` tokens. Equations are ordered by x, then y. Division multiplies by the inverse of
    y.

    Args:
        prime: modulus, a prime number.
        operation: "x*y", "x/y", "x+y" or "x-y".

    Returns:
        Tokens [5, prime * (prime - 1)], int64 on the CPU: one column per equation.

    Raises:
        ValueError: ``prime`` is not a prime number, or the operation is not one of the four.
    """
    if prime < 2 or any(prime % divisor == 0 for divisor in range(2, int(prime**0.5) + 1)):
        raise ValueError(f"modular_equations: prime must be a prime number; got {prime}")
    if operation not in get_args(Operation):
        names = ", ".join(get_args(Operation))
        raise ValueError(f"modular_equations: operation must be one of {names}; got {operation!r}")
    x, y = torch.cartesian_prod(torch.arange(prime), torch.arange(1, prime)).T
    if operation == "x*y":
        result = x * y
    elif operation == "x/y":
        inverse = torch.tensor([0] + [pow(number, -1, prime) for number in range(1, prime)])
        result = x * inverse[y]
    elif operation == "x+y":
        result = x + y
    else:
        result = x - y
    equals = torch.full_like(x, prime)
    return torch.stack([x, equals + 1, y, equals, result % prime])


def split_equations(equations: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Splits equations at random into a training half and a validation half.

    Args:
        equations: tokens [5, count]; an odd count gives validation one more.
        generator: source of the one permutation that is drawn; advanced.

    Returns:
        Training tokens [5, count // 2] and validation tokens [5, count - count // 2].
    """
    count = equations.shape[1]
    order = torch.randperm(count, generator=generator)
    return equations[:, order[: count // 2]], equations[:, order[count // 2 :]]
