"""Batches for a trainer: where a run stands in its data, and how it comes back there."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Batches(Protocol):
    """Batches that know their place. After ``load_state_dict(state)`` the iteration goes on with
    the batch that followed when ``state_dict()`` returned ``state``."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RepeatedBatches:
    """Goes through an iterable, such as a ``DataLoader``, again and again, and knows its place.

    What is drawn from torch's global generator at the start of an epoch, like the order of a
    shuffling ``DataLoader``, is drawn again the same way after ``load_state_dict``; the batches
    before the place are then read once more and thrown away.

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
        self._start: Tensor | None = None

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
        now = torch.get_rng_state()
        if self._start is None:
            self._start = now
            return iter(self.source)
        # A sampler draws its order with the first batch, from what the generator was at the start.
        torch.set_rng_state(self._start)
        rest = iter(self.source)
        for _ in range(self.position):
            next(rest, None)
        torch.set_rng_state(now)
        return rest

    def describe(self) -> str:
        """Names the last batch."""
        return f"epoch {self.epoch}, batch {self.position - 1}"

    def state_dict(self) -> dict[str, Any]:
        """Returns epoch, batches read in it, and the state of the generator at its start."""
        return {"epoch": self.epoch, "position": self.position, "start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the place of a ``state_dict``; an iterator from before must not be used."""
        self.epoch, self.position, self._start = state["epoch"], state["position"], state["start"]


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
