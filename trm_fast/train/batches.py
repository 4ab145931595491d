"""Batches for a trainer: where a run stands in its data, and how it comes back there."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from trm_fast.train._loader_state import LoaderState
from trm_fast.train._workers import held_back, shield
from trm_fast.train.generators import fork_rng, generators, seed_everything, set_generators
from trm_fast.train.stateful import Stateful

_CPU = torch.device("cpu")
EPOCH_END: Final = object()


@runtime_checkable
class Batches(Stateful, Protocol):
    """Batches that know their place. After ``load_state_dict(state)`` the iteration goes on with
    the batch that followed when ``state_dict()`` returned ``state``."""

    def __iter__(self) -> Iterator[Any]: ...


class EpochBatches:
    """Goes through batches epoch by epoch, knows its place, and knows when an epoch is over.

    What is drawn at the start of an epoch from the generators of Python, NumPy and torch, like the
    order of a shuffling ``DataLoader``, is drawn again the same way after ``load_state_dict``; the
    batches before the place are then read once more and thrown away. Generators that the source has
    for itself, and what its objects have changed since, as a sampler that keeps an order, belong to
    the place as well (``LoaderState``). A sampler with ``set_epoch``, such as
    ``DistributedSampler``, is given the epoch. A source or a part of it with a state (``Stateful``)
    goes back to the one that it had at the start of the epoch; a trainer takes such a source for
    ``Batches`` unless it is given in here.

    Args:
        source: gives the batches of one epoch each time it is iterated over, by ``__iter__`` or by
            ``__getitem__``; or a function of the number of the epoch, from 0, that returns them.
        epochs: how many; None means without end.
        seed: None draws an epoch from the generators as they are. A number >= 0 seeds those of
            Python, NumPy and torch before each epoch, so that everything random in it, dropout too,
            follows from this number and that of the epoch.

    Attributes:
        epoch: number of the epoch of the next batch, from 0.
        position: batches of it that were given; right after the last one still their number.
        completed: epochs of which all batches were given. Without a length that shows only when the
            source is asked for a further one.

    Raises:
        TypeError: the source is neither.
        ValueError: what the source draws cannot be brought back: a generator without a state, or
            processes of a ``DataLoader`` that go on from epoch to epoch (``persistent_workers``).
            While iterating, if the source gives no batch.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[int], Iterable[Any]],
        epochs: int | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        if not (is_iterated(source) or callable(source)):
            raise TypeError(
                "EpochBatches: source must be something to iterate over, or a function that "
                f"returns it; got {type(source).__name__}"
            )
        self.source, self.epochs, self.seed = source, epochs, seed
        self.epoch = self.position = self.completed = 0
        self._start: dict[str, Any] | None = None
        self._length = _length_of(source)
        self._loader = LoaderState(source)
        self._warned_of: set[str] = set()

    @property
    def per_epoch(self) -> int | None:
        """Batches in an epoch, if the source has a length."""
        return self._length

    @property
    def at_end(self) -> bool:
        """Whether the last batch of an epoch was given; False if the source has no length."""
        return self.completed > self.epoch

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in self.with_ends() if batch is not EPOCH_END)

    def with_ends(self) -> Iterator[Any]:
        """Yields the batches, and ``EPOCH_END`` after those of an epoch if the source has no
        length."""
        while self.epochs is None or self.epoch < self.epochs:
            for batch in self._rest_of_epoch():
                self.position += 1
                if self.position == self._length:
                    self.completed = self.epoch + 1
                yield batch
            if self.position == 0:
                raise ValueError(
                    f"Trainer: batches must give at least one; got none from {self.source!r}"
                )
            self._next_epoch()
            if self._length is None:
                yield EPOCH_END

    def close_epoch(self) -> None:
        """Goes on to the next epoch if all batches of this one were given."""
        if self.at_end:
            self._next_epoch()

    def _next_epoch(self) -> None:
        self.epoch, self.position, self._start = self.epoch + 1, 0, None
        self.completed = self.epoch

    def _rest_of_epoch(self) -> Iterator[Any]:
        sampler: Any = getattr(self.source, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        if self._start is None:
            if self.seed is not None:
                seeds = np.random.SeedSequence((self.seed, self.epoch))
                seed_everything(int(seeds.generate_state(1, np.uint64)[0]))
            self._start = {**generators(_CPU), "loader": self._loader.state_dict(True)}
            return self._begun()
        now = self._loader.state_dict(False)
        try:
            # A sampler draws its order with the first batch, from what the generators were then.
            with fork_rng(_CPU):
                set_generators(self._start, _CPU)
                self._loader.load_state_dict(self._start["loader"])
                rest = self._begun()
                for _ in range(self.position):
                    next(rest, None)
        finally:
            self._loader.load_state_dict(now)
        return rest

    def _begun(self) -> Iterator[Any]:
        batches = self._of_epoch()
        if not shield((batches, *self._loader.loaders)):
            return iter(batches)
        with held_back():
            return iter(batches)

    def _of_epoch(self) -> Iterable[Any]:
        source: Any = self.source
        if is_iterated(source):
            return source  # type: ignore[no-any-return]
        batches: Iterable[Any] = source(self.epoch)
        self._length = _length_of(batches)
        return batches

    def mark(self) -> tuple[Any, ...]:
        """Notes the place within this process, for ``go_back``."""
        return self.epoch, self.position, self.completed, self._start

    def go_back(self, mark: tuple[Any, ...]) -> None:
        """Goes to the place of a mark; an iterator from before must not be used."""
        self.epoch, self.position, self.completed, self._start = mark

    def describe(self) -> str:
        """Names the last batch."""
        return f"epoch {self.epoch}, batch {self.position - 1}"

    def state_dict(self) -> dict[str, Any]:
        """Returns seed, epoch, batches given in it, what its order was drawn from, and what the
        source keeps."""
        place = {"epoch": self.epoch, "position": self.position, "length": self._length}
        now = self._loader.state_dict(self._start is None)
        self._warn_of_unsaved()
        return {"seed": self.seed, **place, "start": self._start, "now": now}

    def _warn_of_unsaved(self) -> None:
        for path in set(self._loader.unsaved()) - self._warned_of:
            self._warned_of.add(path)
            warnings.warn(
                f"EpochBatches: {path} has changed and is not saved: if it is random, a resumed "
                "run has other batches. Give its object state_dict and load_state_dict",
                stacklevel=2,
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the place of a ``state_dict``; an iterator from before must not be used."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._start = state["start"]
        if state["now"] is not None:
            self._loader.load_state_dict(state["now"])
        if not is_iterated(self.source):
            self._length = state["length"]
        self.completed = self.epoch + (0 < (self._length or 0) <= self.position)


RepeatedBatches = EpochBatches


def _length_of(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:  # also a DataLoader of an iterable data set
        return None


def is_iterated(source: Any) -> bool:
    """Returns whether something is iterated over, and not a function that makes batches."""
    kind = type(source)
    return hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")


def batches_of(given: Iterable[Any]) -> Batches:
    """Returns batches that know their place as they are, and others in an ``EpochBatches``."""
    return given if isinstance(given, Batches) else EpochBatches(given)


def iterator_of(source: Batches) -> Iterator[Any]:
    """Returns an iterator for ``next_batches``."""
    return source.with_ends() if isinstance(source, EpochBatches) else iter(source)


def completed(source: Any) -> int:
    """Returns the epochs that are over, 0 for batches without epochs."""
    found: int = getattr(source, "completed", 0)
    return found


def exhausted(source: Any) -> bool:
    """Returns whether it is known that there is no further batch."""
    limited = isinstance(source, EpochBatches) and source.epochs is not None
    return limited and source.completed >= source.epochs


def next_batches(
    iterator: Iterator[Any], source: Any, count: int, device: torch.device
) -> tuple[list[Any], str]:
    """Returns the next batches on a device, fewer at the end of an epoch, none at the end of all or
    of an epoch that has shown only now; and what their source calls them: ", epoch 0, batch 3,
    epoch 0, batch 4", or nothing if it has no names."""
    batches, names = [], ""
    for batch in islice(iterator, count):
        if batch is EPOCH_END:
            break
        batches.append(to_device(batch, device))
        names += f", {source.describe()}" if hasattr(source, "describe") else ""
        if getattr(source, "at_end", False):
            break
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
