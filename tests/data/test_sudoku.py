"""Sudoku: the rules, unique solutions, difficulty, symmetries, and equality of both forms."""

import _thread
import hashlib
import threading

import numpy as np
import pytest

from trm_fast.data.puzzles.sudoku import (
    CLUES,
    SudokuAugment,
    check_sudoku,
    generate_sudoku,
    solve_sudoku,
    sudoku_difficulty,
    sudoku_guesses,
    sudoku_tokens,
)

SIZES = [4, 6, 9]
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
INKALA = "800000000003600000070090200050007000000045700000100030001000068008500010090000400"
TWINS = "906070403000400200070023010500000100040208060003000005030700050007005000405010708"


def puzzle_of(text: str) -> np.ndarray:
    return np.array([[int(digit) for digit in text]])


def seen_from(size: int, cell: int) -> set[int]:
    """The other cells of its row, column and box."""
    box_rows, box_columns = BOXES[size]
    row, column = divmod(cell, size)
    found = set()
    for other in range(size * size):
        r, c = divmod(other, size)
        same_box = (r // box_rows, c // box_columns) == (row // box_rows, column // box_columns)
        if r == row or c == column or same_box:
            found.add(other)
    return found - {cell}


SEEN = {size: [seen_from(size, cell) for cell in range(size * size)] for size in SIZES}


def digits_left(grid: list[int], size: int, cell: int) -> set[int]:
    return set(range(1, size + 1)) - {grid[other] for other in SEEN[size][cell]}


def is_right(grid: list[int], size: int) -> bool:
    cells = range(size * size)
    return all(1 <= grid[c] <= size and grid[c] in digits_left(grid, size, c) for c in cells)


def count_solutions(grid: list[int], size: int) -> int:
    """By trying: every digit that no clue forbids, in the cell with the fewest of them; up to 2."""
    blanks = [cell for cell, digit in enumerate(grid) if digit == 0]
    if not blanks:
        return 1
    cell = min(blanks, key=lambda cell: len(digits_left(grid, size, cell)))
    found = 0
    for digit in digits_left(grid, size, cell):
        found += count_solutions([*grid[:cell], digit, *grid[cell + 1 :]], size)
        if found >= 2:
            return 2
    return found


class Search:
    """The definition of difficulty, on sets of digits: singles, then every digit of a cell."""

    def __init__(self, puzzle: list[int], size: int) -> None:
        self.size, self.depth, self.guesses, self.solutions = size, 0, 0, 0
        units = {frozenset(group) for group in self.groups()}
        self.units = [sorted(unit) for unit in units]
        every = set(range(1, size + 1))
        self.run([{digit} if digit else set(every) for digit in puzzle], 0)

    def groups(self):
        size, (box_rows, box_columns) = self.size, BOXES[self.size]
        for i in range(size):
            yield range(i * size, (i + 1) * size)
            yield range(i, size * size, size)
        for row in range(0, size, box_rows):
            for column in range(0, size, box_columns):
                box = [(r, c) for r in range(box_rows) for c in range(box_columns)]
                yield [(row + r) * size + column + c for r, c in box]

    def simplify(self, left: list[set[int]]) -> bool:
        changed = True
        while changed:
            changed = False
            for cell, digits in enumerate(left):
                if not digits:
                    return False
                for other in SEEN[self.size][cell] if len(digits) == 1 else ():
                    changed |= bool(left[other] & digits)
                    left[other] = left[other] - digits
            for unit in self.units:
                for digit in range(1, self.size + 1):
                    places = [cell for cell in unit if digit in left[cell]]
                    if not places:
                        return False
                    if len(places) == 1 and len(left[places[0]]) > 1:
                        left[places[0]] = {digit}
                        changed = True
        return True

    def run(self, left: list[set[int]], depth: int) -> None:
        if not self.simplify(left):
            return
        unsure = [cell for cell, digits in enumerate(left) if len(digits) > 1]
        if not unsure:
            self.solutions += 1
            return
        cell = min(unsure, key=lambda cell: (len(left[cell]), cell))
        self.depth = max(self.depth, depth + 1)
        for digit in sorted(left[cell]):
            self.guesses += 1
            self.run([{digit} if c == cell else set(d) for c, d in enumerate(left)], depth + 1)


@pytest.fixture(scope="module", params=SIZES)
def size(request):
    return request.param


@pytest.fixture(scope="module")
def made(size, native):
    return generate_sudoku(16, size, seed=3, native=native)


def test_solutions_follow_the_rules_and_keep_the_clues(size, made):
    puzzles, solutions = made
    assert puzzles.dtype == solutions.dtype == np.uint8
    assert puzzles.shape == solutions.shape == (16, size * size)
    assert all(is_right(grid, size) for grid in solutions.tolist())
    assert ((puzzles == 0) | (puzzles == solutions)).all()


def test_a_puzzle_has_one_solution(size, made):
    assert [count_solutions(grid, size) for grid in made[0].tolist()] == [1] * 16


def test_clues_are_in_the_range(size, made):
    clues = (made[0] > 0).sum(axis=1)
    assert clues.min() >= CLUES[size][0] and clues.max() <= CLUES[size][1]
    assert len({*clues.tolist()}) > 2


@pytest.mark.parametrize(
    ("size", "clues"), [(9, 24), (9, (24, 25)), (9, 81), (6, 9), (4, 4), (4, 16)]
)
def test_clues_are_as_wanted(native, size, clues):
    low, high = clues if isinstance(clues, tuple) else (clues, clues)
    puzzles, _ = generate_sudoku(6, size, clues=clues, native=native)
    given = (puzzles > 0).sum(axis=1)
    assert given.min() >= low and given.max() <= high


def test_puzzles_differ_even_where_there_are_few(native):
    # There are 288 grids of size 4; each is found long before the attempts are used up.
    puzzles, solutions = generate_sudoku(280, 4, clues=16, attempts=10_000, native=native)
    assert len(np.unique(puzzles, axis=0)) == 280
    assert (puzzles == solutions).all()


def test_more_puzzles_than_there_are_is_an_error(native):
    with pytest.raises(ValueError, match=r"in 200 attempts; got none for item \d+"):
        generate_sudoku(289, 4, clues=16, attempts=200, native=native)


def test_without_uniqueness_clues_are_taken_down_to_the_number(native):
    puzzles, solutions = generate_sudoku(8, clues=(5, 7), unique=False, native=native)
    assert {*(puzzles > 0).sum(axis=1).tolist()} <= {5, 6, 7}
    assert check_sudoku(solutions, puzzles).all()
    assert (solve_sudoku(puzzles, native=native)[1] == 2).all()


def test_seeds_and_items_differ(native):
    one, two = (generate_sudoku(8, seed=seed, native=native)[1] for seed in (0, 1))
    assert len(np.unique(np.concatenate([one, two]), axis=0)) == 16


def test_an_item_does_not_depend_on_how_many_are_made(native):
    # Of 288 * 16 puzzles with 15 clues some repeat an earlier one and are made anew.
    many = generate_sudoku(600, 4, clues=15, native=native)[0]
    assert (generate_sudoku(17, 4, clues=15, native=native)[0] == many[:17]).all()
    assert (generate_sudoku(299, 4, clues=15, native=native)[0] == many[:299]).all()


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (9, {}),
        (9, {"seed": 2**64 - 1, "clues": (30, 40)}),
        (9, {"difficulty": 0, "clues": 25}),
        (9, {"difficulty": (1, 9)}),
        (9, {"unique": False, "clues": 17}),
        (6, {}),
        (6, {"clues": 9}),
        (4, {"clues": (4, 5)}),
    ],
)
def test_both_forms_are_equal(built, size, options):
    fast, plain = (generate_sudoku(10, size, native=native, **options) for native in (True, False))
    assert (fast[0] == plain[0]).all()
    assert (fast[1] == plain[1]).all()


