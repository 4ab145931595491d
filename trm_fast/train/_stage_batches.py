"""The batches of the stages of a run: which a stage has, where they stand, and their epochs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trm_fast.train._fingerprint import fingerprint
from trm_fast.train.batches import (
    Batches,
    EpochBatches,
    batches_of,
    completed,
    exhausted,
    is_iterated,
    iterator_of,
    next_batches,
)


class HasBatches(Protocol):
    """What is needed of a stage."""

    @property
    def name(self) -> str: ...
    @property
    def batches(self) -> Any: ...


@dataclass
class _Present:
    """The batches of the present stage, by the name of the first stage that has them."""

    index: int
    name: str
    source: Batches
    iterator: Iterator[Any] | None = None


class StageBatches:
    """Makes the batches of stages when they are asked for first, and keeps their places.

    A stage without batches goes on with those of the stage before, and stages that are given one
    object go on with it: each source has one place, whichever stage it is in.

    Args:
        stages: in order; the first one has batches.
    """

    def __init__(self, stages: Sequence[HasBatches]) -> None:
        self._given = {stage.name: stage.batches for stage in stages if stage.batches is not None}
        self._names = _names_of_sources(stages)
        # Made at once, so that what cannot be resumed is refused before the run.
        self._ready = {
            name: batches_of(given)
            for name, given in self._given.items()
            if name in self._names and is_iterated(given)
        }
        self._sources: dict[str, Batches] = {}
        self._made: list[Any] = []  # by functions
        self._places: dict[str, Any] = {}  # of a checkpoint, until their sources are made
        self._epochs: dict[str, int] = {}
        self._present: _Present | None = None
        self._fingerprints: dict[str, str | None] = {}
        self._earlier: dict[str, str | None] = {}  # fingerprints of a checkpoint

    @property
    def epochs(self) -> int:
        """Epochs that are over, and that callbacks know of."""
        return sum(self._epochs.values())

    def of(self, index: int) -> Batches:
        """Returns the batches of a stage."""
        return self._of(index).source

    def _of(self, index: int) -> _Present:
        if self._present is None or self._present.index != index:
            name = self._names[index]
            self._present = _Present(index, name, self._source(name))
        return self._present

    def _source(self, name: str) -> Batches:
        if name in self._sources:
            return self._sources[name]
        given = self._given[name]
        if not is_iterated(given):
            given = given()
            if any(given is other for other in (*self._given.values(), *self._made)):
                raise ValueError(
                    "Stage: a function for batches must return new ones; got those of another "
                    f"stage in {name!r}. Give both stages the batches themselves"
                )
            self._made.append(given)
        source = self._sources[name] = (
            self._ready[name] if name in self._ready else batches_of(given)
        )
        if name in self._places:
            source.load_state_dict(self._places.pop(name))
        # Epochs from before the run are nothing new.
        self._epochs.setdefault(name, completed(source))
        return source

    def next(self, index: int, count: int, device: torch.device) -> tuple[list[Any], str]:
        """Returns the next batches of a stage, as ``next_batches``."""
        present = self._of(index)
        if present.iterator is None:
            present.iterator = iterator_of(present.source)
        return next_batches(present.iterator, present.source, count, device)

    def mark(self, index: int) -> Any:
        """Notes the place in the batches of a stage, for ``go_back``; that takes no time."""
        source: Any = self._of(index).source
        return source, source.mark() if hasattr(source, "mark") else None

    def go_back(self, mark: Any) -> None:
        """Goes back to a place, where the batches know it; iterators from before must not be used.
        Others stay where they are."""
        source, place = mark
        if place is not None:
            source.go_back(place)

    def new_epoch(self, index: int) -> bool:
        """Counts an epoch that is over in the batches of a stage; returns whether there was one."""
        present = self._of(index)
        if completed(present.source) <= self._epochs[present.name]:
            return False
        self._epochs[present.name] += 1
        return True

    def exhausted(self, index: int) -> bool:
        """Returns whether it is known that a stage has no further batch."""
        return exhausted(self.of(index))

    def leave(self) -> None:
        """Drops the iterator; the next one goes on where the batches stand."""
        self._present = None

    def made(self) -> list[Batches]:
        """Returns the batches that were made so far, or found ready."""
        both = (*self._ready.values(), *self._sources.values())
        return list({id(source): source for source in both}.values())

    def places(self) -> dict[str, Any]:
        """Returns where the batches of the stages stand in this process."""
        return self._places | {name: part.state_dict() for name, part in self._sources.items()}

    def beyond(self) -> list[str]:
        """Returns what to report of batches that are fewer now than were given in their epoch."""
        return [
            f"batches of {name!r} end at {source.per_epoch} now, before the place {source.position}"
            " of the run: its next epoch begins"
            for name, source in self._sources.items()
            if isinstance(source, EpochBatches) and source.position > (source.per_epoch or math.inf)
        ]

    def fingerprints(self) -> dict[str, str | None]:
        """Returns a hash of the data of each stage that was made so far, None where there cannot be
        one; it is taken once."""
        for name, source in self._sources.items():
            if name not in self._fingerprints:
                self._fingerprints[name] = fingerprint(source)
        return dict(self._fingerprints)

    def known_fingerprints(self) -> dict[str, str | None]:
        """Returns those of ``fingerprints``, and for stages that were not made since a resume those
        of the checkpoint."""
        return self._earlier | self.fingerprints()

    def load_fingerprints(self, found: dict[str, str | None]) -> None:
        """Keeps what ``known_fingerprints`` returned."""
        self._earlier = dict(found)

    def load_places(self, places: dict[str, Any]) -> None:
        """Goes on from what ``places`` returned; iterators from before must not be used."""
        self._places = dict(places)
        for name, source in self._sources.items():
            if name in self._places:
                source.load_state_dict(self._places.pop(name))

    def state_dict(self) -> dict[str, int]:
        """Returns the epochs that are over, which are the same in all processes."""
        return dict(self._epochs)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on counting."""
        self._epochs = dict(state)
        self._present = None


def _names_of_sources(stages: Sequence[HasBatches]) -> list[str]:
    """Returns for each stage the name of the first one that is given its batches."""
    names: list[str] = []
    for index, stage in enumerate(stages):
        if stage.batches is None:
            names.append(names[-1])
            continue
        # A function makes batches of its own for each stage.
        same = (s.name for s in stages[:index] if s.batches is stage.batches)
        names.append(next(same, stage.name) if is_iterated(stage.batches) else stage.name)
    return names
