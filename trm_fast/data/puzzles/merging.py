"""``merge``: several puzzle data sets as one, each with puzzle identifiers of its own."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trm_fast.data.puzzles.puzzle_set import Array, PuzzleSet


def merge(sets: Sequence[PuzzleSet]) -> PuzzleSet:
    """Puts data sets one after another and gives each puzzle identifiers of its own.

    Identifier 0 stays the blank one of all; identifier i > 0 of a set becomes i plus the sum of
    ``num_puzzle_identifiers - 1`` over the sets before it.

    Args:
        sets: at least one, with equal sequence length, vocabulary and special ids, blank 0.

    Returns:
        The joined set, in memory.

    Raises:
        ValueError: there are none, or they differ in more than their contents.
    """
    _check_alike(sets)
    if any(data.metadata.blank_identifier_id != 0 for data in sets):
        raise ValueError("merge: blank_identifier_id must be 0 in every set")
    offsets = np.cumsum([0] + [data.metadata.num_puzzle_identifiers - 1 for data in sets])
    identifiers = [
        np.where(data.puzzle_identifiers > 0, data.puzzle_identifiers + offset, 0)
        for data, offset in zip(sets, offsets[:-1], strict=True)
    ]
    names = tuple(dict.fromkeys(name for data in sets for name in data.metadata.sets))
    return concatenate(sets, identifiers, int(offsets[-1]) + 1, names)


def merge_identifiers(lists: Sequence[Sequence[str]]) -> list[str]:
    """Joins the names of identifiers as ``merge`` joins the identifiers: one blank, then the rest.

    Raises:
        ValueError: there are no lists, or one is empty.
    """
    if not lists or not all(lists):
        raise ValueError("merge_identifiers: each set needs the name of its blank identifier")
    return [lists[0][0], *(name for names in lists for name in names[1:])]


def concatenate(
    sets: Sequence[PuzzleSet], identifiers: Sequence[Array], num: int, names: tuple[str, ...]
) -> PuzzleSet:
    """Puts sets one after another under given identifiers; see ``merge``."""
    _check_alike(sets)
    examples, puzzles = sum(map(len, sets)), sum(data.metadata.total_puzzles for data in sets)
    known = all(data.sources for data in sets)
    metadata = replace(
        sets[0].metadata,
        num_puzzle_identifiers=num,
        total_groups=sum(data.metadata.total_groups for data in sets),
        total_puzzles=puzzles,
        mean_puzzle_examples=examples / puzzles,
        sets=names,
    )
    return PuzzleSet(
        np.concatenate([data.inputs for data in sets]),
        np.concatenate([data.labels for data in sets]),
        np.concatenate(identifiers).astype(np.int32),
        _join_indices([data.puzzle_indices for data in sets]),
        _join_indices([data.group_indices for data in sets]),
        metadata,
        tuple(source for data in sets for source in data.sources) if known else (),
    )


def _join_indices(parts: Sequence[Array]) -> Array:
    starts = np.cumsum([0] + [int(part[-1]) for part in parts])
    shifted = [part[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
    return np.concatenate([np.zeros(1, np.int64), *shifted])


def _check_alike(sets: Sequence[PuzzleSet]) -> None:
    if not sets:
        raise ValueError("merge: at least one set is required; got none")
    for name in ("seq_len", "vocab_size", "pad_id", "ignore_label_id", "blank_identifier_id"):
        values = [getattr(data.metadata, name) for data in sets]
        if len({*values}) > 1:
            raise ValueError(f"merge: {name} must be equal in all sets; got {values}")