def test_results_stay_what_they_are(native):
    # Whoever changes what is drawn raises REVISION in trm_fast/data/_native.py.
    digest = hashlib.sha256()
    for size in SIZES:
        for array in generate_sudoku(10, size, seed=7, native=native):
            digest.update(array.tobytes())
    assert digest.hexdigest()[:16] == "d2c529443f560ebe"


def test_threads_change_nothing(built):
    results = [generate_sudoku(600, threads=threads, native=True) for threads in (1, 2, 7)]
    for puzzles, solutions in results[1:]:
        assert (puzzles == results[0][0]).all()
        assert (solutions == results[0][1]).all()


def test_solver_finds_the_solution(size, made, native):
    solutions, numbers = solve_sudoku(made[0], native=native)
    assert (solutions == made[1]).all()
    assert (numbers == 1).all()
    assert (solve_sudoku(made[1].astype(np.int64), native=native)[0] == made[1]).all()


def test_solver_counts_solutions(native):
    blank, full = np.zeros((1, 81), int), generate_sudoku(1)[1].astype(int)
    twice, wrong_digit = blank.copy(), full.copy()
    twice[0, :2] = 5
    wrong_digit[0, 40] = 0
    wrong_digit[0, 41] = full[0, 40]
    puzzles = np.concatenate([blank, full, twice, wrong_digit, puzzle_of(TWINS)])
    solutions, numbers = solve_sudoku(puzzles, native=native)
    assert numbers.tolist() == [2, 1, 0, 0, 2]
    assert check_sudoku(solutions, puzzles).tolist() == [True, True, False, False, True]
    assert not solutions[2:4].any()


