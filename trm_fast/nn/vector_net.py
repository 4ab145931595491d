"""The two networks of a recursive model on vectors."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu

from trm_fast._dispatch import note_fallback
from trm_fast.nn._hooks import is_hooked, overrides
from trm_fast.ops.vector_latent_update import EPS, vector_latent_update

Scale = Sequence[float] | Tensor | Callable[[int], float | Tensor]


class VectorNet(nn.Module):
    """The networks of a recursive model whose states are vectors.

        net_z(x, y, z) = LN_z(A2 gelu(A1 [x; y; z] + a1) + a2)
        net_y(y, z) = LN_y(C2 gelu(C1 [y; z] + c1) + c2)

    ``Recursion(VectorNet(h), n, T, step_scale=...)`` adds s_l times these to the states, and runs
    all of it as the op ``vector_latent_update``. Parameters start as torch starts its layers.

    Source: Jolicoeur-Martineau 2025, arXiv:2510.04871, for the recursion.

    Args:
        hidden: size h of x, y and z, >= 1.
        dropout: share of gelu's outputs that are zeroed in training, 0 <= dropout < 1.

    Raises:
        ValueError: ``hidden`` or ``dropout`` is out of range.

    Example:
        >>> net = trm_fast.nn.VectorNet(64)
        >>> recursion = trm_fast.nn.Recursion(net, n=6, T=3, step_scale=[1.0, 0.6, 0.4])
        >>> x = torch.randn(8, 64)
        >>> y, z = recursion(x, torch.zeros_like(x), torch.zeros_like(x))
    """

    # Options of `Recursion` that fused_recursion takes.
    fused_options = ("y_every_step", "step_scale")
    fused_op = "vector_latent_update"

    def __init__(self, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"VectorNet: hidden must be a whole number >= 1; got {hidden!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"VectorNet: dropout must be 0 <= dropout < 1; got {dropout!r}")
        self.hidden, self.dropout = hidden, dropout
        self.z_in, self.z_out = nn.Linear(3 * hidden, hidden), nn.Linear(hidden, hidden)
        self.z_norm = nn.LayerNorm(hidden)
        self.y_in, self.y_out = nn.Linear(2 * hidden, hidden), nn.Linear(hidden, hidden)
        self.y_norm = nn.LayerNorm(hidden)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, dropout={self.dropout}"

    @property
    def draws_nothing(self) -> bool:
        """Whether a call draws no random numbers, which a recomputation would have to repeat."""
        return not (self.training and self.dropout > 0.0)

    def weights(self) -> list[Tensor]:
        """Returns the 12 parameters in the order of ``trm_fast.ops.vector_latent_update``."""
        layers = (self.z_in, self.z_out, self.z_norm, self.y_in, self.y_out, self.y_norm)
        return [tensor for layer in layers for tensor in (layer.weight, layer.bias)]

    def inject(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns what updates of z need of x and y."""
        return torch.cat((x, y), -1)

    def update_z(self, z: Tensor, injection: Tensor, level: int) -> Tensor:
        """Returns net_z; the same on every level."""
        inner = gelu(self.z_in(torch.cat((injection, z), -1)))
        out: Tensor = self.z_norm(self.z_out(dropout(inner, self.dropout, self.training)))
        return out

    def update_y(self, y: Tensor, z: Tensor, level: int) -> Tensor:
        """Returns net_y; the same on every level."""
        inner = gelu(self.y_in(torch.cat((y, z), -1)))
        out: Tensor = self.y_norm(self.y_out(dropout(inner, self.dropout, self.training)))
        return out

    def fused_recursion(
        self,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        *,
        n: int,
        T: int,
        grad_cycles: int = 1,
        recompute: bool = True,
        y_every_step: bool = False,
        step_scale: Scale | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Runs the recursion as one op.

        Args:
            x, y, z: input and states, [batch, hidden].
            step_scale: T numbers, or a function that returns that of a level.
            n, T, grad_cycles, recompute, y_every_step, backend: as for
                ``trm_fast.ops.vector_latent_update``.

        Returns:
            (y, z) after it; None, with the reason among the fallbacks in ``trm_fast.backends()``,
            where the op does not do what this module does: without
            ``step_scale``, with tensors in it, with active dropout, for x, y and z of several
            shapes or dimensions, and where a layer has a hook or is not the original one.
        """
        scales = _numbers(step_scale, T)
        alike = x.dim() == 2 and x.shape == y.shape == z.shape and x.dtype == y.dtype == z.dtype
        reason = self._unfused(scales, alike)
        if reason is not None:
            note_fallback(self.fused_op, x.device.type, x.dtype, "layer by layer", reason)
            return None
        return vector_latent_update(
            x,
            y,
            z,
            self.weights(),
            step_scales=scales,
            n=n,
            T=T,
            grad_cycles=grad_cycles,
            y_every_step=y_every_step,
            recompute=recompute,
            backend=backend,
        )

    def _unfused(self, scales: list[float] | None, alike: bool) -> str | None:
        """Returns what the op does not do of this call, or None."""
        if scales is None:
            return "step_scale is not given as numbers"
        if not alike:
            return "x, y and z are not [batch, hidden] of one shape and dtype"
        if not self.draws_nothing:
            return "random numbers are drawn"
        changed = overrides(self, VectorNet, "inject", "update_z", "update_y", "weights")
        if changed is not None:
            return f"{type(self).__name__} has a {changed} of its own"
        return None if self._is_plain() else "a layer has hooks, or is another one"

    def _is_plain(self) -> bool:
        layers: list[Any] = list(self.children())
        kinds = [nn.Linear, nn.Linear, nn.LayerNorm] * 2
        if [type(layer) for layer in layers] != kinds or any(map(is_hooked, layers)):
            return False
        return all(layer.eps == EPS for layer in (layers[2], layers[5]))


def _numbers(scale: Scale | None, T: int) -> list[float] | None:
    """Returns the scales of all levels, or None if they are not all plain numbers."""
    if scale is None or isinstance(scale, Tensor):
        return None
    found = [scale(level) for level in range(T)] if callable(scale) else list(scale)
    return found if all(isinstance(s, Real) for s in found) else None  # type: ignore[return-value]
