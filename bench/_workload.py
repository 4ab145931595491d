"""Parameters, and the gradients that a backward pass would bring, for the tables of optimizers."""

import torch
from torch import Tensor
from torch.nn import Parameter

from ._tables import Row

COPY = "copy_"
# In "warm" tables a step finds caches as the last step of the same row has left them, apart from
# the gradients, which are new. In "cold" ones another working set has passed through them since, as
# in the forward and backward pass of a larger model. It exceeds the last cache of most machines.
CACHES = ("warm", "cold")
OTHER_BYTES = 128 << 20


def _block(width: int, inner: int) -> list[tuple[int, int]]:
    """Returns the weights of one block: attention in and out, gate and up, down."""
    return [(3 * width, width), (width, width), (2 * inner, width), (width, inner)]


def _decoder(tokens: int, places: int, width: int, layers: int) -> list[tuple[int, ...]]:
    """Returns the weights of the decoder of the grokking recipe, written out so that the tables of
    optimizers also run beside an older trm_fast."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    block = [*norm, *norm, *attention, *mlp]
    return [(tokens, width), (places, width), *block * layers, *norm, (tokens, width)]


SIZES = {
    "TRM 7M": [*_block(512, 1536) * 2, (11, 512), (11, 512)],
    "grokking decoder": _decoder(99, 5, 128, 2),
    "100 tensors": [(64, 64)] * 100,
    "TRM 27M": [(32768, 320), *_block(320, 1024) * 12],
}


class Workload:
    """Parameters that all variants share, and the gradients that a backward pass would bring."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str, caches: str = "warm") -> None:
        self.device = device
        self._other = torch.zeros(OTHER_BYTES // 4, device=device) if caches == "cold" else None
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
        self.use_other_memory()

    def backward_into_new(self) -> None:
        """Leaves gradients that nobody else holds, as ``zero_grad(set_to_none=True)`` does."""
        for param, grad in zip(self.params, self._next_grads(), strict=True):
            param.grad = grad.clone()
        self.use_other_memory()

    def use_other_memory(self) -> None:
        """Leaves caches without anything of a step, if they are to be cold."""
        if self._other is not None:
            self._other.add_(1.0)

    def _next_grads(self) -> list[Tensor]:
        self._turn += 1
        return self.grads[(self._turn - 1) % 2]


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * 2 - 1


def _away_from_zero(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns numbers of either sign between 0.5 and 1.5, which bound what the check allows."""
    drawn = _uniform(shape, generator)
    return drawn + drawn.sign() * 0.5


def copy_row(workload: Workload) -> Row:
    """Returns a copy between arrays that together are as large as param, grad, m, v and mean."""
    source = torch.rand(workload.size * 5 // 2, device=workload.device)
    target = torch.empty_like(source)
    return Row(lambda: target.copy_(source), workload.use_other_memory, work=2 * source.nbytes)
