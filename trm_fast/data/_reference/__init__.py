"""The functions of the module ``trm_fast._data`` in Python, equal to the bit, for where it is not
built.

Arguments are checked on the pages: puzzles/sudoku.py, puzzles/maze.py, synthetic/listops.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trm_fast.data._reference import listops, maze, sudoku
from trm_fast.data._reference.random import Random

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Items:
    """Which items to make, from which attempt on.

    Args:
        seed: of the whole data set, in [0, 2^64).
        indices: numbers of the items, [count].
        first: first attempt at each of them.
        tries: attempts at each item in this call.
        threads: of no use here; C++ shares the items out to so many.
    """

    seed: int
    indices: Numbers
    first: int
    tries: int
    threads: int


def _attempt(items: Items, make: Callable[[Random, int], bool]) -> Numbers:
    """Calls ``make`` for the attempts at each item; returns which one was accepted, or -1."""
    accepted = np.full(len(items.indices), -1, np.int64)
    for i, index in enumerate(items.indices.tolist()):
        for attempt in range(items.first, items.first + items.tries):
            if make(Random(items.seed, index, attempt), i):
                accepted[i] = attempt
                break
    return accepted


def generate_sudoku(
    items: Items,
    box_rows: int,
    box_columns: int,
    fewest_clues: int,
    most_clues: int,
    unique: bool,
    least_depth: int,
    most_depth: int,
) -> tuple[Bytes, Bytes, Numbers]:
    """Returns puzzles, solutions and accepted attempts."""
    board = sudoku.Board(box_rows, box_columns)
    depths = (least_depth, most_depth) if most_depth >= 0 else None
    wanted = sudoku.Wanted((fewest_clues, most_clues), unique, depths)
    shape = (len(items.indices), board.cells)
    puzzles, solutions = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)

    def make(random: Random, i: int) -> bool:
        made = sudoku.generate(board, wanted, random)
        if made:
            puzzles[i], solutions[i] = made
        return made is not None

    return puzzles, solutions, _attempt(items, make)


def solve_sudoku(
    puzzles: Bytes, box_rows: int, box_columns: int, threads: int
) -> tuple[Bytes, Numbers, Numbers, Numbers]:
    """Returns first solutions, their numbers up to 2, depths and guesses."""
    board = sudoku.Board(box_rows, box_columns)
    solutions = np.zeros_like(puzzles)
    counts = np.zeros((3, len(puzzles)), np.int64)
    for i, puzzle in enumerate(puzzles.tolist()):
        found = board.solve(puzzle)
        counts[:, i] = found.solutions, found.depth, found.guesses
        if found.first:
            solutions[i] = found.first
    return solutions, *counts


def generate_mazes(
    items: Items, height: int, width: int, openings: int, min_path: int
) -> tuple[Bytes, Bytes, Numbers]:
    """Returns inputs, labels and accepted attempts."""
    shape = (len(items.indices), height * width)
    inputs, labels = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)

    def make(random: Random, i: int) -> bool:
        made = maze.generate(height, width, openings, min_path, random)
        if made:
            inputs[i], labels[i] = made.tokens(), made.solved(made.tokens())
        return made is not None

    return inputs, labels, _attempt(items, make)


def solve_mazes(
    inputs: Bytes, height: int, width: int, threads: int
) -> tuple[Bytes, Numbers, Numbers]:
    """Returns labels, lengths (-1: no path) and numbers of shortest paths up to 2."""
    labels = np.zeros_like(inputs)
    counts = np.zeros((2, len(inputs)), np.int64)
    for i, tokens in enumerate(inputs.tolist()):
        read = maze.Maze.read(tokens, height, width)
        labels[i] = read.solved(tokens)
        counts[:, i] = read.distance[read.goal], read.ways[read.goal]
    return labels, *counts


def generate_listops(
    items: Items, min_length: int, max_length: int, max_depth: int, max_args: int, nesting: float
) -> tuple[Bytes, Numbers]:
    """Returns tokens and accepted attempts."""
    tokens = np.zeros((len(items.indices), max_length), np.uint8)

    def make(random: Random, i: int) -> bool:
        made = listops.generate(max_length, max_depth, max_args, nesting, random)
        if made is None or len(made) < min_length:
            return False
        tokens[i, : len(made)] = made
        return True

    return tokens, _attempt(items, make)


def evaluate_listops(tokens: Bytes, threads: int) -> Numbers:
    """Returns the values, -1 for what is not one whole expression."""
    values = [listops.evaluate(row) for row in tokens.tolist()]
    return np.array(values, np.int64)
