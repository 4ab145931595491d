"""Sudoku of sizes 4, 6 and 9: puzzles with one solution, their solver, difficulty and symmetries.

A grid of size n has n rows, n columns and n boxes, each of which holds every digit from 1 to n
once. Boxes are 2 x 2, 2 rows x 3 columns and 3 x 3. A grid is an array of n * n digits in reading
order; 0 is blank.

**Solver.** Two rules are applied until they find nothing more: a cell with one digit left gets it
(naked single); a digit with one cell left in a row, column or box gets that (hidden single). Then
the solver guesses: it takes the blank cell with the fewest digits left, the first of them in
reading order, and tries every one of its digits in ascending order. A search for two solutions
proves that there is one.

**Difficulty.** The deepest nesting of guesses in that search, dead ends included: 0 if the two
rules suffice, 1 if no guess is made while another one is open, and so on. The search tries every
digit of a cell, so renaming digits changes neither the difficulty nor the number of guesses.

**Generator.** A random grid is a search from the blank grid that tries digits in random order. A
puzzle is what is left when its cells, in random order, lose their digits, each only if no other
solution appears, until the number of clues is one that was drawn from the wanted range. Neither
grids nor puzzles are drawn with equal probabilities. A 9 x 9 puzzle from which no clue can be taken
has 24.4 clues on average: 97 % of all attempts get down to 26, 55 % to 24, 4 % to 22.

Tokens are those of official TRM training: digit + 1, so blank is 1; 0 is padding; the vocabulary
has n + 2.

Sources: Samsung SAIL Montreal, TinyRecursiveModels, dataset/build_sudoku_dataset.py (tokens,
symmetries); sapientinc sudoku-extreme rates puzzles by guesses too, those of another solver;
McGuire et al. 2012, arXiv:1201.0749 (no 9 x 9 puzzle has fewer than 17 clues).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trm_fast.data import _items, _native

Grids = NDArray[np.uint8]

# Rows and columns of a box.
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
# Ranges that nearly every attempt ends in, and the fewest clues that one solution needs.
CLUES = {4: (5, 8), 6: (10, 16), 9: (24, 30)}
LEAST_CLUES = {4: 4, 6: 8, 9: 17}

# Grids in one native call: 25 ms on one core where the first attempts do.
_PIECE = 256
_DEEPEST = 81


def generate_sudoku(
    count: int,
    size: int = 9,
    *,
    clues: int | tuple[int, int] | None = None,
    difficulty: int | tuple[int, int] | None = None,
    unique: bool = True,
    seed: int = 0,
    threads: int | None = None,
    attempts: int = 1000,
    native: bool | None = None,
) -> tuple[Grids, Grids]:
    """Makes random puzzles, no two alike, and their solutions.

    An item depends on the seed and its place alone: not on ``threads``, ``native``, or how many are
    made. Parts of one call have nothing in common; two calls with different seeds may.

    Args:
        count: number of puzzles, >= 0.
        size: 4, 6 or 9.
        clues: number of clues, or (least, most); None for 5 to 8, 10 to 16 and 24 to 30.
        difficulty: deepest nesting of guesses, or (least, most); 0 asks for puzzles that singles
            solve, None for any.
        unique: whether there must be one solution; else clues are taken without a look at it.
        seed: in [0, 2^64).
        threads: of the C++ form; None for as many as there are cores.
        attempts: grids to try for one puzzle before an error.
        native: True for C++, False for Python, None for C++ if it is built.

    Returns:
        Puzzles and solutions, uint8 [count, size * size], 0 for blank.

    Raises:
        TypeError: a number is not a whole number.
        ValueError: an argument is out of range; a difficulty is asked for with ``unique=False``; or
            a puzzle has used up its attempts.
        BackendError: ``native`` is True and the C++ form cannot be used.
    """
    who = "generate_sudoku"
    box_rows, box_columns = _box(who, size)
    low, high = _items.number_range(
        who, "clues", CLUES[size] if clues is None else clues, 0, size * size
    )
    if unique and high < LEAST_CLUES[size]:
        least = LEAST_CLUES[size]
        raise ValueError(f"{who}: clues must be >= {least} for one solution; got {high}")
    easiest, hardest = 0, -1
    if difficulty is not None:
        easiest, hardest = _items.number_range(who, "difficulty", difficulty, 0, _DEEPEST)
        if not unique:
            raise ValueError(f"{who}: difficulty must be None with unique=False; got {difficulty}")
    module = _native.choose(who, native)

    def generate(items: Any) -> Any:
        return module.generate_sudoku(
            items, box_rows, box_columns, low, high, bool(unique), easiest, hardest
        )

    puzzles, solutions = _items.distinct_items(
        who, module, generate, count, seed, threads, attempts, _PIECE
    )
    return puzzles, solutions


def solve_sudoku(
    puzzles: NDArray[Any], *, threads: int | None = None, native: bool | None = None
) -> tuple[Grids, NDArray[np.int64]]:
    """Solves puzzles and counts their solutions.

    Args:
        puzzles: integers [count, 16, 36 or 81], 0 for blank.
        threads: of the C++ form; None for as many as there are cores.
        native: True for C++, False for Python, None for C++ if it is built.

    Returns:
        The first solution of each, uint8 of the same shape, 0 where there is none; and the number
        of solutions, int64 [count]: 0, 1, or 2 for two or more.

    Raises:
        TypeError: the puzzles are no integers.
        ValueError: they have another shape, or values outside of 0 to size.
        BackendError: ``native`` is True and the C++ form cannot be used.
    """
    solutions, numbers, _, _ = _search("solve_sudoku", puzzles, threads, native)
    return solutions, numbers


def sudoku_difficulty(
    puzzles: NDArray[Any], *, threads: int | None = None, native: bool | None = None
) -> NDArray[np.int64]:
    """Returns the deepest nesting of guesses that each puzzle needs, int64 [count]; see the page.

    Args:
        puzzles: integers [count, 16, 36 or 81], 0 for blank, each with one solution.
        threads: of the C++ form; None for as many as there are cores.
        native: True for C++, False for Python, None for C++ if it is built.

    Raises:
        TypeError: the puzzles are no integers.
        ValueError: they have another shape, values outside of 0 to size, or not one solution.
        BackendError: ``native`` is True and the C++ form cannot be used.
    """
    return _rated("sudoku_difficulty", puzzles, threads, native)[0]


def sudoku_guesses(
    puzzles: NDArray[Any], *, threads: int | None = None, native: bool | None = None
) -> NDArray[np.int64]:
    """Returns how many digits the search tries in all, int64 [count]: a finer measure of
    difficulty.

    Args and errors are those of ``sudoku_difficulty``.
    """
    return _rated("sudoku_guesses", puzzles, threads, native)[1]


def check_sudoku(solutions: NDArray[Any], puzzles: NDArray[Any] | None = None) -> NDArray[np.bool_]:
    """Says which grids are right: every row, column and box has every digit once.

    Args:
        solutions: integers [count, 16, 36 or 81], any values.
        puzzles: same shape; a right grid has all of their clues too. None to leave that out.

    Returns:
        Booleans [count].

    Raises:
        TypeError: an array does not hold integers.
        ValueError: an array has another shape.
    """
    who = "check_sudoku"
    solutions = _integers(who, "solutions", solutions)
    size = _size(who, "solutions", solutions)
    ascending = np.arange(1, size + 1)
    right = np.ones(len(solutions), bool)
    for unit in sudoku_units(size):
        right &= (np.sort(solutions[:, unit], axis=1) == ascending).all(axis=1)
    if puzzles is not None:
        puzzles = _integers(who, "puzzles", puzzles)
        if puzzles.shape != solutions.shape:
            shapes = f"{list(puzzles.shape)} and {list(solutions.shape)}"
            raise ValueError(f"{who}: puzzles and solutions must have one shape; got {shapes}")
        right &= ((puzzles == 0) | (puzzles == solutions)).all(axis=1)
    return right


def sudoku_units(size: int) -> NDArray[np.int64]:
    """Returns the cells of each row, then column, then box, int64 [3 * size, size].

    Args:
        size: 4, 6 or 9.

    Raises:
        ValueError: the size is another one.
    """
    box_rows, box_columns = _box("sudoku_units", size)
    cells = np.arange(size**2).reshape(size, size)
    boxes = cells.reshape(size // box_rows, box_rows, size // box_columns, box_columns)
    return np.concatenate([cells, cells.T, boxes.swapaxes(1, 2).reshape(size, size)])


def sudoku_tokens(
    puzzles: NDArray[Any], solutions: NDArray[Any]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Returns inputs and labels, digit + 1, uint8 [count, size * size]; see the page.

    Args:
        puzzles: integers [count, 16, 36 or 81], 0 for blank.
        solutions: the same shape, without blanks.

    Raises:
        TypeError: an array does not hold integers.
        ValueError: an array has another shape or values out of range.
    """
    who = "sudoku_tokens"
    puzzles = _integers(who, "puzzles", puzzles)
    size = _size(who, "puzzles", puzzles)
    inputs = _items.grids(who, "puzzles", puzzles, size)
    labels = _items.grids(who, "solutions", solutions, size, size * size)
    if len(inputs) != len(labels):
        raise ValueError(
            f"{who}: puzzles and solutions must be as many; got {len(inputs)} and {len(labels)}"
        )
    if (labels == 0).any():
        raise ValueError(f"{who}: solutions must be complete; got {(labels == 0).sum()} blanks")
    return inputs + np.uint8(1), labels + np.uint8(1)


