"""Halting heads: the logits of whether an answer is finished."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trm_fast.nn._init import check_sizes
from trm_fast.ops._autocast import without_autocast

# sigmoid(-5) = 0.7 %: in the beginning nothing halts.
_BIAS = -5.0


class _Head(nn.Module):
    """A product with weights that start at 0, in float32 (float64 for float64)."""

    def __init__(self, width: int, outputs: int, bias: float) -> None:
        super().__init__()
        check_sizes(type(self).__name__, width=width, outputs=outputs)
        self.weight = nn.Parameter(torch.zeros(outputs, width))
        self.bias = nn.Parameter(torch.full((outputs,), bias))

    def _logits(self, state: Tensor) -> Tensor:
        real = torch.float64 if state.dtype == torch.float64 else torch.float32
        with without_autocast(state):
            return linear(state.to(real), self.weight.to(real), self.bias.to(real))


class QTokenHalt(_Head):
    """Logits of halting and of going on, read from the first position of y.

    Weights start at 0 and biases at -5, so that in the beginning nothing halts.

    Args:
        width: features of y.
        outputs: number of logits.
        bias: where the biases start.

    Raises:
        ValueError: a size is not a whole number >= 1.
    """

    def __init__(self, width: int, outputs: int = 2, bias: float = _BIAS) -> None:
        super().__init__(width, outputs, bias)

    def forward(self, y: Tensor) -> Tensor:
        """Returns logits [batch, outputs] of y [batch, length, width]; float32, or float64 for
        float64."""
        return self._logits(y[:, 0])


class PooledHalt(_Head):
    """Logits of halting, read from the mean of y over its real tokens.

    Args:
        width: features of y.
        outputs: number of logits.
        bias: where the biases start.

    Raises:
        ValueError: a size is not a whole number >= 1.
    """

    def __init__(self, width: int, outputs: int = 1, bias: float = _BIAS) -> None:
        super().__init__(width, outputs, bias)

    def forward(self, y: Tensor, padding: Tensor | None = None) -> Tensor:
        """Returns the logits.

        Args:
            y: [batch, length, width].
            padding: bool [batch, length], True for a real token; None means all. The mean of a
                sequence without any is 0.

        Returns:
            [batch, outputs], float32, or float64 for float64.
        """
        y = y.to(torch.float64 if y.dtype == torch.float64 else torch.float32)
        if padding is None:
            return self._logits(y.mean(1))
        real = y.masked_fill(~padding[..., None], 0.0)
        return self._logits(real.sum(1) / padding.sum(1, keepdim=True).clamp(min=1))
