"""What a recursion costs whose levels grow by the golden ratio.

    phi = (1 + sqrt 5) / 2
    complexity(T, n) = sum over levels l = 0 .. T-1 of n phi^l

and if the model may halt after each level, with probability p_l,

    expected = sum over levels of P_l n phi^l,    P_l = product over j < l of (1 - p_j),

where P_l is the probability that level l is reached.
"""

import torch
from torch import Tensor

PHI = (1.0 + 5.0**0.5) / 2.0


def complexity(T: int, n: int = 6) -> float:
    """Returns the sum of n phi^l over the levels l = 0 .. T-1.

    Args:
        T: levels, >= 1.
        n: micro-steps per level, >= 1.

    Returns:
        The cost, in micro-steps of level 0.

    Raises:
        ValueError: ``T`` or ``n`` is not a whole number >= 1.
    """
    _check_counts("complexity", T=T, n=n)
    return sum(_costs(T, n))


def expected_complexity(halt_probs: Tensor, n: int = 6) -> Tensor:
    """Returns the expected cost of each row, with a gradient for its halting probabilities.

    Args:
        halt_probs: probability of halting after each level, [batch, T], floating point, each in
            [0, 1]. The last one has no part in it, as no level follows.
        n: micro-steps per level, >= 1.

    Returns:
        Expected cost [batch], in micro-steps of level 0.

    Raises:
        ValueError: ``halt_probs`` has another shape, or ``n`` is not a whole number >= 1.
    """
    if halt_probs.dim() != 2 or not halt_probs.shape[1]:
        raise ValueError(
            "expected_complexity: halt_probs must be [batch, T] with T >= 1; got "
            f"{tuple(halt_probs.shape)}"
        )
    _check_counts("expected_complexity", n=n)
    goes_on = torch.cat((torch.ones_like(halt_probs[:, :1]), 1.0 - halt_probs[:, :-1]), 1)
    return goes_on.cumprod(1) @ halt_probs.new_tensor(_costs(halt_probs.shape[1], n))


def _costs(T: int, n: int) -> list[float]:
    return [n * PHI**level for level in range(T)]


def _check_counts(owner: str, **counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {name} must be a whole number >= 1; got {value!r}")
