"""Brings a run back to what it was, where a checkpoint turns out not to fit after a part of it has
been taken over."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from trm_fast.train.checkpoints.resumable import Resumable
from trm_fast.train.generators import generators, set_generators

Undo = Callable[[], None]


@contextmanager
def undone_on_error(run: Resumable) -> Iterator[None]:
    """A context after which a run is as it was before it, if an error ends it.

    Until then a second copy of its weights and states is held: a run that has not begun has hardly
    any states. What a stage sets in objects of its own, other than the model, is not brought back.
    """
    undo = _undo_of_run(run)
    try:
        yield
    except BaseException:
        undo()
        raise


def _undo_of_run(run: Resumable) -> Undo:
    sources = run.curriculum.sources
    parts = [
        *run.callbacks, *run.schedules, *sources.made(),
        run.objective, run.extra, run.meter, run.guard, run.scaler, run.ema, run.curriculum,
    ]  # fmt: skip
    drawn = generators(run.world.device)
    undos = [
        _undo_of_model(run.model),
        *map(_undo_of_optimizer, run.optimizers),
        *(_undo_of_part(part) for part in parts if part is not None),
        _undo_of_attributes(sources),
        _undo_of_attributes(run),
        lambda: set_generators(drawn, run.world.device),
    ]

    def undo() -> None:
        for each in undos:
            each()

    return undo


def _undo_of_part(part: Any) -> Undo:
    """Of what has ``state_dict`` and ``load_state_dict``."""
    state, attributes = _copied(part.state_dict()), _undo_of_attributes(part)

    def undo() -> None:
        # One that cannot even load its own state has what it had as attributes.
        with suppress(Exception):
            if state:
                part.load_state_dict(state)
        attributes()

    return undo


def _undo_of_attributes(part: object) -> Undo:
    """Of attributes, and of what dicts, lists and sets among them hold."""
    found: dict[str, Any] = getattr(part, "__dict__", {})
    before = dict(found)
    held = [(v, v.copy()) for v in before.values() if type(v) in (dict, list, set)]

    def undo() -> None:
        for name in [name for name in found if name not in before]:
            del found[name]
        for name, value in before.items():
            if found.get(name) is not value:
                found[name] = value
        for value, items in held:
            value.clear()
            value.extend(items) if isinstance(value, list) else value.update(items)

    return undo


def _undo_of_model(model: nn.Module) -> Undo:
    attributes = [_undo_of_attributes(module) for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    trained = [param.requires_grad for param in model.parameters()]
    values = _undo_of_tensors(tensors)

    def undo() -> None:
        for each in attributes:
            each()
        for param, flag in zip(model.parameters(), trained, strict=True):
            param.requires_grad_(flag)
        values()

    return undo


def _undo_of_optimizer(optimizer: Optimizer) -> Undo:
    attributes = _undo_of_attributes(optimizer)
    inner = [_undo_of_optimizer(v) for v in vars(optimizer).values() if isinstance(v, Optimizer)]
    groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
    states = [(param, values, dict(values)) for param, values in optimizer.state.items()]
    tensors = _undo_of_tensors(_tensors(values for _, values, _ in states))

    def undo() -> None:
        attributes()
        for each in inner:
            each()
        optimizer.param_groups[:] = [group for group, _, _ in groups]
        for group, options, params in groups:
            group.clear()
            group.update(options)
            group["params"][:] = params
        optimizer.state.clear()
        for param, values, items in states:
            values.clear()
            values.update(items)
            optimizer.state[param] = values
        tensors()

    return undo


def _undo_of_tensors(tensors: Iterable[Tensor]) -> Undo:
    held = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def undo() -> None:
        for tensor, value in held:
            tensor.copy_(value)

    return undo


def _tensors(states: Iterable[Mapping[str, Any]]) -> Iterator[Tensor]:
    for values in states:
        yield from (value for value in values.values() if isinstance(value, Tensor))


def _copied(state: Any) -> Any:
    """Returns a state with tensors of its own."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, state)
