"""The loop of a recursive model, for any network: cycles of z, then y, of which the last carry
gradients. `latent_update` means this loop, and `trm_fast.nn.Recursion` runs it."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trm_fast._autograd import is_transformed

Tap = Callable[[int, Tensor, Tensor], None]


class Cell(Protocol):
    """A network as the loop sees it."""

    def inject(self, x: Tensor, y: Tensor) -> Any:
        """Returns what updates of z need of x and y; computed once for all with the same y."""

    def update_z(self, z: Tensor, injection: Any, level: int) -> Tensor:
        """Returns the next z; ``level`` counts cycles from 0."""

    def update_y(self, y: Tensor, z: Tensor, level: int) -> Tensor:
        """Returns the next y."""


def recurse(
    cell: Cell,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    *,
    n: int,
    T: int,
    grad_cycles: int = 1,
    y_every_step: bool = False,
    detach: bool = False,
    recompute: bool = True,
    preserve_rng_state: bool = True,
    tap: Tap | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs T cycles of n updates of z and one of y, or of n pairs of both.

    Args:
        cell: the network.
        x, y, z: input and states; of any kind that the cell takes.
        n: updates of z in a cycle, >= 1.
        T: cycles, >= 1.
        grad_cycles: the last cycles, which carry gradients; the others run without.
        y_every_step: whether y follows every update of z, instead of the last of a cycle.
        detach: whether gradients end at the start of each cycle.
        recompute: whether the backward pass runs each update anew from its inputs, which alone are
            kept, instead of keeping what is inside; never inside torch.func.
        preserve_rng_state: whether it then draws the same random numbers, for dropout.
        tap: called with level, y and z after each cycle.

    Returns:
        (y, z) after the last cycle.
    """
    with_grad = torch.is_grad_enabled()
    # torch's checkpoints know no transform.
    recompute = recompute and not is_transformed()
    for level in range(T):
        # A branch: inside torch.compile counts may be symbols, and set_grad_enabled takes none.
        carries_grad = True if with_grad and level >= T - grad_cycles else False
        if detach:
            y, z = y.detach(), z.detach()
        with torch.set_grad_enabled(carries_grad):
            run = _Recomputed(preserve_rng_state) if carries_grad and recompute else _call
            y, z = _cycle(cell, run, x, y, z, n, level, y_every_step)
        if tap is not None:
            tap(level, y, z)
    return y, z


def _cycle(
    cell: Cell,
    run: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    z: Tensor,
    n: int,
    level: int,
    y_every_step: bool,
) -> tuple[Tensor, Tensor]:
    injection = cell.inject(x, y)
    for step in range(n):
        z = run(cell.update_z, z, injection, level)
        if y_every_step or step == n - 1:
            y = run(cell.update_y, y, z, level)
        if y_every_step and step < n - 1:
            injection = cell.inject(x, y)
    return y, z


def _call(update: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return update(*inputs)


class _Recomputed:
    """Calls an update so that its backward pass runs it once more."""

    def __init__(self, preserve_rng_state: bool) -> None:
        self.preserve_rng_state = preserve_rng_state

    def __call__(self, update: Callable[..., Tensor], *inputs: Any) -> Tensor:
        out: Tensor = checkpoint(
            update, *inputs, use_reentrant=False, preserve_rng_state=self.preserve_rng_state
        )
        return out
