"""Mazes: one shortest path from start to goal, symmetries, and equality of both forms."""

import hashlib
from collections import deque

import numpy as np
import pytest

from trm_fast.data.puzzles.maze import (
    FREE,
    GOAL,
    PATH,
    START,
    WALL,
    MazeAugment,
    generate_mazes,
    maze_text,
    shortest_path,
)

SHAPES = [(30, 30), (9, 13), (14, 7), (4, 5)]


def tokens_of(*lines: str) -> np.ndarray:
    return np.array([[" # SGo".index(c, 1) for c in "".join(lines)]])


def neighbours(cell: int, height: int, width: int) -> list[int]:
    row, column = divmod(cell, width)
    around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return [r * width + c for r, c in around if 0 <= r < height and 0 <= c < width]


def distances(maze: list[int], height: int, width: int, start: int) -> dict[int, int]:
    found, queue = {start: 0}, deque([start])
    while queue:
        cell = queue.popleft()
        for near in neighbours(cell, height, width):
            if maze[near] != WALL and near not in found:
                found[near] = found[cell] + 1
                queue.append(near)
    return found


def shortest_cells(maze: list[int], height: int, width: int) -> tuple[set[int], int]:
    """The cells that lie on any shortest path, its ends left out, and its length."""
    start, goal = maze.index(START), maze.index(GOAL)
    there, back = (distances(maze, height, width, end) for end in (start, goal))
    length = there[goal]
    on_path = {cell for cell in there if there[cell] + back[cell] == length}
    return on_path - {start, goal}, length


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def shape(request):
    return request.param


@pytest.fixture(scope="module", params=[0, 3], ids=["tree", "loops"])
def made(request, shape, native):
    openings = 0 if shape == (4, 5) else request.param
    return generate_mazes(12, *shape, openings=openings, seed=2, native=native)


def test_the_path_is_the_only_shortest_one(shape, made):
    for maze, label in zip(*(tokens.tolist() for tokens in made), strict=True):
        on_path, length = shortest_cells(maze, *shape)
        # As many cells as there are steps between the ends: no second path adds any.
        assert len(on_path) == length - 1
        assert {cell for cell, token in enumerate(label) if token == PATH} == on_path


def test_labels_are_the_inputs_but_for_the_path(made):
    inputs, labels = made
    assert inputs.dtype == labels.dtype == np.uint8
    assert ((labels == inputs) | ((labels == PATH) & (inputs == FREE))).all()
    assert ((inputs == START).sum(axis=1) == 1).all()
    assert ((inputs == GOAL).sum(axis=1) == 1).all()
    assert inputs.min() == WALL and inputs.max() == GOAL


def test_the_border_is_wall(shape, made):
    inside = made[0].reshape(-1, *shape)[:, 1:-1, 1:-1]
    assert (made[0] != WALL).sum() == (inside != WALL).sum()


def open_cells_and_steps(maze: list[int], shape: tuple[int, int]) -> tuple[int, int, int]:
    """Numbers of open cells, of those that the start reaches, and of steps between open cells."""
    open_cells = [cell for cell, token in enumerate(maze) if token != WALL]
    steps = sum(maze[near] != WALL for cell in open_cells for near in neighbours(cell, *shape))
    return len(open_cells), len(distances(maze, *shape, maze.index(START))), steps // 2


def test_a_maze_without_openings_is_a_tree(shape, native):
    for maze in generate_mazes(12, *shape, native=native)[0].tolist():
        cells, reached, steps = open_cells_and_steps(maze, shape)
        assert reached == cells and steps == cells - 1


def test_openings_make_loops(native):
    shape = (15, 16)
    for maze in generate_mazes(12, *shape, openings=4, native=native)[0].tolist():
        cells, reached, steps = open_cells_and_steps(maze, shape)
        assert reached == cells and steps >= cells - 1 + 4


