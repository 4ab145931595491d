"""Which examples are forms of each other: the same but for a symmetry that augmentation draws.

A *key* is a number of 64 bits that all forms of an example share. Examples that are no forms of
each other share one by a collision only, at 1 in 2^64 for each pair of them, and

- Sudoku: where colour refinement cannot tell two sets of clues apart. Every row, column, box and
  digit gets a colour, which is refined by the colours of what it meets, so that the key depends on
  the whole puzzle. Such a pair is called a repeat, the error on the safe side; none is known, and a
  test compares the keys with an exhaustive search on 4 x 4.
- ARC: an example is a pair, wherever it stands on the canvas and whatever its task is called, and
  of the variants of a task, which are forms of each other by their making, the first one counts.

Source: B. Weisfeiler and A. Leman 1968 (colour refinement).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trm_fast.data.puzzles.arc import colour_sums
from trm_fast.data.puzzles.arc_grids import FIRST_COLOUR, SIDE, VOCAB_SIZE
from trm_fast.data.puzzles.puzzle_set import PuzzleSet
from trm_fast.data.puzzles.sudoku import BOXES

Array = NDArray[Any]
Keys = NDArray[np.uint64]
KeysOf = Callable[[PuzzleSet, Array], Keys]

_TOKENS = 1 << 18  # that are looked at together: their numbers stay in a cache
_ROUNDS = 4  # of refinement: after two, every line has met every other one


class Repeats(NamedTuple):
    """Examples of a test that are in the training data too.

    Args:
        seen: how many.
        of: of how many.
        test, train: set and number of the first of them, and of the one that it repeats; None if
            there is none.
    """

    seen: int
    of: int
    test: tuple[int, int] | None = None
    train: tuple[int, int] | None = None


def repeats(train: Sequence[PuzzleSet], test: Sequence[PuzzleSet], keys_of: KeysOf) -> Repeats:
    """Counts the examples of a test of which the training data have a form.

    Takes 33 bytes per example of the test and 40 MB, none for those of the training data.

    Args:
        train, test: the sets of each.
        keys_of: a set and examples of it to their keys.
    """
    found = list(_keyed(test, keys_of))
    if not found:
        return Repeats(0, 0)
    keys, places, each = np.unique(
        np.concatenate([own for _, _, own in found]), return_index=True, return_inverse=True
    )
    seen, first = np.zeros(len(keys), bool), None
    for index, examples, candidates in _keyed(train, keys_of):
        near = np.minimum(np.searchsorted(keys, candidates), len(keys) - 1)
        hits = np.flatnonzero(keys[near] == candidates)
        seen[near[hits]] = True
        if len(hits) and first is None:
            first = int(places[near[hits[0]]]), (index, int(examples[hits[0]]))
    if first is None:
        return Repeats(0, len(each))
    every = ((index, example) for index, own, _ in found for example in own.tolist())
    return Repeats(int(seen[each].sum()), len(each), next(islice(every, first[0], None)), first[1])


def _keyed(sets: Sequence[PuzzleSet], keys_of: KeysOf) -> Iterator[tuple[int, Array, Keys]]:
    """Yields the number of a set, examples of it, and their keys."""
    for index, data in enumerate(sets):
        examples = _of_first_variants(data) if keys_of is arc_keys else np.arange(len(data))
        size = max(1, _TOKENS // max(1, data.metadata.seq_len))
        for start in range(0, len(examples), size):
            piece = examples[start : start + size]
            yield index, piece, keys_of(data, piece)


def _of_first_variants(data: PuzzleSet) -> Array:
    """Returns the examples of the first puzzle of each group: ARC has a thousand forms of it."""
    firsts = data.group_indices[:-1]
    starts = data.puzzle_indices[firsts].tolist()
    ends = data.puzzle_indices[firsts + 1].tolist()
    pieces = [np.arange(start, end) for start, end in zip(starts, ends, strict=True)]
    return np.concatenate([np.arange(0), *pieces])


def exact_keys(data: PuzzleSet, examples: Array) -> Keys:
    """Returns keys of puzzle identifier and question, without any symmetry; padding behind, which
    depends on the longest question of a file, does not count."""
    tokens = _words(data.inputs[examples].astype(np.int64) - data.metadata.pad_id)
    own = _words(data.puzzle_identifiers[data.puzzle_of(examples)].astype(np.int64))
    return _mixed(tokens @ _weights(tokens.shape[1]) + _mixed(own))


def maze_keys(height: int, width: int) -> KeysOf:
    """Returns what gives keys of mazes under the symmetries of ``MazeAugment``."""
    weights = _weights(height * width).reshape(height, width)
    mirrored = [weights, weights[::-1], weights[:, ::-1], weights[::-1, ::-1]]
    if height == width:
        mirrored += [each.T for each in mirrored]
    columns = np.stack([each.reshape(-1) for each in mirrored], axis=1)

    def keys(data: PuzzleSet, examples: Array) -> Keys:
        found: Keys = _mixed(_words(data.inputs[examples]) @ columns).min(axis=1)
        return found

    return keys


def sudoku_keys(size: int) -> KeysOf:
    """Returns what gives keys of Sudokus under the symmetries of ``SudokuAugment``: names of
    digits, order of bands, stacks and of lines in them, and transposition of square boxes.

    Args:
        size: 4, 6 or 9.
    """
    height, width = BOXES[size]

    def keys(data: PuzzleSet, examples: Array) -> Keys:
        digits = data.inputs[examples].astype(np.int64).reshape(-1, size, size) - 1
        return _refined(np.where((digits < 1) | (digits > size), 0, digits), height, width)

    return keys


def _refined(grids: Array, height: int, width: int) -> Keys:
    """Colour refinement of the clues of grids [count, size, size] with boxes height x width."""
    count, size, _ = grids.shape
    given = (grids > 0).astype(np.uint64)
    each = [(grids == digit).reshape(count, -1).astype(np.uint64) for digit in range(1, size + 1)]
    rows = np.full((count, size), 1, np.uint64)
    # Where lines of both directions may change places they begin alike.
    columns = np.full((count, size), 1 if height == width else 2, np.uint64)
    digits = np.full((count, size), 3, np.uint64)
    boxes = np.full((count, size // height, 1, size // width, 1), 4, np.uint64)
    place = np.maximum(grids - 1, 0).reshape(count, -1)
    in_boxes = (count, size // height, height, size // width, width)
    for _ in range(_ROUNDS):
        named = np.take_along_axis(digits, place, axis=1).reshape(grids.shape)
        lines = rows[:, :, None] + columns[:, None, :]
        cells = (lines + named * _ODD[0]).reshape(in_boxes) + boxes * _ODD[1]
        cells = _mixed(cells).reshape(grids.shape) * given
        boxes = _mixed(cells.reshape(in_boxes).sum(axis=(2, 4), keepdims=True))
        rows = _lines(rows, cells.sum(axis=2, dtype=np.uint64), height)
        columns = _lines(columns, cells.sum(axis=1, dtype=np.uint64), width)
        flat = cells.reshape(count, -1)
        met = np.stack([(flat * own).sum(axis=1, dtype=np.uint64) for own in each], axis=1)
        digits = _mixed(digits * _ODD[2] + met)
    both = [_mixed(lines.sum(axis=1, dtype=np.uint64)) for lines in (rows, columns)]
    return _mixed(both[0] + both[1] + digits.sum(axis=1, dtype=np.uint64) * _ODD[0])


def _lines(colours: Keys, met: Keys, together: int) -> Keys:
    """Returns new colours of parallel lines, which know their band and each other."""
    own = _mixed(colours * _ODD[2] + met)
    bands = own.reshape(len(own), -1, together).sum(axis=2, dtype=np.uint64)
    bands = _mixed(bands) + _mixed(_mixed(bands).sum(axis=1, keepdims=True, dtype=np.uint64))
    return _mixed(own + np.repeat(bands, together, axis=1) * _ODD[3])


def arc_keys(data: PuzzleSet, examples: Array) -> Keys:
    """Returns keys of ARC pairs under the symmetries of the square and permutations of the colours
    1 to 9, wherever the grids stand on their canvases."""
    pairs = [
        (_grid(question), _grid(answer))
        for question, answer in zip(data.inputs[examples], data.labels[examples], strict=True)
    ]
    sums = colour_sums(pairs)  # [8 symmetries, pairs, colours]
    others = _mixed(sums[:, :, 1:]).sum(axis=2, dtype=np.uint64)
    found: Keys = _mixed(_mixed(sums[:, :, 0]) * _ODD[0] + others).min(axis=0, initial=_LAST)
    return found


def _grid(canvas: Array) -> Array:
    """Returns the colours on a canvas [900], wherever they stand; nothing where there are none."""
    tokens = canvas.reshape(SIDE, SIDE)
    coloured = (tokens >= FIRST_COLOUR) & (tokens < VOCAB_SIZE)
    rows, columns = (np.flatnonzero(coloured.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros((0, 0), np.uint8)
    grid = tokens[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.where(grid >= FIRST_COLOUR, grid - FIRST_COLOUR, 0).astype(np.uint8)


# Arithmetic is modulo 2^64. The same numbers in every process, and the first ones whatever their
# count, as files of one data set may differ in length.
_LAST = np.uint64(0xFFFFFFFFFFFFFFFF)


def _weights(count: int) -> Keys:
    generator = np.random.Generator(np.random.Philox(2))
    return generator.integers(0, 1 << 64, count, dtype=np.uint64)


_ODD = _weights(4) | np.uint64(1)


def _words(tokens: Array) -> Keys:
    return tokens.astype(np.int64).view(np.uint64)


def _mixed(values: Keys) -> Keys:
    """Returns numbers of which no sum tells those that were added up."""
    values = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return values ^ (values >> np.uint64(29))
