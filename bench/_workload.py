"""Parameters, and the gradients that a backward pass would bring, for the tables of optimizers."""

import torch
from torch import Tensor
from torch.nn import Parameter

from trm_fast.recipes.grokking.model import Decoder

from ._timing import Job

COPY = "copy_ of as many bytes"


def _block(width: int, inner: int) -> list[tuple[int, int]]:
    """Returns the weights of one block: attention in and out, gate and up, down."""
    return [(3 * width, width), (width, width), (2 * inner, width), (width, inner)]


def _grokking_shapes() -> list[tuple[int, ...]]:
    return [tuple(param.shape) for param in Decoder(tokens=99).parameters()]


SIZES = {
    "TRM 7M": [*_block(512, 1536) * 2, (11, 512), (11, 512)],
    "grokking decoder": _grokking_shapes(),
    "100 tensors": [(64, 64)] * 100,
    "TRM 27M": [(32768, 320), *_block(320, 1024) * 12],
}


class Workload:
    """Parameters that all variants share, and the gradients that a backward pass would bring."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str) -> None:
        self.device = device
        generator = torch.Generator().manual_seed(0)
        self.start = [_uniform(shape, generator).to(device) for shape in shapes]
        self.grads = [
            [_away_from_zero(shape, generator).to(device) for shape in shapes] for _ in range(2)
        ]
        self.params = [Parameter(tensor.clone()) for tensor in self.start]
        self.size = sum(param.numel() for param in self.params)
        self._places = [torch.empty_like(tensor) for tensor in self.start]
        self._turn = 0

    def reset(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.start)
        self._turn = 0

    def backward(self) -> None:
        """Writes new gradients to where the last ones lay, and undoes what a step has rebound."""
        torch._foreach_copy_(self._places, self._next_grads())
        for param, place in zip(self.params, self._places, strict=True):
            param.grad = place.detach()

    def backward_into_new(self) -> None:
        """Leaves gradients that nobody else holds, as ``zero_grad(set_to_none=True)`` does."""
        for param, grad in zip(self.params, self._next_grads(), strict=True):
            param.grad = grad.clone()

    def _next_grads(self) -> list[Tensor]:
        self._turn += 1
        return self.grads[(self._turn - 1) % 2]


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * 2 - 1


def _away_from_zero(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns numbers of either sign between 0.5 and 1.5, which bound what the check allows."""
    drawn = _uniform(shape, generator)
    return drawn + drawn.sign() * 0.5


def copy_job(workload: Workload) -> tuple[Job, float]:
    """Returns a copy between arrays that together are as large as param, grad, m, v and mean."""
    source = torch.rand(workload.size * 5 // 2, device=workload.device)
    target = torch.empty_like(source)
    return Job(COPY, lambda: target.copy_(source)), 2 * source.nbytes
