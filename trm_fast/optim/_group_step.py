"""A step that is checked and ready to be taken, and what a filter sees at it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trm_fast.ops import FilterSums, Settings, adaptive_step_
from trm_fast.optim._plan import Keys, Plan, add_shards, local, local_grad, parts, state_lists
from trm_fast.optim._states import RING, SUM, State


@dataclass(frozen=True, slots=True)
class GroupStep:
    """The step of a group, checked and ready to be taken."""

    plan: Plan
    grads: list[Tensor]
    settings: Settings

    def measure(self) -> list[Tensor]:
        """Returns sums as ``FilterSums`` does, over means too if the filter needs them."""
        return self.plan.measure(self.grads, self.settings.reduces)

    def __call__(self) -> None:
        self.plan.step(self.grads, self.settings)


@dataclass(frozen=True, slots=True)
class CompiledStep:
    """The same, through the dispatcher."""

    keys: Keys
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    settings: Settings
    backend: str | None

    def measure(self) -> list[Tensor]:
        """Returns sums in which only those of squares are filled in; the op takes its own."""
        if not self.grads:
            return []
        squares = torch.stack(torch._foreach_norm(self.grads, dtype=torch.float32)).double() ** 2
        return [squares[:, None].expand(-1, 3)]

    def __call__(self) -> None:
        for part in parts(self.keys, self.params, self.states):
            lists = state_lists(self.keys, [self.states[i] for i in part])
            adaptive_step_(
                [self.params[i] for i in part],
                [self.grads[i] for i in part],
                *lists,
                settings=self.settings,
                backend=self.backend,
            )


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
