"""The recursive classifier on feature vectors."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trm_fast.losses import PHI, complexity
from trm_fast.nn import Recursion
from trm_fast.nn.evaluating import evaluating
from trm_fast.nn.vector_net import VectorNet

State = tuple[Tensor, Tensor, Tensor | None]


class Prediction(NamedTuple):
    """What ``TinyRecursiveModel.predict`` returns.

    Args:
        classes: the most likely class of each sample, [batch], int64.
        levels: levels that were run for it, [batch], int64.
    """

    classes: Tensor
    levels: Tensor


class TinyRecursiveModel(nn.Module):
    """Classifies feature vectors f by a recursion on two states y and z, which start at zero.

        x = W_in f + b
        level l = 0 .. T-1, n micro-steps each, with s = phi^-l:
            z <- z + s LN_z(A2 gelu(A1 [x; y; z] + a1) + a2)
            y <- y + s LN_y(C2 gelu(C1 [y; z] + c1) + c2)
        logits = W_out LN_out(y) + b_out

    Levels 0 to T-2 run without gradient. phi is the golden ratio: each level takes steps smaller by
    it, and is counted as dearer by it in ``get_complexity``; the number of micro-steps stays n.

    With ``halt`` a head on z gives the probability to halt after each level. The states do not
    depend on it: it serves the expected complexity in ``TRMLoss`` and ``predict(early_exit=True)``.

    Args:
        input_dim: size of the features, >= 1.
        hidden_dim: size h of x, y and z, >= 1; with ``halt`` >= 2.
        output_dim: number of classes, >= 1.
        max_depth: largest T, >= 1.
        dropout: share of gelu's outputs that are zeroed in training, 0 <= dropout < 1.
        y_every_step: whether y follows each update of z, instead of the last of a level, which is
            the order of the paper.
        halt: whether there is a halting head h -> h/2 -> gelu -> 1.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> model = TinyRecursiveModel(input_dim=128, hidden_dim=256, output_dim=10)
        >>> logits = model(torch.randn(32, 128), T=3, n=6)
    """

    def __init__(
        self,
        input_dim: int = 128,
        hidden_dim: int = 256,
        output_dim: int = 10,
        max_depth: int = 5,
        *,
        dropout: float = 0.0,
        y_every_step: bool = True,
        halt: bool = False,
    ) -> None:
        super().__init__()
        _check_size("input_dim", input_dim, 1)
        _check_size("hidden_dim", hidden_dim, 2 if halt else 1)
        _check_size("output_dim", output_dim, 1)
        _check_size("max_depth", max_depth, 1)
        self.input_dim, self.output_dim, self.max_depth = input_dim, output_dim, max_depth
        self.embed = nn.Linear(input_dim, hidden_dim)
        # What a micro-step keeps for the backward pass is small beside the weights.
        self.recursion = Recursion(
            VectorNet(hidden_dim, dropout), y_every_step=y_every_step, recompute=False
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.head = nn.Linear(hidden_dim, output_dim)
        self.halt_head = _halt_head(hidden_dim) if halt else None

    def forward(
        self, features: Tensor, T: int = 3, n: int = 6, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """Returns the logits after T levels.

        Args:
            features: [batch, input_dim], floating point.
            T: levels, 1 <= T <= max_depth.
            n: micro-steps per level, >= 1.
            return_state: whether to return the states too.

        Returns:
            Logits [batch, output_dim]; with ``return_state`` the pair of logits and
            (y, z, halt_probs): states [batch, hidden_dim] and the probability to halt after each
            level, [batch, T], or None without halting head.

        Raises:
            ValueError: ``T``, ``n`` or the shape of ``features`` does not fit.
        """
        self._check_depth(T, n)
        x, y, z = self._start(features)
        if self.halt_head is None or not return_state:
            y, z = self._run(x, y, z, n, range(T))
            halt_probs = None
        else:
            y, z, halt_probs = self._run_with_halting(x, y, z, n, T)
        logits: Tensor = self.head(self.norm(y))
        return (logits, (y, z, halt_probs)) if return_state else logits

    def get_complexity(self, T: int, n: int = 6) -> float:
        """Returns the sum of n phi^l over the levels l = 0 .. T-1.

        Args:
            T: levels, 1 <= T <= max_depth.
            n: micro-steps per level, >= 1.

        Raises:
            ValueError: ``T`` or ``n`` is out of range.
        """
        self._check_depth(T, n)
        return complexity(T, n)

    @torch.no_grad()
    def predict(
        self, features: Tensor, T: int = 3, n: int = 6, early_exit: bool = False
    ) -> Prediction:
        """Returns the most likely classes, without dropout and gradient.

        Args:
            features, T, n: as for ``forward``.
            early_exit: whether a sample leaves the batch after the first level whose probability to
                halt is above 1/2. Waits for the device once per level.

        Returns:
            A ``Prediction``.

        Raises:
            ValueError: an argument does not fit, or ``early_exit`` without halting head.
        """
        self._check_depth(T, n)
        if early_exit and self.halt_head is None:
            raise ValueError(
                "TinyRecursiveModel.predict: early_exit needs halt=True; got a model without"
            )
        with evaluating(self):
            return self._predict(*self._start(features), T, n, early_exit)

    def _predict(
        self, x: Tensor, y: Tensor, z: Tensor, T: int, n: int, early_exit: bool
    ) -> Prediction:
        left = torch.arange(len(x), device=x.device)
        last, levels = torch.empty_like(y), torch.full_like(left, T)
        for level in range(T):
            y, z = self._run(x, y, z, n, range(level, level + 1))
            last[left] = y
            levels[left] = level + 1
            if not early_exit or level == T - 1:
                continue
            going = (self._halt_probs(z) <= 0.5).nonzero()[:, 0]
            if not len(going):
                break
            left, x, y, z = left[going], x[going], y[going], z[going]
        return Prediction(self.head(self.norm(last)).argmax(-1), levels)

    def _start(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if features.dim() != 2 or features.shape[1] != self.input_dim:
            raise ValueError(
                f"TinyRecursiveModel: features must be [batch, {self.input_dim}]; got "
                f"{tuple(features.shape)}"
            )
        x: Tensor = self.embed(features)
        return x, torch.zeros_like(x), torch.zeros_like(x)

    def _run(self, x: Tensor, y: Tensor, z: Tensor, n: int, levels: range) -> tuple[Tensor, Tensor]:
        """Runs some levels, of which the last carries gradients."""
        scale = [PHI**-level for level in levels]
        out: tuple[Tensor, Tensor] = self.recursion(x, y, z, n=n, T=len(levels), step_scale=scale)
        return out

    def _run_with_halting(
        self, x: Tensor, y: Tensor, z: Tensor, n: int, T: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs level by level, which the head looks at in between."""
        probs = []
        for level in range(T):
            with torch.set_grad_enabled(torch.is_grad_enabled() and level == T - 1):
                y, z = self._run(x, y, z, n, range(level, level + 1))
            probs.append(self._halt_probs(z))
        return y, z, torch.stack(probs, 1)

    def _halt_probs(self, z: Tensor) -> Tensor:
        return self.halt_head(z)[:, 0].sigmoid()  # type: ignore[misc, no-any-return]

    def _check_depth(self, T: int, n: int) -> None:
        whole = all(isinstance(count, int) and not isinstance(count, bool) for count in (T, n))
        if not whole or not 1 <= T <= self.max_depth or n < 1:
            raise ValueError(
                "TinyRecursiveModel: T must be a whole number from 1 to max_depth="
                f"{self.max_depth} and n >= 1; got T={T!r}, n={n!r}"
            )

    def extra_repr(self) -> str:
        return f"max_depth={self.max_depth}"


def _halt_head(hidden: int) -> nn.Sequential:
    half = hidden // 2
    return nn.Sequential(nn.Linear(hidden, half), nn.GELU(), nn.Linear(half, 1))


def _check_size(name: str, size: int, least: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < least:
        raise ValueError(
            f"TinyRecursiveModel: {name} must be a whole number >= {least}; got {size!r}"
        )
