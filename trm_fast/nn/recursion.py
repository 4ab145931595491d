"""``Recursion``: the engine of a tiny recursive model, around any network."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trm_fast._dispatch import note_fallback
from trm_fast.ops._recurse import Cell, recurse

Scale = Sequence[float] | Tensor | Callable[[int], float | Tensor]
Taps = Callable[[int, Tensor, Tensor], object] | list[tuple[Tensor, Tensor]]


class _Schedule(NamedTuple):
    """The counts and the scale of one call."""

    n: int
    T: int
    grad_cycles: int
    step_scale: Scale | None


class Recursion(nn.Module):
    """Improves a latent z and an answer y by calling one small network again and again.

        T cycles of:   n times  z <- net(z, y + x)      then   y <- net(y, z)

    Only the last ``grad_cycles`` cycles carry gradients. The network is any module that takes a
    state and an injection, such as ``Blocks`` or your own. With ``net_y`` there are two networks:

        z <- net(x, y, z)      y <- net_y(y, z)

    and with ``step_scale``, s being that of the cycle, each adds to its state, whichever they are:

        z <- z + s * net(...)      y <- y + s * net_y(...)

    A network may also have any of
        ``inject(x, y)``, ``update_z(z, injection, level)`` and ``update_y(y, z, level)``, all
        three, which then stand for the calls above (``level`` counts the cycles from 0);
        ``fused_recursion(x, y, z, *, n, T, grad_cycles, recompute)``, which returns (y, z) after
        the whole recursion, or None. It is tried first, if none of ``net_y``, ``y_every_step``,
        ``step_scale``, ``detach``, ``taps``, hooks and context is used; those named in its
        ``fused_options`` it gets as arguments; ``fused_op`` names the op among whose fallbacks
        ``trm_fast.backends()`` then says why it was not used;
        ``draws_nothing``, which says that it has no dropout. Otherwise recomputation saves and
        restores the state of the random numbers, for which a GPU is waited for.

    A call may have counts of its own: ``recursion(x, y, z, n=2, T=8)``.

    Source: Jolicoeur-Martineau 2025, arXiv:2510.04871, figure 3.

    Args:
        net: the network.
        n: updates of z in a cycle, >= 1.
        T: cycles, >= 1.
        net_y: the network of y, if it has one of its own.
        y_every_step: whether y follows each update of z, instead of the last of a cycle.
        step_scale: T numbers, a tensor of them (a parameter is trained), or a function of the
            level.
        detach: whether gradients end at the start of each cycle.
        grad_cycles: how many cycles, the last ones, carry gradients; 0 to T.
        recompute: whether the backward pass runs each call anew, from its inputs, which alone are
            kept. Gradients are the same, dropout too.
        taps: called with level, y and z after each cycle, or a list, which after a call holds the
            pair (y, z) of each of its cycles.

    Raises:
        ValueError: ``n``, ``T``, ``grad_cycles`` or the length of ``step_scale`` is out of range.
        TypeError: ``step_scale`` is neither a sequence nor a function.

    Example:
        >>> recursion = trm_fast.nn.Recursion(trm_fast.nn.Blocks(64, heads=4), n=6, T=3)
        >>> x = torch.randn(2, 10, 64)
        >>> y, z = recursion(x, torch.zeros_like(x), torch.zeros_like(x))
    """

    def __init__(
        self,
        net: nn.Module,
        n: int = 6,
        T: int = 3,
        *,
        net_y: nn.Module | None = None,
        y_every_step: bool = False,
        step_scale: Scale | None = None,
        detach: bool = False,
        grad_cycles: int = 1,
        recompute: bool = True,
        taps: Taps | None = None,
    ) -> None:
        super().__init__()
        _check(_Schedule(n, T, grad_cycles, step_scale))
        self.net, self.net_y = net, net_y
        self.n, self.T, self.grad_cycles = n, T, grad_cycles
        self.y_every_step, self.detach, self.recompute = y_every_step, detach, recompute
        self.step_scale, self.taps = step_scale, taps

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        *,
        n: int | None = None,
        T: int | None = None,
        grad_cycles: int | None = None,
        step_scale: Scale | None = None,
        **context: Any,
    ) -> tuple[Tensor, Tensor]:
        """Returns y and z after T cycles.

        Args:
            x: embedded input, of a shape that the network takes.
            y, z: states, which can be added to x unless the network says otherwise.
            n, T, grad_cycles, step_scale: for this call only; None means those of the module.
            **context: given to every call of the network, as ``padding``.

        Returns:
            (y, z).

        Raises:
            ValueError: a count or the length of ``step_scale`` is out of range.
        """
        schedule = self._schedule(n, T, grad_cycles, step_scale)
        fused = self._fused(x, y, z, schedule, context)
        if fused is not None:
            return fused
        if isinstance(self.taps, list):
            self.taps.clear()
        return recurse(
            self._cell(schedule.step_scale, context),
            x,
            y,
            z,
            n=schedule.n,
            T=schedule.T,
            grad_cycles=schedule.grad_cycles,
            y_every_step=self.y_every_step,
            detach=self.detach,
            recompute=self.recompute and self._has_gradients(x, y, z),
            preserve_rng_state=not self._draws_nothing(),
            tap=None if self.taps is None else self._tap,
        )

    def _schedule(
        self, n: int | None, T: int | None, grad_cycles: int | None, step_scale: Scale | None
    ) -> _Schedule:
        own = _Schedule(self.n, self.T, self.grad_cycles, self.step_scale)
        if n is None and T is None and grad_cycles is None and step_scale is None:
            return own
        schedule = _Schedule(
            own.n if n is None else n,
            own.T if T is None else T,
            own.grad_cycles if grad_cycles is None else grad_cycles,
            own.step_scale if step_scale is None else step_scale,
        )
        _check(schedule)
        return schedule

    def _fused(
        self, x: Tensor, y: Tensor, z: Tensor, schedule: _Schedule, context: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        run = getattr(self.net, "fused_recursion", None)
        if run is None:
            return None
        options = {
            "y_every_step": self.y_every_step,
            "step_scale": schedule.step_scale,
            "detach": self.detach,
            **context,
        }
        options = {name: v for name, v in options.items() if v is not None and v is not False}
        reason = self._unfused(options)
        if reason is not None:
            op = getattr(self.net, "fused_op", None)
            if op is not None:
                note_fallback(op, x.device.type, x.dtype, "layer by layer", reason)
            return None
        counts = {"n": schedule.n, "T": schedule.T, "grad_cycles": schedule.grad_cycles}
        return run(x, y, z, **counts, recompute=self.recompute, **options)  # type: ignore[no-any-return]

    def _unfused(self, options: dict[str, Any]) -> str | None:
        """Returns what of this module no fused form does, or None."""
        if self.taps is not None:
            return "there are taps"
        if self.net_y is not None:
            return "there is a second network"
        known = getattr(self.net, "fused_options", ())
        lacking = [name for name in options if name not in known]
        return f"{lacking[0]} is no option of the fused form" if lacking else None

    def _cell(self, step_scale: Scale | None, context: dict[str, Any]) -> Cell:
        cell: Cell
        if self.net_y is not None:
            cell = _TwoNets(self.net, self.net_y, context)
        elif hasattr(self.net, "update_z"):
            cell = _OwnUpdates(self.net, context)
        else:
            cell = _OneNet(self.net, context)
        return cell if step_scale is None else _Scaled(cell, step_scale)

    def _has_gradients(self, *inputs: Tensor) -> bool:
        # The compiler cannot trace a recomputation that nothing asks for; else it costs nothing.
        if not torch.compiler.is_compiling():
            return True
        return any(tensor.requires_grad for tensor in (*inputs, *self.parameters()))

    def _draws_nothing(self) -> bool:
        nets = (self.net,) if self.net_y is None else (self.net, self.net_y)
        return all(getattr(net, "draws_nothing", False) for net in nets)

    def _tap(self, level: int, y: Tensor, z: Tensor) -> None:
        if isinstance(self.taps, list):
            self.taps.append((y, z))
        elif self.taps is not None:
            self.taps(level, y, z)

    def extra_repr(self) -> str:
        return (
            f"n={self.n}, T={self.T}, grad_cycles={self.grad_cycles}, recompute={self.recompute}, "
            f"y_every_step={self.y_every_step}, detach={self.detach}"
        )


class _OneNet:
    """One network of a state and an injection serves both updates."""

    def __init__(self, net: nn.Module, context: dict[str, Any]) -> None:
        self.net, self.context = net, context

    def inject(self, x: Tensor, y: Tensor) -> Tensor:
        return y + x

    def update_z(self, z: Tensor, injection: Tensor, level: int) -> Tensor:
        return self.net(z, injection, **self.context)  # type: ignore[no-any-return]

    def update_y(self, y: Tensor, z: Tensor, level: int) -> Tensor:
        return self.net(y, z, **self.context)  # type: ignore[no-any-return]


class _OwnUpdates:
    """The network defines its own updates."""

    def __init__(self, net: Any, context: dict[str, Any]) -> None:
        self.net, self.context = net, context

    def inject(self, x: Tensor, y: Tensor) -> Any:
        return self.net.inject(x, y)

    def update_z(self, z: Tensor, injection: Any, level: int) -> Tensor:
        return self.net.update_z(z, injection, level, **self.context)  # type: ignore[no-any-return]

    def update_y(self, y: Tensor, z: Tensor, level: int) -> Tensor:
        return self.net.update_y(y, z, level, **self.context)  # type: ignore[no-any-return]


class _TwoNets:
    """Each update has its network, which sees the states one by one."""

    def __init__(self, net: nn.Module, net_y: nn.Module, context: dict[str, Any]) -> None:
        self.net, self.net_y, self.context = net, net_y, context

    def inject(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y

    def update_z(self, z: Tensor, injection: tuple[Tensor, Tensor], level: int) -> Tensor:
        return self.net(*injection, z, **self.context)  # type: ignore[no-any-return]

    def update_y(self, y: Tensor, z: Tensor, level: int) -> Tensor:
        return self.net_y(y, z, **self.context)  # type: ignore[no-any-return]


class _Scaled:
    """Adds a multiple of another cell's updates to the states."""

    def __init__(self, cell: Cell, scale: Scale) -> None:
        self.cell, self.scale = cell, scale

    def inject(self, x: Tensor, y: Tensor) -> Any:
        return self.cell.inject(x, y)

    def update_z(self, z: Tensor, injection: Any, level: int) -> Tensor:
        return z + self._at(level) * self.cell.update_z(z, injection, level)

    def update_y(self, y: Tensor, z: Tensor, level: int) -> Tensor:
        return y + self._at(level) * self.cell.update_y(y, z, level)

    def _at(self, level: int) -> float | Tensor:
        return self.scale(level) if callable(self.scale) else self.scale[level]


def _check(schedule: _Schedule) -> None:
    T, grad_cycles, scale = schedule.T, schedule.grad_cycles, schedule.step_scale
    for name, value in {"n": schedule.n, "T": T}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"Recursion: {name} must be a whole number >= 1; got {value!r}")
    whole = isinstance(grad_cycles, int) and not isinstance(grad_cycles, bool)
    if not whole or not 0 <= grad_cycles <= T:
        raise ValueError(
            f"Recursion: grad_cycles must be a whole number from 0 to T={T}; got {grad_cycles!r}"
        )
    if scale is None or callable(scale):
        return
    is_sequence = hasattr(scale, "__len__") and hasattr(scale, "__getitem__")
    if isinstance(scale, str) or not is_sequence:
        raise TypeError(
            "Recursion: step_scale must be a sequence of numbers, a function of the level or None; "
            f"got {scale!r}"
        )
    if len(scale) != T:
        raise ValueError(f"Recursion: step_scale must have T={T} numbers; got {len(scale)}")