def test_corridors_fill_the_maze(native):
    # A wall that touches one open cell would have been opened.
    shape = (30, 30)
    for maze in generate_mazes(4, *shape, native=native)[0].tolist():
        for cell in range(900):
            row, column = divmod(cell, 30)
            if maze[cell] == WALL and 0 < row < 29 and 0 < column < 29:
                assert sum(maze[near] != WALL for near in neighbours(cell, *shape)) != 1


@pytest.mark.parametrize(("least", "openings"), [(110, 0), (60, 20)])
def test_paths_are_as_long_as_wanted(native, least, openings):
    inputs, labels = generate_mazes(10, min_path=least, openings=openings, native=native)
    assert ((labels == PATH).sum(axis=1) + 1).min() >= least
    found, lengths, numbers = shortest_path(inputs, native=native)
    assert (found == labels).all() and (numbers == 1).all()
    assert (lengths == (labels == PATH).sum(axis=1) + 1).all()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((30, 30), {}),
        ((30, 30), {"openings": 40, "min_path": 30, "seed": 9}),
        ((9, 13), {"openings": 2}),
        ((4, 5), {"min_path": 2}),
        ((40, 5), {"seed": 2**64 - 1}),
    ],
)
def test_both_forms_are_equal(built, shape, options):
    fast, plain = (generate_mazes(12, *shape, native=native, **options) for native in (True, False))
    assert (fast[0] == plain[0]).all()
    assert (fast[1] == plain[1]).all()


def test_both_forms_solve_alike(built):
    # Half of the cells are open, the border too: many paths, or none.
    random = np.random.default_rng(0)
    mazes = random.choice([WALL, FREE, FREE], size=(300, 77))
    for maze in mazes:
        maze[random.permutation(77)[:2]] = START, GOAL
    fast, plain = (shortest_path(mazes, 7, 11, native=native) for native in (True, False))
    assert all((a == b).all() for a, b in zip(fast, plain, strict=True))
    assert {*fast[2].tolist()} == {0, 1, 2}


def test_solver_agrees_with_distances(native):
    random = np.random.default_rng(1)
    mazes = random.choice([WALL, FREE, FREE], size=(100, 30))
    for maze in mazes:
        maze[random.permutation(30)[:2]] = START, GOAL
    labels, lengths, numbers = shortest_path(mazes, 6, 5, native=native)
    for maze, label, length, number in zip(
        mazes.tolist(), labels.tolist(), lengths, numbers, strict=True
    ):
        reached = distances(maze, 6, 5, maze.index(START))
        assert length == reached.get(maze.index(GOAL), -1)
        marked = {cell for cell, token in enumerate(label) if token == PATH}
        if length < 0:
            assert number == 0 and not marked
            continue
        on_path, _ = shortest_cells(maze, 6, 5)
        assert marked <= on_path and len(marked) == length - 1
        assert (number == 1) == (len(on_path) == length - 1)


def test_ties_are_broken_as_documented(native):
    square = tokens_of("S  #", "   #", "  G#", "####")
    labels, lengths, numbers = shortest_path(square, 4, 4, native=native)
    assert maze_text(labels[0], 4) == "Soo#\n  o#\n  G#\n####"
    assert lengths.tolist() == [4] and numbers.tolist() == [2]


def test_neighbours_do_not_wrap_around(native):
    maze = tokens_of(" ###", "S###", "###G", "### ")
    _, lengths, numbers = shortest_path(maze, 4, 4, native=native)
    assert lengths.tolist() == [-1] and numbers.tolist() == [0]


def test_start_beside_goal_has_no_path_cells(native):
    labels, lengths, _ = shortest_path(
        tokens_of("####", "#SG#", "####", "####"), 4, 4, native=native
    )
    assert PATH not in labels and lengths.tolist() == [1]


def test_results_stay_what_they_are(native):
    # Whoever changes what is drawn raises REVISION in trm_fast/data/_native.py.
    arrays = generate_mazes(10, 20, 25, openings=10, min_path=20, seed=7, native=native)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert digest[:16] == "6189b18227854e2f"


def test_threads_change_nothing(built):
    results = [generate_mazes(600, threads=threads, native=True) for threads in (1, 2, 7)]
    for inputs, labels in results[1:]:
        assert (inputs == results[0][0]).all() and (labels == results[0][1]).all()


