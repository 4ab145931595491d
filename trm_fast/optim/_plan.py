"""The step of a parameter group, checked once and kept as long as the same tensors take it."""

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from trm_fast._dispatch import named_backend
from trm_fast.ops import AdaptiveStep, Settings

State = dict[str, Any]


def state_lists(names: tuple[str, ...], states: Sequence[State]) -> list[list[Tensor]]:
    """Returns states that are alike as ``adaptive_step_`` takes them.

    A mean that exists goes on while lamb is 0; an average of weights that is not wanted rests.
    """
    order = ("exp_avg", "exp_avg_sq", "step", "grok_exp_avg", "grok_step", "weight_ema")
    used = [n for n in order if n in names or (n.startswith("grok") and n in states[0])]
    return [[state[name] for state in states] if name in used else [] for name in order]


def parts(params: Sequence[Tensor], states: Sequence[State]) -> list[list[int]]:
    """Returns the indices that take their step in one call: one device, one arithmetic, and all
    with a mean or all without."""
    members: dict[tuple[Any, ...], list[int]] = {}
    for index, (param, state) in enumerate(zip(params, states, strict=True)):
        double = param.dtype in (torch.float64, torch.complex128)
        kind = (param.device, double, "grok_exp_avg" in state)
        members.setdefault(kind, []).append(index)
    return list(members.values())


class Plan:
    """The step of a group, checked once, as long as the same tensors take it.

    Gradients are those that ``local_grad`` returns; with ``plain`` parameters that is all of them.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        backend: str | None,
    ) -> None:
        self._names = names
        self._backends = (backend, named_backend())
        self._params = list(params)
        self._states = states
        self._tensors = [*chain.from_iterable(map(dict.values, states)), _END]
        self.plain = all(map(is_plain, params))
        self._indices = parts(params, states)
        self._steps = [self._make_step(part, grads, backend) for part in self._indices]

    def _make_step(self, part: list[int], grads: list[Tensor], backend: str | None) -> AdaptiveStep:
        lists = state_lists(self._names, [self._states[i] for i in part])
        return AdaptiveStep(
            [_local(self._params[i]) for i in part],
            [grads[i] for i in part],
            *[[_local(tensor) for tensor in tensors] for tensors in lists],
            backend=backend,
        )

    def holds(
        self,
        names: tuple[str, ...],
        params: list[Tensor],
        grads: list[Tensor],
        backend: str | None,
    ) -> bool:
        """Returns whether these tensors and their states are still those that were checked."""
        tensors = chain(chain.from_iterable(map(dict.values, self._states)), (_END,))
        return (
            names == self._names
            and (backend, named_backend()) == self._backends
            and len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and all(map(is_, tensors, self._tensors))
            and all(
                step.fits(self._locals(part, params), self._select(part, grads))
                for part, step in zip(self._indices, self._steps, strict=True)
            )
        )

    def step(self, grads: list[Tensor], settings: Settings) -> None:
        for part, step in zip(self._indices, self._steps, strict=True):
            step(self._select(part, grads), settings)

    def _select(self, part: list[int], tensors: list[Tensor]) -> list[Tensor]:
        return tensors if len(self._indices) == 1 else [tensors[i] for i in part]

    def _locals(self, part: list[int], tensors: list[Tensor]) -> list[Tensor]:
        selected = self._select(part, tensors)
        return selected if self.plain else list(map(_local, selected))


_END = object()  # makes sequences of different lengths differ


def is_plain(param: Tensor) -> bool:
    """Returns whether a parameter is neither complex nor of a tensor subclass such as DTensor."""
    return type(param) in (torch.nn.Parameter, Tensor) and not param.is_complex()


def _local(tensor: Tensor) -> Tensor:
    """Returns the plain real tensor behind a DTensor or a complex tensor."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def local_grad(grad: Tensor, param: Tensor) -> Tensor:
    """Returns the part of a gradient that belongs to the local part of its parameter."""
    if hasattr(grad, "placements") and grad.placements != param.placements:  # type: ignore[attr-defined]
        # Backward may leave partial sums, one on each rank.
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return _local(grad)
