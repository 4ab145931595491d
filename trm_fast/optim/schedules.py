"""Schedules: factors by step number, for ``LambdaLR`` and, through ``OptionSchedule``, for any
other option of an optimizer."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import cos, isfinite, pi
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


class Schedule(partial[float]):
    """A factor by step number, counted from 0: ``schedule(step)``. ``a * b`` is their product.

    Schedules can be pickled. They leave nothing in the state dict of a ``LambdaLR``, so a resumed
    run follows the schedule of its own code.
    """

    def __mul__(self, other: "Schedule") -> "Schedule":
        if not isinstance(other, Schedule):
            return NotImplemented
        return Schedule(_product, self, other)


def warmup_constant(warmup_steps: int, start: float = 0.0) -> Schedule:
    """Returns a schedule that rises in a straight line from ``start`` to 1, and stays there.

        factor = start + (1 - start) * step / warmup_steps

    The first step has the factor ``start``. A warm-up over n steps that are counted from 1, as in
    the official TRM (n = 2000), is ``warmup_constant(n - 1, start=1 / n)``.

    Args:
        warmup_steps: first step with factor 1, >= 0.
        start: factor of step 0, >= 0.

    Raises:
        ValueError: an argument is out of range or not finite.
    """
    _check_warmup("warmup_constant", warmup_steps, start)
    return Schedule(_warmup_constant, warmup_steps, start)


def warmup_cosine(
    warmup_steps: int, total_steps: int, floor: float = 0.0, start: float = 0.0
) -> Schedule:
    """Returns a schedule that rises like ``warmup_constant`` and then falls along half a cosine.

        done   = (step - warmup_steps) / (total_steps - warmup_steps)
        factor = floor + (1 - floor) * (1 + cos(pi * done)) / 2

    Args:
        warmup_steps: step with factor 1, >= 0.
        total_steps: first step with factor ``floor``, which stays, > ``warmup_steps``.
        floor: last factor, >= 0; for a final learning rate of 1e-6 it is ``1e-6 / lr``.
        start: factor of step 0, >= 0, unless ``warmup_steps`` is 0.

    Raises:
        ValueError: an argument is out of range or not finite.
    """
    _check_warmup("warmup_cosine", warmup_steps, start)
    _check_factor("warmup_cosine", "floor", floor)
    if total_steps <= warmup_steps:
        raise ValueError(
            "warmup_cosine: total_steps must be larger than warmup_steps; got "
            f"{total_steps} and {warmup_steps}"
        )
    return Schedule(_warmup_cosine, warmup_steps, total_steps, floor, start)


def stages(factors: Mapping[int, float]) -> Schedule:
    """Returns a schedule that changes in jumps.

    Args:
        factors: first step of a stage to the factor of this stage, as ``{0: 0.0, 500: 1.0, 12_500:
            0.6}``; the first stage starts at 0.

    Raises:
        ValueError: no stage starts at 0, or a step or factor is negative or not finite.
    """
    if 0 not in factors:
        raise ValueError(f"stages: a stage must start at 0; got {sorted(factors)}")
    for first, factor in factors.items():
        _check_factor("stages", f"the factor from step {first}", factor)
        if first < 0:
            raise ValueError(f"stages: steps must be >= 0; got {first}")
    firsts = tuple(sorted(factors))
    return Schedule(_stages, firsts, tuple(factors[first] for first in firsts))


def _warmup_constant(warmup_steps: int, start: float, step: int) -> float:
    return 1.0 if step >= warmup_steps else start + (1 - start) * step / warmup_steps


def _warmup_cosine(
    warmup_steps: int, total_steps: int, floor: float, start: float, step: int
) -> float:
    if step < warmup_steps:
        return _warmup_constant(warmup_steps, start, step)
    done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return floor + (1 - floor) * (1 + cos(pi * done)) / 2


def _stages(firsts: tuple[int, ...], factors: tuple[float, ...], step: int) -> float:
    return factors[bisect_right(firsts, step) - 1]


def _product(first: Schedule, second: Schedule, step: int) -> float:
    return first(step) * second(step)


def _check_warmup(owner: str, warmup_steps: int, start: float) -> None:
    if warmup_steps < 0:
        raise ValueError(f"{owner}: warmup_steps must be >= 0; got {warmup_steps}")
    _check_factor(owner, "start", start)


def _check_factor(owner: str, name: str, factor: float) -> None:
    if not (isfinite(factor) and factor >= 0):
        raise ValueError(f"{owner}: {name} must be finite and >= 0; got {factor}")


class OptionSchedule:
    """Schedules an option of an optimizer as a scheduler of torch does the learning rate.

        group[option] = base * schedule(step)

    ``base`` is what the group had at construction; an option of 0 stays 0. Step 0 is in effect from
    construction on; call ``step()`` after each step of the optimizer. A tensor is written in place,
    without waiting for its device, so that a CUDA graph which reads it follows. A value written
    into the group from outside lasts until the next step; ``set_base`` is the lasting way.

    Args:
        optimizer: any torch optimizer.
        option: name of a numeric option, such as "lamb", "alpha", "weight_decay" or "momentum".
        schedule: step number to factor.
        groups: which groups: their positions, or the names under their key "component"; None means
            all that have a number under ``option`` now. Other groups are left alone.

    Raises:
        ValueError: no group, or not every one that is asked for, has a number under ``option``.

    Example:
        >>> filter_stages = stages({0: 0.0, 500: 1.0, 12_500: 0.6})
        >>> schedule = OptionSchedule(optimizer, "lamb", filter_stages, groups=["core", "memory"])
        >>> optimizer.step()
        >>> schedule.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        option: str,
        schedule: Callable[[int], float],
        groups: Iterable[int | str] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.option = option
        self.schedule = schedule
        self.last_step = 0
        self._bases = {index: self._number(index) for index in self._indices(groups)}
        self._apply()

    def _indices(self, groups: Iterable[int | str] | None) -> list[int]:
        found = self.optimizer.param_groups
        if groups is None:
            indices = [i for i, group in enumerate(found) if _is_number(group.get(self.option))]
            wanted = "any group"
        else:
            indices = sorted({i for name in groups for i in self._positions(name)})
            wanted = "groups"
        if not indices:
            raise ValueError(
                f"OptionSchedule: {wanted} must have a number under {self.option!r}; got none"
            )
        return indices

    def _positions(self, name: int | str) -> list[int]:
        found = self.optimizer.param_groups
        if isinstance(name, int):
            positions = [name] if 0 <= name < len(found) else []
        else:
            positions = [i for i, group in enumerate(found) if group.get("component") == name]
        if not positions:
            raise ValueError(f"OptionSchedule: groups must exist; got {name!r}")
        return positions

    def _number(self, index: int) -> float | Tensor:
        value: Any = self.optimizer.param_groups[index].get(self.option)
        if not _is_number(value):
            raise ValueError(
                f"OptionSchedule: {self.option!r} of group {index} must be a number or a tensor of "
                f"one element; got {value!r}"
            )
        return value.detach().clone() if isinstance(value, Tensor) else float(value)

    @torch.no_grad()
    def _apply(self) -> None:
        factor = self.factor
        for index, base in self._bases.items():
            group, value = self.optimizer.param_groups[index], base * factor
            old = group[self.option]
            if not isinstance(old, Tensor):
                group[self.option] = value
            elif isinstance(value, Tensor):
                old.copy_(value, non_blocking=True)
            else:
                old.fill_(value)

    @property
    def factor(self) -> float:
        """The factor that is in effect."""
        return float(self.schedule(self.last_step))

    def step(self) -> None:
        """Moves on by one step and sets the option."""
        self.last_step += 1
        self._apply()

    def set_base(self, value: float, groups: Iterable[int | str] | None = None) -> None:
        """Replaces what the factor multiplies, at once and for all later steps.

        Args:
            value: the new base.
            groups: some of the scheduled groups, as at construction; None means all of them.

        Raises:
            ValueError: a group is not scheduled; nothing is changed then.
        """
        chosen = [*self._bases] if groups is None else self._indices(groups)
        unknown = [index for index in chosen if index not in self._bases]
        if unknown:
            raise ValueError(
                f"OptionSchedule: groups must be among the scheduled {[*self._bases]}; got "
                f"{unknown}"
            )
        for index in chosen:
            base = self._bases[index]
            self._bases[index] = torch.full_like(base, value) if isinstance(base, Tensor) else value
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Returns the step number and the bases; the schedule itself stays in the code."""
        return {
            "option": self.option,
            "last_step": self.last_step,
            "groups": [*self._bases],
            "bases": [*self._bases.values()],  # replaced, never written
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from what ``state_dict`` returned, and sets the option.

        Raises:
            ValueError: another option or other groups were saved; nothing is loaded then.
        """
        own, saved = (self.option, [*self._bases]), (state_dict["option"], state_dict["groups"])
        if own != saved:
            raise ValueError(
                f"OptionSchedule: option and groups must be those of the state, {saved}; got {own}"
            )
        self._bases = dict(zip(own[1], state_dict["bases"], strict=True))
        self.last_step = state_dict["last_step"]
        self._apply()


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype != torch.bool
    return isinstance(value, (int, float)) and not isinstance(value, bool)
