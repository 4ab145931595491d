"""How far one gets with Sudoku without a model that has learned to."""

import numpy as np
from numpy.typing import NDArray

from trm_fast.data.puzzles import PuzzleSet
from trm_fast.data.puzzles.sudoku import sudoku_units

Tokens = NDArray[np.int64]

_BLANK, _FIRST = 1, 2  # tokens of a blank and of the digit 1


def most_common(train: PuzzleSet, test: PuzzleSet) -> float:
    """Returns the share of test puzzles that are solved by putting into each blank cell the digit
    that is most often there in the solutions of the training set: no rule is known."""
    tokens = np.arange(train.metadata.vocab_size)
    counts = (np.asarray(train.labels)[:, :, None] == tokens).sum(axis=0)
    return _solved(test, np.broadcast_to(counts.argmax(axis=1), test.inputs.shape))


def elimination(test: PuzzleSet, rounds: int | None = None, seed: int = 0) -> float:
    """Returns the share of test puzzles that are solved by elimination and luck: a blank cell for
    which row, column and box leave one digit gets it, and in the end all others a random one that
    they leave. The rules are known, and nothing is searched.

    Args:
        test: puzzles in official tokens.
        rounds: how often all cells are looked at; None goes on while something is found.
        seed: of the guesses.
    """
    grids, found = np.array(test.inputs), True
    size = round(grids.shape[1] ** 0.5)
    digits = np.arange(_FIRST, _FIRST + size)
    while found and rounds != 0:
        left = _left(grids, digits)
        certain = (grids == _BLANK) & (left.sum(axis=2) == 1)
        grids = np.where(certain, digits[left.argmax(axis=2)], grids)
        found = bool(certain.any())
        rounds = None if rounds is None else rounds - 1
    keys = np.random.default_rng(seed).random((*grids.shape, size))
    guesses = digits[np.where(_left(grids, digits), keys, -1.0).argmax(axis=2)]
    return _solved(test, np.where(grids == _BLANK, guesses, grids))


def _left(grids: Tokens, digits: Tokens) -> NDArray[np.bool_]:
    """Returns which digits the row, column and box of each cell leave, [count, cells, size]."""
    taken = np.zeros((*grids.shape, len(digits)), dtype=bool)
    for unit in sudoku_units(len(digits)):
        taken[:, unit] |= (grids[:, unit, None] == digits).any(axis=1)[:, None]
    return ~taken


def _solved(test: PuzzleSet, guesses: NDArray[np.int64]) -> float:
    inputs = np.asarray(test.inputs)
    filled = np.where(inputs == _BLANK, guesses, inputs)
    return float((filled == np.asarray(test.labels)).all(axis=1).mean())
