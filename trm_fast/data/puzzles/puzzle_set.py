"""Puzzles in memory, in the official layout, checked when they are made.

An example is one pair of token sequences, a puzzle is one variant (augmentation) of a task, and a
group holds all variants of one task.

Source: layout of SamsungSAILMontreal/TinyRecursiveModels at commit e7b6871, puzzle_dataset.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_CHUNK = 1 << 24  # tokens per piece of a check, so that a mapped file is never in memory whole


@dataclass(frozen=True)
class PuzzleMetadata:
    """What the official ``dataset.json`` says of a split.

    Args:
        vocab_size: token ids are in [0, vocab_size).
        seq_len: tokens of one example.
        num_puzzle_identifiers: puzzle identifiers are in [0, num_puzzle_identifiers).
        total_groups, total_puzzles: their numbers.
        mean_puzzle_examples: examples per puzzle.
        sets: names of the parts that the split has on disk.
        pad_id: token of unused positions.
        ignore_label_id: label of positions without loss; None if every position counts.
        blank_identifier_id: identifier of puzzles without one of their own.
    """

    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int
    total_groups: int
    total_puzzles: int
    mean_puzzle_examples: float
    sets: tuple[str, ...] = ("all",)
    pad_id: int = 0
    ignore_label_id: int | None = 0
    blank_identifier_id: int = 0


@dataclass(frozen=True, eq=False)
class PuzzleSet:
    """One split of a puzzle data set; checks itself when it is made.

    Args:
        inputs: token ids [examples, seq_len], any integer dtype; may be a mapped file.
        labels: likewise; ``metadata.ignore_label_id`` marks positions without loss.
        puzzle_identifiers: identifier of each puzzle, [puzzles], integers.
        puzzle_indices: first example of each puzzle and at last their number, [puzzles + 1].
        group_indices: first puzzle of each group and at last their number, [groups + 1].
        metadata: sizes and special ids.
        sources: "file:line" of each example, or empty.

    Raises:
        TypeError: an array is no NumPy array of integers.
        ValueError: shapes, indices or ids contradict each other or the metadata.
    """

    inputs: Array
    labels: Array
    puzzle_identifiers: Array
    puzzle_indices: Array
    group_indices: Array
    metadata: PuzzleMetadata
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.inputs)

    @classmethod
    def of_pairs(
        cls,
        inputs: Array,
        labels: Array,
        vocab_size: int,
        *,
        pad_id: int = 0,
        ignore_label_id: int | None = 0,
        sources: Sequence[str] = (),
    ) -> PuzzleSet:
        """Makes every example a puzzle and a group of its own, without identifiers.

        Args:
            inputs, labels: token ids [examples, seq_len].
            vocab_size: token ids are in [0, vocab_size).
            pad_id, ignore_label_id: as in ``PuzzleMetadata``.
            sources: "file:line" of each example, or empty.

        Raises:
            TypeError, ValueError: as ``PuzzleSet``.
        """
        _check_tokens_shape("inputs", inputs)
        count, seq_len = inputs.shape
        indices = np.arange(count + 1, dtype=np.int32)
        metadata = PuzzleMetadata(
            vocab_size=vocab_size,
            seq_len=seq_len,
            num_puzzle_identifiers=1,
            total_groups=count,
            total_puzzles=count,
            mean_puzzle_examples=1.0,
            pad_id=pad_id,
            ignore_label_id=ignore_label_id,
        )
        identifiers = np.zeros(count, dtype=np.int32)
        return cls(inputs, labels, identifiers, indices, indices, metadata, tuple(sources))

    def puzzle_of(self, examples: Array) -> Array:
        """The puzzle to which each of some examples belongs, int64."""
        return np.searchsorted(self.puzzle_indices, examples, side="right") - 1


def _check(data: PuzzleSet) -> None:
    meta = data.metadata
    _check_tokens_shape("inputs", data.inputs)
    _check_tokens_shape("labels", data.labels)
    expected = (len(data.inputs), meta.seq_len)
    for name in ("inputs", "labels"):
        shape = getattr(data, name).shape
        if shape != expected:
            raise ValueError(
                f"PuzzleSet: {name} must be [examples, seq_len] = {list(expected)}; "
                f"got {list(shape)}"
            )
    if not len(data):
        raise ValueError("PuzzleSet: at least one example is required; got none")
    _check_metadata(meta)
    puzzles, groups = len(data.puzzle_indices) - 1, len(data.group_indices) - 1
    _check_indices("puzzle_indices", data.puzzle_indices, len(data), "examples")
    _check_indices("group_indices", data.group_indices, puzzles, "puzzles")
    for name, count in (("total_puzzles", puzzles), ("total_groups", groups)):
        if getattr(meta, name) != count:
            raise ValueError(
                f"PuzzleSet: metadata.{name} must be {count} as the indices say; "
                f"got {getattr(meta, name)}"
            )
    _check_vector("puzzle_identifiers", data.puzzle_identifiers)
    if len(data.puzzle_identifiers) != puzzles:
        raise ValueError(
            f"PuzzleSet: puzzle_identifiers must have one for each of {puzzles} puzzles; "
            f"got {len(data.puzzle_identifiers)}"
        )
    _check_range(
        "puzzle_identifiers", data.puzzle_identifiers, meta.num_puzzle_identifiers, None, "puzzle"
    )
    _check_range("inputs", data.inputs, meta.vocab_size, None, "example")
    _check_range("labels", data.labels, meta.vocab_size, meta.ignore_label_id, "example")
    if data.sources and len(data.sources) != len(data):
        raise ValueError(
            f"PuzzleSet: sources must be empty or one for each of {len(data)} examples; "
            f"got {len(data.sources)}"
        )


def _check_metadata(meta: PuzzleMetadata) -> None:
    for name, top in (
        ("pad_id", meta.vocab_size),
        ("blank_identifier_id", meta.num_puzzle_identifiers),
    ):
        if not 0 <= getattr(meta, name) < top:
            raise ValueError(
                f"PuzzleSet: metadata.{name} must be in [0, {top}); got {getattr(meta, name)}"
            )


def _check_integers(name: str, array: object) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"PuzzleSet: {name} must be a NumPy array; got {type(array).__name__}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"PuzzleSet: {name} must hold integers; got {array.dtype}")


def _check_tokens_shape(name: str, array: object) -> None:
    _check_integers(name, array)
    if isinstance(array, np.ndarray) and array.ndim != 2:
        raise ValueError(
            f"PuzzleSet: {name} must be [examples, seq_len]; got shape {list(array.shape)}"
        )


def _check_vector(name: str, array: Array) -> None:
    _check_integers(name, array)
    if array.ndim != 1:
        raise ValueError(f"PuzzleSet: {name} must have one axis; got shape {list(array.shape)}")


def _check_indices(name: str, indices: Array, count: int, of: str) -> None:
    """Indices go up from 0 to ``count``; every part has something in it."""
    _check_vector(name, indices)
    if len(indices) < 2 or indices[0] != 0 or indices[-1] != count:
        ends = f"{indices[0]} to {indices[-1]}" if len(indices) else "nothing"
        raise ValueError(f"PuzzleSet: {name} must go from 0 to {count} {of}; got {ends}")
    # Compared, not subtracted: unsigned differences would wrap around.
    falls = np.flatnonzero(indices[1:] <= indices[:-1])
    if len(falls):
        at = int(falls[0])
        raise ValueError(
            f"PuzzleSet: {name} must increase; got {indices[at]}, {indices[at + 1]} at {at}"
        )


def _check_range(name: str, array: Array, top: int, also: int | None, what: str) -> None:
    """Values are in [0, top), or ``also``; names the first that is not."""
    rows = max(1, _CHUNK // max(1, array[0].size))
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        if 0 <= part.min(initial=0) and part.max(initial=0) < top:
            continue
        bad = (part < 0) | (part >= top)
        if also is not None:
            bad &= part != also
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"PuzzleSet: {name} must hold ids in [0, {top}); got {part[at]} in "
                f"{what} {start + at[0]}"
            )
