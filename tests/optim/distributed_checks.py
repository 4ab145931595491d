"""What the tests in several processes share: exact models, data and results."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Linear

STEPS = 3


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Whole numbers of at most 8, of which no sum depends on its order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).float()


def linear(rows: int) -> Linear:
    model = Linear(6, rows)
    with torch.no_grad():
        model.weight.copy_(whole_numbers(rows, 6, seed=0) / 8)
        model.bias.copy_(whole_numbers(rows, seed=1) / 8)
    return model


def half(rank: int) -> slice:
    """The part of a batch of 8 that one of two ranks gets."""
    return slice(4 * rank, 4 * rank + 4)


def train(model: nn.Module, optimizer: Any, rows: int, part: slice) -> None:
    """Steps on its part of each batch of 8; the gradient of the weight is the mean of y x^T."""
    for t in range(STEPS):
        x, y = whole_numbers(8, 6, seed=10 + t)[part], whole_numbers(8, rows, seed=20 + t)[part]
        optimizer.zero_grad()
        (model(x) * y).sum(1).mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor, gathered from all ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
