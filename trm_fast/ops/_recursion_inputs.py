"""Random inputs for the examples of ``latent_update`` and ``vector_latent_update``."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RecursionInputs:
    """Arguments of a recursion: x, y and z, gradients of the y and z that it returns, weights."""

    states: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]

    def copy(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> "RecursionInputs":
        """Returns copies in another dtype, on another device."""
        parts = (self.states, self.grads, self.weights)
        return RecursionInputs(
            *(tuple(tensor.to(device, dtype, copy=True) for tensor in part) for part in parts)
        )


def draw(shape: tuple[int, ...], weights: Iterable[tuple[int, ...]]) -> RecursionInputs:
    """Returns states of a shape and weights of some shapes, in float32 on the CPU.

    A weight has variance 1 / columns, so that products are about as large as the states.
    """
    generator = torch.Generator().manual_seed(0)
    states, grads = (
        tuple(torch.randn(shape, generator=generator) for _ in range(count)) for count in (3, 2)
    )
    scaled = (torch.randn(size, generator=generator) / size[-1] ** 0.5 for size in weights)
    return RecursionInputs(states, grads, tuple(scaled))
