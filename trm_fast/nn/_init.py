"""How weights start: as in official TRM, from a normal distribution without its tails."""

from math import erf, exp, pi, sqrt

import torch
from torch import Tensor, nn

# Standard deviation of a normal distribution that is cut off at two of its own.
_CUT = 2.0
_CUT_STD = sqrt(1 - _CUT * exp(-_CUT * _CUT / 2) * sqrt(2 / pi) / erf(_CUT / sqrt(2)))


@torch.no_grad()
def truncated_normal_(tensor: Tensor, std: float, generator: torch.Generator | None = None) -> None:
    """Fills a tensor, in place, from a normal distribution cut off at two standard deviations and
    then scaled, so that ``std`` is the standard deviation of what is left.

    Source: SamsungSAILMontreal/TinyRecursiveModels at e7b6871, after JAX.

    Args:
        tensor: overwritten.
        std: standard deviation of the values, >= 0; none is larger than 2.274 times it.
        generator: of the random numbers; None takes torch's own.
    """
    nn.init.trunc_normal_(tensor, 0.0, 1.0, -_CUT, _CUT, generator)
    tensor.mul_(std / _CUT_STD)


def weight(rows: int, columns: int) -> nn.Parameter:
    """Returns a new matrix [rows, columns] of variance 1 / columns, for products over columns."""
    made = nn.Parameter(torch.empty(rows, columns))
    truncated_normal_(made, max(columns, 1) ** -0.5)
    return made


def check_sizes(owner: str, **sizes: int) -> None:
    """Raises a ValueError that names the first size that is not a whole number >= 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{owner}: {name} must be a whole number >= 1; got {size!r}")
