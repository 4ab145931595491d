"""``SwiGLU``: the gated feed-forward layer."""

from math import ceil

import torch
from torch import Tensor, nn

from trm_fast.nn._init import check_sizes, weight
from trm_fast.ops.swiglu import swiglu


def inner_width(width: int, expansion: float = 4.0) -> int:
    """Returns the inner width of a gated layer with about as many weights as a plain one that
    expands ``expansion``-fold: 2/3 of that, rounded up to a multiple of 256 (512 gives 1536)."""
    return 256 * ceil(round(expansion * width * 2 / 3) / 256)


class SwiGLU(nn.Module):
    """Gated layer ``down(silu(gate x) * (up x))``, which ``trm_fast.ops.swiglu`` defines.

    Args:
        width: features that come in and go out.
        inner: inner width; None computes it by ``inner_width`` from ``expansion``.
        expansion: of the plain layer of equal size, > 0.
        bias: whether the result has a bias, which starts at 0.

    Raises:
        ValueError: a size is not a whole number >= 1.
    """

    bias: nn.Parameter | None

    def __init__(
        self, width: int, inner: int | None = None, *, expansion: float = 4.0, bias: bool = False
    ) -> None:
        super().__init__()
        check_sizes("SwiGLU", width=width)
        inner = inner_width(width, expansion) if inner is None else inner
        check_sizes("SwiGLU", inner=inner)
        self.width, self.inner = width, inner
        self.gate_up = weight(2 * inner, width)
        self.down = weight(width, inner)
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer of x [..., width], of its shape and dtype."""
        return swiglu(x, self.gate_up, self.down, self.bias)

    def extra_repr(self) -> str:
        return f"{self.width}, inner={self.inner}, bias={self.bias is not None}"
