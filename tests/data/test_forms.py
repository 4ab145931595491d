"""A test example is seen if augmentation makes it of one in the training data."""

from itertools import permutations, product

import numpy as np
import pytest

from trm_fast.data.puzzles import PuzzleSet
from trm_fast.data.puzzles.arc import encode_arc
from trm_fast.data.puzzles.arc_corpus import ArcTask
from trm_fast.data.puzzles.forms import (
    arc_keys,
    exact_keys,
    maze_keys,
    repeats,
    sudoku_keys,
)
from trm_fast.data.puzzles.maze import MazeAugment, generate_mazes
from trm_fast.data.puzzles.sudoku import SudokuAugment, generate_sudoku, sudoku_tokens


def sudokus(count, size, seed=0):
    return sudoku_tokens(*generate_sudoku(count, size, seed=seed))


def puzzles(inputs, labels, vocabulary=12):
    return PuzzleSet.of_pairs(inputs, labels, vocabulary)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_every_form_of_a_sudoku_is_a_repeat(size):
    inputs, labels = sudokus(40, size)
    forms = SudokuAugment(size)(inputs, labels, np.random.default_rng(0))
    found = repeats([puzzles(inputs, labels)], [puzzles(*forms)], sudoku_keys(size))
    assert (found.seen, found.of) == (40, 40)
    assert repeats([puzzles(inputs, labels)], [puzzles(*forms)], exact_keys).seen < 20


@pytest.mark.parametrize("size", [6, 9])
def test_other_sudokus_are_no_repeats(size):
    train, test = puzzles(*sudokus(300, size)), puzzles(*sudokus(300, size, seed=1))
    assert repeats([train], [test], sudoku_keys(size)).seen == 0


def test_one_clue_less_is_another_sudoku():
    inputs, labels = sudokus(30, 9)
    less = inputs.copy()
    for row in less:
        row[np.flatnonzero(row > 1)[0]] = 1
    assert repeats([puzzles(inputs, labels)], [puzzles(less, labels)], sudoku_keys(9)).seen == 0


def lowest_form(grid):
    """The least of all forms of a 4 x 4 Sudoku, with digits named in the order of reading."""
    lines = [
        [2 * band + line for band, inner in zip(bands, orders, strict=True) for line in inner]
        for bands in permutations(range(2))
        for orders in product(permutations(range(2)), repeat=2)
    ]
    forms = []
    for rows, columns in product(lines, lines):
        moved = grid[np.ix_(rows, columns)]
        for turned in (moved, moved.T):
            names: dict[int, int] = {}
            cells = turned.ravel().tolist()
            forms.append(
                tuple(names.setdefault(cell, len(names)) if cell else -1 for cell in cells)
            )
    return tuple(min(forms))


def test_keys_of_small_sudokus_are_those_of_an_exhaustive_search():
    inputs, labels = sudokus(120, 4)
    exact = [lowest_form(grid) for grid in (inputs.reshape(-1, 4, 4).astype(int) - 1)]
    keys = sudoku_keys(4)(puzzles(inputs, labels), np.arange(len(inputs))).tolist()
    assert len({*exact}) < len(exact)  # some are forms of others
    assert len({*zip(exact, keys, strict=True)}) == len({*exact}) == len({*keys})


@pytest.mark.parametrize("shape", [(8, 8), (6, 9)])
def test_every_form_of_a_maze_is_a_repeat(shape):
    made = generate_mazes(40, *shape, seed=0)
    forms = MazeAugment(*shape)(*made, np.random.default_rng(0))
    other = generate_mazes(40, *shape, seed=1)
    train = puzzles(*made)
    assert repeats([train], [puzzles(*forms)], maze_keys(*shape)).seen == 40
    assert repeats([train], [puzzles(*other)], maze_keys(*shape)).seen == 0


def pair(question, answer):
    return np.array(question, np.uint8), np.array(answer, np.uint8)


def arc_repeats(known, asked):
    """How many test pairs are seen where a task has the one pair and another one asks the other."""
    rest = pair([[3, 3, 3]], [[1]])
    known_task = ArcTask("a", (known,), (pair([[6]], [[7]]),))
    made = encode_arc([known_task], [ArcTask("b", (rest,), (asked,))], 3)
    found = repeats([made.train], [made.test], arc_keys)
    assert found.of == 1  # variants of it are the same question
    return found.seen


KNOWN = pair([[1, 2], [0, 3]], [[5, 0, 5]])


def test_an_arc_pair_of_another_task_is_seen_in_other_colours_and_turned():
    assert arc_repeats(KNOWN, KNOWN) == 1
    assert arc_repeats(KNOWN, pair([[2, 3], [1, 0]], [[5], [0], [5]])) == 1
    assert arc_repeats(KNOWN, pair([[4, 7], [9, 0]], [[2], [0], [2]])) == 1


def test_an_arc_pair_with_another_answer_is_not_seen():
    assert arc_repeats(KNOWN, pair([[1, 2], [0, 3]], [[5, 5, 5]])) == 0
    assert arc_repeats(KNOWN, pair([[1, 2], [0, 3]], [[1, 0, 1]])) == 0


def test_black_is_no_colour_that_is_permuted():
    assert arc_repeats(pair([[0, 1]], [[1]]), pair([[2, 1]], [[1]])) == 0


def test_the_first_repeat_is_named_and_twins_in_the_test_count_each():
    inputs, labels = sudokus(5, 9)
    test = puzzles(inputs[[3, 1, 3]], labels[[3, 1, 3]])
    train = puzzles(inputs[:1], labels[:1]), puzzles(inputs[2:4], labels[2:4])
    found = repeats(train, [test], sudoku_keys(9))
    assert found == (2, 3, (0, 0), (1, 1))


def test_padding_behind_and_the_identifier_decide_without_symmetries():
    short, long = (
        puzzles(np.array([[3, 4]]), np.array([[1, 1]])),
        puzzles(np.array([[3, 4, 0]]), np.array([[1, 1, 0]])),
    )
    assert repeats([short], [long], exact_keys).seen == 1
    assert repeats([], [long], exact_keys).seen == repeats([short], [], exact_keys).seen == 0
