"""``RMSNorm``, alone or of a sum."""

import torch
from torch import Tensor, nn

from trm_fast.nn._init import check_sizes
from trm_fast.ops.rms_norm_residual import rms_norm_residual


class RMSNorm(nn.Module):
    """Divides by the root mean square, which ``trm_fast.ops.rms_norm_residual`` defines.

    Args:
        dim: the size of the dimension that is normalised.
        eps: added to the mean square.
        weight: whether each element has a factor, which starts at 1.
        axis: -1, over the features of each token, or -2, over the tokens, with one scale for each
            channel of a sample.

    Raises:
        ValueError: ``dim`` is not a whole number >= 1.
    """

    weight: nn.Parameter | None

    def __init__(self, dim: int, eps: float = 1e-5, weight: bool = True, *, axis: int = -1) -> None:
        super().__init__()
        check_sizes("RMSNorm", dim=dim)
        self.dim, self.eps, self.axis = dim, eps, axis
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if weight else None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns the norm of ``x + residual``.

        Args:
            x: [..., dim], or [..., dim, features] where ``axis`` is -2.
            residual: of the shape of x; None adds nothing.

        Returns:
            A tensor of the shape and dtype of x.
        """
        self._check(x)
        out = rms_norm_residual(x, residual, self.weight, dim=self.axis, eps=self.eps)
        assert isinstance(out, Tensor)
        return out

    def with_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the norm of ``x + residual``, and the sum itself."""
        self._check(x)
        out, total = rms_norm_residual(
            x, residual, self.weight, dim=self.axis, eps=self.eps, return_sum=True
        )
        return out, total

    def _check(self, x: Tensor) -> None:
        if x.dim() < -self.axis or x.shape[self.axis] != self.dim:
            raise ValueError(
                f"RMSNorm: dimension {self.axis} of x must be {self.dim}; got {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, weight={self.weight is not None}, axis={self.axis}"
