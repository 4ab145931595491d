"""Batches for a trainer: where a run stands in its data, and how it comes back there."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trm_fast.train._rng import Generators, fork_rng, generators, set_generators

_CPU = torch.device("cpu")


@runtime_checkable
class Batches(Protocol):
    """Batches that know their place. After ``load_state_dict(state)`` the iteration goes on with
    the batch that followed when ``state_dict()`` returned ``state``."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RepeatedBatches:
    """Goes through an iterable, such as a ``DataLoader``, again and again, and knows its place.

    What is drawn at the start of an epoch from the generators of Python, NumPy and torch, or from a
    ``DataLoader``'s own, like the order of a shuffling one, is drawn again the same way after
    ``load_state_dict``; the batches before the place are then read once more and thrown away. A
    sampler with ``set_epoch``, such as ``DistributedSampler``, is told the epoch.

    Args:
        source: gives the batches of one epoch each time it is iterated over.
        epochs: how often; None means without end.

    Raises:
        ValueError: while iterating, if the source gives no batch.
    """

    def __init__(self, source: Iterable[Any], epochs: int | None = None) -> None:
        self.source = source
        self.epochs = epochs
        self.epoch = 0
        self.position = 0
        self._start: Generators | None = None

    def __iter__(self) -> Iterator[Any]:
        while self.epochs is None or self.epoch < self.epochs:
            for batch in self._rest_of_epoch():
                self.position += 1
                yield batch
            if self.position == 0:
                raise ValueError(
                    f"Trainer: batches must give at least one; got none from {self.source!r}"
                )
            self.epoch, self.position, self._start = self.epoch + 1, 0, None

    def _rest_of_epoch(self) -> Iterator[Any]:
        sampler: Any = getattr(self.source, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        if self._start is None:
            self._start = self._generators()
            return iter(self.source)
        # A sampler draws its order with the first batch, from what the generators were then.
        with fork_rng(_CPU):
            self._set_generators(self._start)
            rest = iter(self.source)
            for _ in range(self.position):
                next(rest, None)
        return rest

    def _generators(self) -> Generators:
        own = getattr(self.source, "generator", None)
        found = {"own": own.get_state()} if isinstance(own, torch.Generator) else {}
        return generators(_CPU) | found

    def _set_generators(self, states: Generators) -> None:
        set_generators(states, _CPU)
        if "own" in states:
            self.source.generator.set_state(states["own"].cpu())  # type: ignore[attr-defined]

    def describe(self) -> str:
        """Names the last batch."""
        return f"epoch {self.epoch}, batch {self.position - 1}"

    def state_dict(self) -> dict[str, Any]:
        """Returns epoch, batches read in it, and the states of the generators at its start."""
        return {"epoch": self.epoch, "position": self.position, "start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the place of a ``state_dict``; an iterator from before must not be used."""
        self.epoch, self.position, self._start = state["epoch"], state["position"], state["start"]


def take(
    iterator: Iterator[Any], source: Any, count: int, device: torch.device
) -> tuple[list[Any], str]:
    """Returns the next batches on a device, fewer when they end, and what their source calls them:
    ", epoch 0, batch 3, epoch 0, batch 4", or nothing if it has no names."""
    batches, names = [], ""
    for batch in islice(iterator, count):
        batches.append(to_device(batch, device))
        names += f", {source.describe()}" if hasattr(source, "describe") else ""
    return batches, names


def to_device(batch: Any, device: torch.device) -> Any:
    """Returns a batch with its tensors on a device; mappings, lists and tuples are looked into."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
