"""The step of a parameter group, checked once and kept as long as the same tensors take it."""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from trm_fast._dispatch import named_backend
from trm_fast.ops import AdaptiveStep, Settings
from trm_fast.ops._tensors import is_dense

State = dict[str, Any]
Keys = dict[str, str]  # the state that serves each argument of the op

_ORDER = (
    "exp_avg", "exp_avg_sq", "step", "grok_exp_avg", "grok_step", "weight_ema", "grok_ring"
)  # fmt: skip


def state_lists(keys: Keys, states: Sequence[State]) -> list[list[Tensor]]:
    """Returns states that are alike as ``adaptive_step_`` takes them; a filter that has no state
    yet, because its lamb has always been 0, has none to hand over."""
    filtered = _has_filter(keys, states[0])
    used = [
        keys[slot] if keys.get(slot) in states[0] and (filtered or slot[:4] != "grok") else None
        for slot in _ORDER
    ]
    return [[] if key is None else [state[key] for state in states] for key in used]


def parts(keys: Keys, params: Sequence[Tensor], states: Sequence[State]) -> list[list[int]]:
    """Returns the indices that take their step in one call: one device, one arithmetic, and all
    with a filter state or all without."""
    members: dict[tuple[Any, ...], list[int]] = {}
    for index, (param, state) in enumerate(zip(params, states, strict=True)):
        double = param.dtype in (torch.float64, torch.complex128)
        kind = (param.device, double, _has_filter(keys, state))
        members.setdefault(kind, []).append(index)
    return list(members.values())


def _has_filter(keys: Keys, state: State) -> bool:
    """Returns whether all of the filter's states are there; those of another filter may be."""
    return all(key in state for slot, key in keys.items() if slot.startswith("grok"))


class Plan:
    """The step of a group, checked once, as long as the same tensors take it.

    Gradients are those that ``local_grad`` returns; with ``plain`` parameters that is all of them.
    ``fixed`` are the options it is made for, the named backend first. ``outputs`` are written in
    place of the parameters by the rules that have an output.
    """

    def __init__(
        self,
        keys: Keys,
        needed: tuple[str, ...],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        fixed: tuple[Any, ...],
        outputs: list[Tensor] | None = None,
    ) -> None:
        self._keys, self._needed = keys, needed
        self._outputs = outputs
        self._fixed = (*fixed, named_backend())
        self._params = list(params)
        self._states = states
        self._tensors = [*chain.from_iterable(map(dict.values, states)), _END]
        self.plain = all(map(is_plain, params))
        self._indices = parts(keys, params, states)
        self._steps = [self._make_step(part, grads, fixed[0]) for part in self._indices]

    def _make_step(self, part: list[int], grads: list[Tensor], backend: str | None) -> AdaptiveStep:
        lists = state_lists(self._keys, [self._states[i] for i in part])
        written = self._params if self._outputs is None else self._outputs
        return AdaptiveStep(
            [local(written[i]) for i in part],
            [grads[i] for i in part],
            *[[local(tensor) for tensor in tensors] for tensors in lists],
            backend=backend,
        )

    def holds(
        self,
        keys: Keys,
        needed: tuple[str, ...],
        params: list[Tensor],
        grads: list[Tensor],
        fixed: tuple[Any, ...],
    ) -> bool:
        """Returns whether these tensors and their states are still those that were checked."""
        tensors = chain(chain.from_iterable(map(dict.values, self._states)), (_END,))
        return (
            keys == self._keys
            and needed == self._needed
            and (*fixed, named_backend()) == self._fixed
            and len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and {*map(_layout, grads)} == _STRIDED
            and all(map(is_, tensors, self._tensors))
            and all(
                step.fits(self._locals(part, self._outputs or params), self._select(part, grads))
                for part, step in zip(self._indices, self._steps, strict=True)
            )
        )

    def measure(self, grads: list[Tensor], means: bool) -> list[Tensor]:
        """Returns sums over gradients and means, or gradients alone, of whole tensors; the next
        step reads those with means."""
        measured = []
        for part, step in zip(self._indices, self._steps, strict=True):
            has_means = means and bool(step.states["grok_exp_avg"])
            sums = step.measure(self._select(part, grads), has_means)
            if not self.plain:
                add_shards(sums, [self._params[i] for i in part])
            measured.append(sums)
        return measured

    def results(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the parameters with the outputs of the last step, as tensors like them."""
        return [
            (param, like(output, param))
            for param, output in zip(self._params, self._outputs or [], strict=True)
        ]

    def admit(self, settings: Settings) -> None:
        """Raises if a step with these settings cannot be taken."""
        for step in self._steps:
            step.admit(settings)

    def step(self, grads: list[Tensor], settings: Settings) -> None:
        for part, step in zip(self._indices, self._steps, strict=True):
            step(self._select(part, grads), settings)

    def _select(self, part: list[int], tensors: list[Tensor]) -> list[Tensor]:
        return tensors if len(self._indices) == 1 else [tensors[i] for i in part]

    def _locals(self, part: list[int], tensors: list[Tensor]) -> list[Tensor]:
        selected = self._select(part, tensors)
        return selected if self.plain else list(map(local, selected))


_layout, _STRIDED = attrgetter("layout"), {torch.strided}
_END = object()  # makes sequences of different lengths differ


def is_plain(param: Tensor) -> bool:
    """Returns whether a parameter is neither complex nor of a tensor subclass such as DTensor."""
    return type(param) in (torch.nn.Parameter, Tensor) and not param.is_complex()


def local(tensor: Tensor) -> Tensor:
    """Returns the plain real tensor behind a DTensor or a complex tensor."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def empty_output(param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns memory for what a rule with an output writes, in the order of the states of a plain
    parameter; float64 stays float64."""
    order = torch.preserve_format if is_dense(param) else torch.contiguous_format
    kept = param.dtype if dtype is None or param.dtype == torch.float64 else dtype
    return torch.empty_like(param, dtype=kept, requires_grad=False, memory_format=order)


def like(tensor: Tensor, param: Tensor) -> Tensor:
    """Reverses ``local``: returns the complex tensor or DTensor whose local part is ``tensor``."""
    if param.is_complex():
        tensor = torch.view_as_complex(tensor)
    if not hasattr(param, "to_local"):
        return tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        tensor,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        shape=param.shape,
        stride=param.stride(),
    )


def local_grad(grad: Tensor, param: Tensor) -> Tensor:
    """Returns the part of a gradient that belongs to the local part of its parameter."""
    if hasattr(grad, "placements") and grad.placements != param.placements:  # type: ignore[attr-defined]
        # Backward may leave partial sums, one on each rank.
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def add_shards(sums: Tensor, params: Sequence[Tensor]) -> None:
    """Adds up, in place, the rows of parameters that lie in parts on several ranks: one all-reduce
    for each dimension of a mesh that they are sharded over."""
    rows: dict[tuple[Any, int], list[int]] = {}
    for row, param in enumerate(params):
        for dim, place in enumerate(getattr(param, "placements", ())):
            if not place.is_replicate():  # is_shard() leaves out strided shards
                rows.setdefault((param.device_mesh, dim), []).append(row)  # type: ignore[attr-defined]
    for (mesh, dim), members in rows.items():
        index = torch.tensor(members, device=sums.device)
        shared = sums.index_select(0, index)
        torch.distributed.all_reduce(shared, group=mesh.get_group(dim))
        sums.index_copy_(0, index, shared)