def test_difficulty_is_as_defined(size, native):
    puzzles, _ = generate_sudoku(40, size, clues={4: 4, 6: 8, 9: 24}[size], seed=5, attempts=9000)
    if size == 9:
        puzzles = np.concatenate([puzzles, puzzle_of(INKALA)])
    true = [Search(puzzle, size) for puzzle in puzzles.tolist()]
    assert [search.solutions for search in true] == [1] * len(puzzles)
    depths = sudoku_difficulty(puzzles, native=native).tolist()
    guesses = sudoku_guesses(puzzles, native=native).tolist()
    assert depths == [search.depth for search in true]
    assert guesses == [search.guesses for search in true]
    assert size != 9 or max(depths) > 3


@pytest.mark.parametrize("wanted", [0, 2, (1, 3)])
def test_difficulty_is_as_wanted(native, wanted):
    low, high = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    puzzles, _ = generate_sudoku(4, difficulty=wanted, native=native)
    depths = sudoku_difficulty(puzzles, native=native)
    assert depths.min() >= low and depths.max() <= high


def test_difficulty_does_not_depend_on_the_names_of_digits():
    puzzles, _ = generate_sudoku(200, clues=24, seed=1)
    names = np.array([0, 4, 9, 1, 7, 3, 2, 8, 5, 6])
    assert (sudoku_difficulty(names[puzzles]) == sudoku_difficulty(puzzles)).all()
    assert (sudoku_guesses(names[puzzles]) == sudoku_guesses(puzzles)).all()
    assert sudoku_difficulty(puzzles).max() > 0


@pytest.mark.parametrize(
    ("puzzles", "found"), [(puzzle_of(TWINS), "several"), (np.full((1, 81), 1), "none")]
)
def test_difficulty_needs_one_solution(native, puzzles, found):
    with pytest.raises(ValueError, match=rf"puzzles\[0\] must have one solution; got {found}"):
        sudoku_difficulty(puzzles, native=native)


def test_check_finds_every_kind_of_error(size):
    _, solutions = generate_sudoku(1, size)
    grid = solutions[0].reshape(size, size)
    wrong = np.repeat(grid[None], 5, axis=0).astype(int)
    wrong[0, 0, 0] = 0
    wrong[1, 0, [0, 1]] = wrong[1, 0, [1, 0]]  # columns
    wrong[2, [0, 1], 0] = wrong[2, [1, 0], 0]  # rows
    wrong[3] = np.add.outer(range(size), range(size)) % size + 1  # boxes alone
    wrong[4, 0, 0] = size + 1
    assert not check_sudoku(wrong.reshape(5, -1)).any()
    assert check_sudoku(solutions).all()
    clues = np.zeros_like(solutions)
    clues[0, 3] = solutions[0, 3] % size + 1
    assert not check_sudoku(solutions, clues).any()


def test_tokens_are_official():
    puzzles, solutions = generate_sudoku(2)
    inputs, labels = sudoku_tokens(puzzles, solutions)
    assert (inputs == puzzles + 1).all() and (labels == solutions + 1).all()
    assert inputs.min() == 1 and labels.min() == 2 and labels.max() == 10


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_augmentation_keeps_puzzles_valid(size, dtype):
    puzzles, solutions = generate_sudoku(50, size)
    tokens = [tokens.astype(dtype) for tokens in sudoku_tokens(puzzles, solutions)]
    inputs, labels = SudokuAugment(size)(*tokens, np.random.default_rng(0))
    assert inputs.dtype == labels.dtype == dtype
    assert check_sudoku(labels.astype(int) - 1, inputs.astype(int) - 1).all()
    solved, numbers = solve_sudoku(inputs.astype(int) - 1)
    assert (numbers == 1).all() and (solved + 1 == labels).all()
    assert (labels != tokens[1]).any(axis=1).mean() > 0.9


def test_augmentation_draws_every_symmetry_alike():
    # One mark per grid: it shows where a cell goes; a row of digits shows their names.
    batch = 20_000
    inputs = np.ones((batch, 16), np.int64)
    inputs[:, 1] = 2
    labels = np.tile(np.arange(16) % 4 + 2, (batch, 1))
    inputs, _ = SudokuAugment(4)(inputs, labels, np.random.default_rng(1))
    cells, names = (inputs != 1).nonzero()[1], inputs.max(axis=1)
    # Every cell has probability 1/16: 1250 grids, standard deviation 34; 6 of them allow 205.
    assert abs(np.bincount(cells, minlength=16) - 1250).max() < 205
    # Every name has probability 1/4: 5000 grids, standard deviation 61.
    assert abs(np.bincount(names)[2:] - 5000).max() < 367


