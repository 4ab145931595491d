"""Weights of the supervision steps of a joint loss."""

from collections.abc import Sequence
from difflib import get_close_matches
from math import inf

NAMES = ("uniform", "halving")


def supervision_weights(
    steps: int, weights: str | Sequence[float] = "uniform", *, floor: float = 0.0
) -> list[float]:
    """Returns the weight of each supervision step in a loss over all of them.

        uniform   u_i = 1
        halving   u_i = 2^-i, so that the first step weighs most
        weight    w_i = max(u_i, floor) / (sum of max(u_j, floor) over all steps)

    Args:
        steps: number of supervision steps, >= 1; i counts from 0.
        weights: "uniform", "halving", or one u_i >= 0 for each step, first step first.
        floor: least weight before the division, >= 0.

    Returns:
        ``steps`` weights >= 0, whose sum is 1.

    Raises:
        ValueError: a number is out of range, a name unknown, or the sequence is not of ``steps``
            weights.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"supervision_weights: steps must be an int >= 1; got {steps!r}")
    if isinstance(weights, str):
        given = _named(weights, steps)
    else:
        given = [float(weight) for weight in weights]
    if len(given) != steps:
        raise ValueError(
            f"supervision_weights: weights must be {steps} numbers, one for each step; got "
            f"{len(given)}"
        )
    if not 0 <= floor < inf:
        raise ValueError(f"supervision_weights: floor must be finite and >= 0; got {floor!r}")
    floored = [max(weight, floor) for weight in given]
    if not all(0 <= weight < inf for weight in given) or not 0 < sum(floored) < inf:
        raise ValueError(
            "supervision_weights: weights must be >= 0, finite and not all 0; got "
            f"{', '.join(f'{weight:g}' for weight in given)}"
        )
    total = sum(floored)
    return [weight / total for weight in floored]


def _named(name: str, steps: int) -> list[float]:
    if name == "uniform":
        return [1.0] * steps
    if name == "halving":
        return [0.5**i for i in range(steps)]
    near = get_close_matches(name, NAMES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"supervision_weights: weights must be one of {', '.join(NAMES)} or {steps} numbers; got "
        f"{name!r}{hint}"
    )