def test_mazes_differ_and_do_not_depend_on_their_number(native):
    # There are 88 mazes of this size.
    inputs, _ = generate_mazes(80, 4, 5, native=native, attempts=10_000)
    assert len(np.unique(inputs, axis=0)) == 80
    few, _ = generate_mazes(50, 4, 5, native=native)
    assert (few == inputs[:50]).all()


@pytest.mark.parametrize(("height", "width", "symmetries"), [(10, 10, 8), (8, 11, 4)])
def test_augmentation_draws_symmetries_that_keep_the_answer(height, width, symmetries):
    inputs, labels = generate_mazes(1, height, width, min_path=5)
    inputs, labels = (np.repeat(tokens, 400, axis=0) for tokens in (inputs, labels))
    augment = MazeAugment(height, width)
    inputs, labels = augment(inputs, labels.astype(np.int64), np.random.default_rng(0))
    assert inputs.dtype == np.uint8 and labels.dtype == np.int64
    found, _, numbers = shortest_path(inputs, height, width)
    assert (found == labels).all() and (numbers == 1).all()
    counts = np.unique(inputs, axis=0, return_counts=True)[1]
    assert len(counts) == symmetries
    # Binomial with mean 400 / symmetries and a variance less than that; 6 deviations.
    mean = 400 / symmetries
    assert abs(counts - mean).max() < 6 * mean**0.5


def test_augmentation_is_a_function_of_the_generator():
    mazes = generate_mazes(20)
    one, same = (MazeAugment()(*mazes, np.random.default_rng(4)) for _ in range(2))
    assert (one[0] == same[0]).all() and (one[1] == same[1]).all()


def test_no_mazes(native):
    inputs, labels = generate_mazes(0, 5, 6, native=native)
    assert inputs.shape == labels.shape == (0, 30)
    assert shortest_path(inputs, 5, 6, native=native)[0].shape == (0, 30)
    assert MazeAugment(5, 6)(inputs, labels, np.random.default_rng(0))[0].shape == (0, 30)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: generate_mazes(1, 3, 9), "height must be from 4 to 1000; got 3"),
        (lambda: generate_mazes(1, 9, 1001), "width must be from 4 to 1000; got 1001"),
        (lambda: generate_mazes(1, min_path=0), "min_path must be from 1 to 900; got 0"),
        (lambda: generate_mazes(1, openings=-1), "openings must be from 0 to 900; got -1"),
        (lambda: generate_mazes(1, 9, 9, min_path=80, attempts=5), "in 5 attempts; got none for"),
        (lambda: generate_mazes(1, 9, 9, openings=81, attempts=5), "in 5 attempts; got none for"),
        (lambda: shortest_path(np.ones((1, 899), int)), r"must be \[count, 900\]; got \[1, 899\]"),
        (lambda: shortest_path(tokens_of("S#  " * 4), 4, 4), r"one start \(3\); got 4"),
        (lambda: shortest_path(tokens_of("S#  ", "# ##" * 3), 4, 4), r"one goal \(4\); got 0"),
        (lambda: shortest_path(np.full((1, 16), 5), 4, 4), "values from 0 to 4; got 5 to 5"),
        (lambda: shortest_path(np.zeros((1, 16), int), 4, 4), "values from 1 to 4; got 0"),
        (lambda: MazeAugment(3, 9), "height must be from 4 to 1000; got 3"),
        (
            lambda: MazeAugment()(np.ones((2, 90)), np.ones((2, 90)), np.random.default_rng(0)),
            r"must be \[batch, 900\]; got \[2, 90\]",
        ),
    ],
)
def test_errors_say_what_is_required(call, error):
    with pytest.raises(ValueError, match=error):
        call()


def test_text_shows_the_maze():
    lines = ("####", "#SG#", "#oo#", "####")
    assert maze_text(tokens_of(*lines)[0], 4) == "\n".join(lines)
    assert maze_text(np.array([0, 1]), 2) == ".#"