def test_augmentation_reaches_all_symmetries_of_the_board():
    augment = SudokuAugment(4)
    cells = augment._cells(4000, np.random.default_rng(0))
    # Bands 2, rows in them 2 * 2, the same for columns, and transposition; a miss of one of them
    # has a probability below 128 * (1 - 1 / 128)^4000 < 1e-11.
    assert len(np.unique(cells, axis=0)) == 8 * 8 * 2
    assert (np.sort(cells, axis=1) == np.arange(16)).all()


def test_oblong_boxes_are_not_transposed():
    cells = SudokuAugment(6)._cells(500, np.random.default_rng(0)).reshape(500, 6, 6)
    assert ((cells // 6).max(axis=2) == (cells // 6).min(axis=2)).all()


def test_augmentation_leaves_padding_and_missing_labels():
    inputs = np.zeros((5, 81), np.int64)
    labels = np.full((5, 81), -100)
    inputs, labels = SudokuAugment()(inputs, labels, np.random.default_rng(0))
    assert not inputs.any() and (labels == -100).all()


def test_augmentation_is_a_function_of_the_generator():
    tokens = sudoku_tokens(*generate_sudoku(6))
    one, same, other = (SudokuAugment()(*tokens, np.random.default_rng(s)) for s in (4, 4, 5))
    assert (one[0] == same[0]).all() and (one[1] == same[1]).all()
    assert (one[1] != other[1]).any(axis=1).all()


def test_no_puzzles(native):
    puzzles, solutions = generate_sudoku(0, 6, native=native)
    assert puzzles.shape == solutions.shape == (0, 36)
    assert solve_sudoku(puzzles, native=native)[1].shape == (0,)
    assert SudokuAugment(6)(puzzles, solutions, np.random.default_rng(0))[0].shape == (0, 36)


def test_an_interrupt_gets_through(native):
    timer = threading.Timer(0.2, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        generate_sudoku(10**7, native=native)
    timer.join()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: generate_sudoku(1, 8), "size must be 4, 6 or 9; got 8"),
        (lambda: generate_sudoku(-1), "count must be from 0 to"),
        (lambda: generate_sudoku(1, clues=(30, 24)), r"clues must be \(least, most\); got"),
        (lambda: generate_sudoku(1, clues=82), "clues must be from 0 to 81; got 82"),
        (lambda: generate_sudoku(1, clues=16), "clues must be >= 17 for one solution; got 16"),
        (lambda: generate_sudoku(1, clues=17, attempts=3), "unlike those before, in 3 attempts"),
        (lambda: generate_sudoku(1, difficulty=(3, 2)), "difficulty must be"),
        (lambda: generate_sudoku(1, difficulty=0, unique=False), "difficulty must be None"),
        (lambda: generate_sudoku(1, seed=-1), "seed must be from 0 to"),
        (lambda: generate_sudoku(1, threads=0), "threads must be from 1 to"),
        (lambda: generate_sudoku(1, attempts=0), "attempts must be from 1 to"),
        (lambda: solve_sudoku(np.zeros((1, 80), int)), r"must be \[count, 16, 36 or 81\]; got"),
        (lambda: solve_sudoku(np.zeros(81, int)), r"must be \[count, 16, 36 or 81\]; got \[81\]"),
        (lambda: solve_sudoku(np.full((1, 16), 5)), "values from 0 to 4; got 5 to 5"),
        (lambda: solve_sudoku(np.full((1, 16), -1)), "values from 0 to 4; got -1 to -1"),
        (lambda: check_sudoku(np.ones((1, 16), int), np.ones((1, 81), int)), "must have one shape"),
        (lambda: sudoku_tokens(np.ones((2, 16), int), np.ones((1, 16), int)), "must be as many"),
        (lambda: sudoku_tokens(np.ones((1, 16), int), np.zeros((1, 16), int)), "must be complete"),
        (lambda: SudokuAugment(5), "size must be 4, 6 or 9; got 5"),
        (
            lambda: SudokuAugment(4)(np.ones((2, 16)), np.ones((1, 16)), np.random.default_rng(0)),
            r"must be \[batch, 16\]; got",
        ),
        (
            lambda: SudokuAugment(4)(
                np.full((1, 16), 6), np.ones((1, 16), int), np.random.default_rng(0)
            ),
            "inputs must be from 0 to 5, and labels no more; got 6 to 6",
        ),
    ],
)
def test_errors_say_what_is_required(call, error):
    with pytest.raises(ValueError, match=error):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: generate_sudoku(1.0),
        lambda: generate_sudoku(1, clues=24.5),
        lambda: generate_sudoku(1, clues=(1, 2, 3)),
        lambda: generate_sudoku(1, seed=True),
        lambda: solve_sudoku(np.zeros((1, 81))),
        lambda: sudoku_tokens(np.zeros((1, 81)), np.zeros((1, 81), int)),
    ],
)
def test_numbers_must_be_whole(call):
    with pytest.raises(TypeError, match=r"must (be a whole number|hold integers)"):
        call()
