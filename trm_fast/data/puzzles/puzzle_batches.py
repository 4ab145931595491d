"""The batches of puzzles that training and evaluation take.

An epoch visits each group of a ``PuzzleSet`` once, with one of its variants.

Source: sampling rule of SamsungSAILMontreal/TinyRecursiveModels at commit e7b6871,
puzzle_dataset.py. Declared differences: every draw is seeded (there the examples of a puzzle come
from NumPy's global state); batches run on from epoch to epoch without end (there the examples that
do not fill a batch are dropped at the end of each round of ``eval_interval`` epochs); the last
batch of an evaluation is smaller instead of padded; ``merge`` gives sets identifiers of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trm_fast.data.puzzles.puzzle_set import Array, PuzzleSet

Augment = Callable[[Array, Array, np.random.Generator], tuple[Array, Array]]

IGNORED = -100  # what the losses take for "no label here"


class _Order(NamedTuple):
    """One epoch: its examples in the order of the visits, visit i being bounds[i] : bounds[i+1]."""

    examples: Array
    bounds: Array


def _epoch_order(data: PuzzleSet, seed: int, epoch: int) -> _Order:
    rng = _generator(seed, 0, epoch)
    groups = rng.permutation(len(data.group_indices) - 1)
    puzzles = rng.integers(data.group_indices[groups], data.group_indices[groups + 1])
    starts = data.puzzle_indices[puzzles].astype(np.int64)
    sizes = data.puzzle_indices[puzzles + 1] - starts
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    if bounds[-1] == len(puzzles):
        return _Order(starts, bounds)
    # Sorting random keys within each visit shuffles the examples of all puzzles at once.
    visit = np.repeat(np.arange(len(puzzles)), sizes)
    shuffled = np.lexsort((rng.random(len(visit)), visit))
    return _Order(shuffled + (starts - bounds[:-1])[visit], bounds)


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


class PuzzleBatches:
    """Endless training batches whose order is a function of (seed, epoch).

    An epoch shuffles the groups and draws one puzzle of each. A batch takes the puzzles in this
    order, and the examples of a puzzle in random order without replacement, until it is full;
    examples of its last puzzle that do not fit are not used in this visit. A batch that an epoch
    cannot fill goes on with the next epoch; only what is left at the end of the last one is
    dropped.

    The object remembers its place: iterating again goes on after the last batch that was taken.

    Args:
        data: what to draw from.
        batch_size: examples of the global batch; a multiple of ``world_size``.
        seed: >= 0; nothing else decides the order.
        rank, world_size: this process yields rows [rank, rank + 1) * batch_size / world_size.
        epochs: when to end; None never ends.
        augment: ``augment(inputs, labels, generator)`` with int64 token ids [batch_size, seq_len],
            before labels are masked, returns new ones of the same shape. It sees the global batch
            and a generator seeded by (seed, epoch, batch), so that no rank and no world size
            changes what it does.

    Attributes:
        completed: epochs of which all visits are in batches that were given. Such a batch may also
            have the first visits of the next epoch.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        data: PuzzleSet,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
        augment: Augment | None = None,
    ) -> None:
        _check_place("PuzzleBatches", batch_size, rank, world_size)
        if batch_size % world_size:
            raise ValueError(
                f"PuzzleBatches: batch_size must be a multiple of world_size {world_size}; "
                f"got {batch_size}"
            )
        if seed < 0:
            raise ValueError(f"PuzzleBatches: seed must be >= 0; got {seed}")
        if epochs is not None and epochs < 0:
            raise ValueError(f"PuzzleBatches: epochs must be >= 0 or None; got {epochs}")
        self.data, self.batch_size, self.seed, self.epochs = data, batch_size, seed, epochs
        self.augment = augment
        local = batch_size // world_size
        self._slice = slice(rank * local, (rank + 1) * local)
        self._epoch = self._visit = self._batch = 0
        self._order: tuple[int, _Order] | None = None
        self._last: tuple[int, Array] | None = None

    @property
    def completed(self) -> int:
        return self._epoch + (self._visit == self.data.metadata.total_groups)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while (found := self._next_examples()) is not None:
            epoch, examples = found
            index, self._batch = self._batch, self._batch + 1
            self._last = epoch, examples[self._slice]
            yield self._collate(epoch, index, examples)

    def _next_examples(self) -> tuple[int, Array] | None:
        """The global batch and the epoch in which it starts; None at the end."""
        groups = self.data.metadata.total_groups
        parts: list[Array] = []
        missing, first_epoch = self.batch_size, self._epoch
        while missing:
            if self._visit == groups:
                self._epoch, self._visit = self._epoch + 1, 0
            if not parts:
                first_epoch = self._epoch
            if self.epochs is not None and self._epoch >= self.epochs:
                return None
            order = self._order_of(self._epoch)
            start = order.bounds[self._visit]
            self._visit = min(int(np.searchsorted(order.bounds, start + missing)), groups)
            parts.append(order.examples[start : start + missing])
            missing -= len(parts[-1])
        return first_epoch, np.concatenate(parts)

    def _order_of(self, epoch: int) -> _Order:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, _epoch_order(self.data, self.seed, epoch)
        return self._order[1]

    def _collate(self, epoch: int, index: int, examples: Array) -> dict[str, Tensor]:
        if self.augment is None:
            return _batch_of(self.data, examples[self._slice])
        inputs = self.data.inputs[examples].astype(np.int64)
        labels = self.data.labels[examples].astype(np.int64)
        new = self.augment(inputs, labels, _generator(self.seed, 1, epoch, index))
        for name, array in zip(("inputs", "labels"), new, strict=True):
            if array.shape != inputs.shape:
                raise ValueError(
                    f"PuzzleBatches: augment must keep {name} at {list(inputs.shape)}; "
                    f"got {list(array.shape)}"
                )
        rows = self._slice
        return _tensors(self.data, new[0][rows], new[1][rows], examples[rows])

    def state_dict(self) -> dict[str, int]:
        """The place in the order, as plain ints; the same on every rank."""
        return {"epoch": self._epoch, "visit": self._visit, "batch": self._batch, **self._guards()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a place: what follows is what an uninterrupted run would yield.

        Args:
            state: of ``state_dict``, with the same data, seed and batch size; the world size may
                differ.

        Raises:
            ValueError: the state belongs to other data, another seed or batch size, or is damaged.
        """
        expected = self._guards()
        missing = {"epoch", "visit", "batch", *expected} - state.keys()
        if missing:
            raise ValueError(f"PuzzleBatches: a state needs {', '.join(sorted(missing))}; got none")
        for key, value in expected.items():
            if state[key] != value:
                raise ValueError(
                    f"PuzzleBatches: {key} of the state must be {value}; got {state[key]}"
                )
        if min(state["epoch"], state["batch"]) < 0 or not 0 <= state["visit"] <= state["groups"]:
            raise ValueError(f"PuzzleBatches: a state must be a place in the order; got {state}")
        self._epoch, self._visit, self._batch = state["epoch"], state["visit"], state["batch"]
        self._last = None

    def mark(self) -> tuple[int, int, int]:
        """Notes the place within this process, for ``go_back``."""
        return self._epoch, self._visit, self._batch

    def go_back(self, mark: tuple[int, int, int]) -> None:
        """Goes to the place of a mark."""
        self._epoch, self._visit, self._batch = mark

    def _guards(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "groups": self.data.metadata.total_groups,
            "examples": len(self.data),
        }

    def describe(self, limit: int = 8) -> str:
        """Names the rows that this rank yielded last, at most ``limit`` of them."""
        if self._last is None:
            return "no batch yet"
        epoch, examples = self._last
        shown = examples[:limit].tolist()
        more = ", ..." if len(examples) > limit else ""
        text = f"epoch {epoch}, examples {', '.join(map(str, shown))}{more}"
        if not self.data.sources:
            return text
        return f"{text} ({', '.join(self.data.sources[i] for i in shown)}{more})"


class EvaluationBatches:
    """Every example once, in order; see ``evaluation_batches``."""

    def __init__(self, data: PuzzleSet, batch_size: int, rank: int, world_size: int) -> None:
        _check_place("evaluation_batches", batch_size, rank, world_size)
        self.data = data
        starts = range(0, len(data), batch_size)
        parts = [(start, min(batch_size, len(data) - start)) for start in starts]
        own = [
            range(start + count * rank // world_size, start + count * (rank + 1) // world_size)
            for start, count in parts
        ]
        self._own = [rows for rows in own if rows]

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._own)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in self._own:
            yield _batch_of(self.data, np.arange(rows.start, rows.stop))


def evaluation_batches(
    data: PuzzleSet, batch_size: int, rank: int = 0, world_size: int = 1
) -> EvaluationBatches:
    """Yields every example once, in order, as often as it is iterated.

    Each global batch is divided evenly among the ranks; the last one is smaller, and a rank with
    no row of it yields no batch for it.

    Args:
        data: what to go through.
        batch_size: examples of the global batch, >= 1.
        rank, world_size: which part of each batch this process yields.

    Returns:
        Something to iterate over, with a length; batches as those of ``PuzzleBatches``.

    Raises:
        ValueError: a number is out of range.
    """
    return EvaluationBatches(data, batch_size, rank, world_size)


def _check_place(who: str, batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"{who}: batch_size must be >= 1; got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"{who}: rank must be in [0, world_size); got {rank} of {world_size}")


def _batch_of(data: PuzzleSet, examples: Array) -> dict[str, Tensor]:
    inputs = data.inputs[examples].astype(np.int64)
    return _tensors(data, inputs, data.labels[examples].astype(np.int64), examples)


def _tensors(data: PuzzleSet, inputs: Array, labels: Array, examples: Array) -> dict[str, Tensor]:
    ignored = data.metadata.ignore_label_id
    if ignored is not None:
        labels = np.where(labels == ignored, IGNORED, labels)
    identifiers = data.puzzle_identifiers[data.puzzle_of(examples)].astype(np.int64)
    arrays = {"inputs": inputs, "labels": labels, "puzzle_identifiers": identifiers}
    return {
        name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
        for name, array in arrays.items()
    }
