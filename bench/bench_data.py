"""Generators and solvers of puzzles: C++ on one and two threads beside the same in Python.

A row is the time of one item, so that a slow form can be timed with fewer of them. Before anything
is timed, the forms must give the same items, and Sudoku solutions are checked by the rules.
"""

import os
from collections.abc import Callable
from functools import partial

import numpy as np

from trm_fast.data import _native
from trm_fast.data.puzzles.maze import MazeAugment, generate_mazes, shortest_path
from trm_fast.data.puzzles.sudoku import (
    SudokuAugment,
    check_sudoku,
    generate_sudoku,
    solve_sudoku,
    sudoku_tokens,
)
from trm_fast.data.synthetic.listops import evaluate_listops, generate_listops

from ._tables import Case, Row, Unavailable, rows_of

PYTHON = "Python"
THREADS = {"C++, 1 thread": 1, "C++, 2 threads": 2}
BATCH = 768

Call = Callable[..., tuple[np.ndarray, ...]]


def _sudoku(clues: tuple[int, int], size: int = 9) -> Call:
    return lambda count, **form: generate_sudoku(count, size, clues=clues, **form)


def _solve_sudoku() -> Call:
    puzzles, _ = generate_sudoku(2048)
    return lambda count, **form: solve_sudoku(puzzles[:count], **form)


def _mazes(**options: int) -> Call:
    return lambda count, **form: generate_mazes(count, **options, **form)


def _solve_mazes() -> Call:
    inputs, _ = generate_mazes(2048, openings=30)
    return lambda count, **form: shortest_path(inputs[:count], **form)


def _listops() -> Call:
    return lambda count, **form: generate_listops(count, 50, **form)


def _evaluate() -> Call:
    tokens, _ = generate_listops(65536, 50)
    return lambda count, **form: (evaluate_listops(tokens[:count], **form),)


# What is timed, and how many items make one step in C++ and in Python.
CASES = {
    "Sudoku 9 x 9, 24 to 30 clues": (lambda: _sudoku((24, 30)), 1024, 8),
    "Sudoku 9 x 9, 24 clues": (lambda: _sudoku((24, 24)), 512, 8),
    "Sudoku 6 x 6, 10 to 16 clues": (lambda: _sudoku((10, 16), 6), 4096, 32),
    "Sudoku 4 x 4, 5 to 8 clues": (lambda: _sudoku((5, 8), 4), 8192, 128),
    "Sudoku 9 x 9, solve and prove unique": (_solve_sudoku, 2048, 64),
    "maze 30 x 30": (lambda: _mazes(), 1024, 16),
    "maze 30 x 30, paths of 110 steps or more": (lambda: _mazes(min_path=110), 1024, 16),
    "maze 30 x 30, shortest path": (_solve_mazes, 2048, 32),
    "ListOps, up to 50 tokens": (_listops, 16384, 1024),
    "ListOps, up to 50 tokens, evaluate": (_evaluate, 65536, 1024),
}

# Those that are measured by default.
FEW = {
    "Sudoku 9 x 9, 24 to 30 clues",
    "Sudoku 9 x 9, solve and prove unique",
    "maze 30 x 30",
    "ListOps, up to 50 tokens",
}
AUGMENTATIONS = {
    "Sudoku 9 x 9": (SudokuAugment(), lambda: sudoku_tokens(*generate_sudoku(BATCH))),
    "maze 30 x 30": (MazeAugment(), lambda: generate_mazes(BATCH)),
}


def _check(call: Call, few: int) -> None:
    """Raises AssertionError where the forms differ."""
    fast, plain = (call(few, native=native) for native in (True, False))
    for one, other in zip(fast, plain, strict=True):
        if not np.array_equal(one, other):
            raise AssertionError("C++ and Python must give the same items")


class Data:
    """One kind of items in both forms."""

    device = "cpu"
    baselines = (PYTHON,)
    floor = None
    unit = "B"

    def __init__(self, case: str) -> None:
        if _native.unusable():
            raise Unavailable(str(_native.unusable()))
        prepare, self.many, self.few = CASES[case]
        self.call = prepare()
        _check(self.call, self.few)
        if case.startswith("Sudoku") and "solve" not in case:
            puzzles, solutions = self.call(self.many, native=True)
            assert check_sudoku(solutions, puzzles).all()
            assert (solve_sudoku(puzzles)[1] == 1).all()

    def row(self, name: str) -> Row:
        if name == PYTHON:
            return Row(lambda: self.call(self.few, native=False), items=self.few)
        threads = THREADS[name]
        if threads > len(os.sched_getaffinity(0)):
            raise Unavailable(f"needs {threads} cores")
        return Row(lambda: self.call(self.many, native=True, threads=threads), items=self.many)


class Augmentation:
    """Augmentations of a batch."""

    device = "cpu"
    baselines = ()
    floor = None
    unit = "B"

    def row(self, name: str) -> Row:
        augment, generate = AUGMENTATIONS[name]
        inputs, labels = (tokens.astype(np.int64) for tokens in generate())
        return Row(partial(augment, inputs, labels, np.random.default_rng(0)))


test_data = rows_of(
    Case(name, f"{name}: time of one", partial(Data, name), (PYTHON, *THREADS), default=name in FEW)
    for name in CASES
)
test_augmentation = rows_of(
    [Case("batch", f"Augmentation of {BATCH} examples", Augmentation, tuple(AUGMENTATIONS))]
)
