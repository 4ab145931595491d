"""What a gradient filter sees of its parameters, for controllers and logs."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trm_fast.ops import FilterSums
from trm_fast.optim._local import add_shards, local, local_grad
from trm_fast.optim._states import RING, SUM, State


class FilterStatistics(NamedTuple):
    """What a filter sees of some parameters, as float64 tensors with one number for each.

    Args:
        params: the parameters.
        cosine: cosine between gradient and mean; NaN where one of them is zero.
        grad_norm: Euclidean norm of the gradient.
        mean_norm: Euclidean norm of the mean.
    """

    params: list[Tensor]
    cosine: Tensor
    grad_norm: Tensor
    mean_norm: Tensor


def statistics_of(
    params: list[Tensor], states: Mapping[Tensor, State], mean: str, sign: float
) -> FilterStatistics:
    """Returns what the filter sees of ``params``, whose means are the states of that name; ``sign``
    is -1 where it sees the negated gradient."""
    means = [local(states[param][mean]) for param in params]
    grads = [local_grad(param.grad, param) for param in params if param.grad is not None]
    sums = FilterSums(grads, means)(grads)
    add_shards(sums, params)
    dot, square, mean_square = sums.unbind(1)
    if mean == SUM:
        windows = torch.tensor([states[param][RING].shape[0] for param in params])
        counts = torch.stack([states[param]["grok_step"] for param in params]).clamp(min=1)
        held = torch.minimum(counts, windows.to(counts.device))
        dot, mean_square = dot / held, mean_square / held**2
    norms = square.sqrt(), mean_square.sqrt()
    return FilterStatistics(params, sign * dot / (norms[0] * norms[1]), *norms)