class SudokuAugment:
    """Draws a symmetry of the grid for each example of a batch: ``augment(inputs, labels,
    generator)``.

    Digits are renamed, bands of boxes and the rows in them change places, stacks and their columns
    too; every second grid is transposed where its boxes are square. Padding, blanks and negative
    labels stay what they are.

    Args:
        size: 4, 6 or 9.

    Raises:
        ValueError: the size is another one.
    """

    def __init__(self, size: int = 9) -> None:
        self.size = size
        self._box_rows, self._box_columns = _box("SudokuAugment", size)

    def __call__(
        self, inputs: NDArray[Any], labels: NDArray[Any], generator: np.random.Generator
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Returns inputs and labels under one symmetry per example.

        Args:
            inputs: tokens, integers [batch, size * size].
            labels: the same shape; tokens, or a negative number for no label.
            generator: source of the symmetries; advanced.

        Raises:
            ValueError: an array has another shape, or a token is not one of the vocabulary.
        """
        wanted = (len(inputs), self.size**2)
        if inputs.shape != wanted or labels.shape != wanted:
            shapes = f"{list(inputs.shape)} and {list(labels.shape)}"
            required = f"inputs and labels must be [batch, {wanted[1]}]"
            raise ValueError(f"SudokuAugment: {required}; got {shapes}")
        most = max(inputs.max(initial=0), labels.max(initial=0))
        if most > self.size + 1 or inputs.min(initial=0) < 0:
            required = f"inputs must be from 0 to {self.size + 1}, and labels no more"
            raise ValueError(f"SudokuAugment: {required}; got {inputs.min()} to {most}")
        cells = self._cells(len(inputs), generator)
        names = np.tile(np.arange(self.size + 2), (len(inputs), 1))  # padding, blank, digits
        names[:, 2:] = generator.permuted(names[:, 2:], axis=1)
        return self._apply(inputs, names, cells), self._apply(labels, names, cells)

    def _cells(self, batch: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """Returns from which cell each cell of each example comes, [batch, size * size]."""
        rows = _lines(batch, self.size // self._box_rows, self._box_rows, generator)
        columns = _lines(batch, self.size // self._box_columns, self._box_columns, generator)
        cells = rows[:, :, None] * self.size + columns[:, None, :]
        if self._box_rows == self._box_columns:
            turned = generator.random(batch) < 0.5
            cells[turned] = cells[turned].swapaxes(1, 2)
        return cells.reshape(batch, self.size**2)

    def _apply(
        self, tokens: NDArray[Any], names: NDArray[np.int64], cells: NDArray[np.int64]
    ) -> NDArray[Any]:
        moved = np.take_along_axis(tokens, cells, axis=1)
        named = np.take_along_axis(names, np.where(moved < 0, 0, moved).astype(np.int64), axis=1)
        return np.where(moved < 0, moved, named.astype(tokens.dtype))


def _lines(
    batch: int, groups: int, lines: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Returns lines in random order inside of their groups, and groups in random order."""
    group = generator.permuted(np.tile(np.arange(groups), (batch, 1)), axis=1)
    line = generator.permuted(np.tile(np.arange(lines), (batch, groups, 1)), axis=2)
    order: NDArray[np.int64] = group[:, :, None] * lines + line
    return order.reshape(batch, groups * lines)


def _box(who: str, size: int) -> tuple[int, int]:
    if size not in BOXES:
        raise ValueError(f"{who}: size must be 4, 6 or 9; got {size!r}")
    return BOXES[size]


def _integers(who: str, name: str, grids: NDArray[Any]) -> NDArray[Any]:
    grids = np.asarray(grids)
    if grids.dtype.kind not in "iu":
        raise TypeError(f"{who}: {name} must hold integers; got {grids.dtype}")
    return grids


def _size(who: str, name: str, grids: NDArray[Any]) -> int:
    for size in BOXES:
        if grids.ndim == 2 and grids.shape[1] == size**2:
            return size
    raise ValueError(f"{who}: {name} must be [count, 16, 36 or 81]; got {list(grids.shape)}")


def _search(
    who: str, puzzles: NDArray[Any], threads: int | None, native: bool | None
) -> list[NDArray[Any]]:
    """Returns solutions, their numbers, depths and guesses."""
    puzzles = _integers(who, "puzzles", puzzles)
    size = _size(who, "puzzles", puzzles)
    puzzles = _items.grids(who, "puzzles", puzzles, size)
    module, threads = _native.choose(who, native), _items.thread_count(who, threads)
    parts = [
        module.solve_sudoku(piece, *BOXES[size], threads)
        for piece in _items.pieces(puzzles, _PIECE)
    ]
    return _items.joined(parts)


def _rated(
    who: str, puzzles: NDArray[Any], threads: int | None, native: bool | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    _, numbers, depths, guesses = _search(who, puzzles, threads, native)
    wrong = np.flatnonzero(numbers != 1)
    if len(wrong):
        found = "none" if numbers[wrong[0]] == 0 else "several"
        raise ValueError(f"{who}: puzzles[{wrong[0]}] must have one solution; got {found}")
    return depths, guesses
