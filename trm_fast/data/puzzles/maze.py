"""Mazes with one shortest path from start to goal, in the form of Maze-Hard.

A maze is a grid of walls and open cells with a border of walls; steps go up, down, left and right.
Corridors grow from a random cell: the last cell that can grow opens a random neighbour that touches
no other open cell; when none can grow, the maze is done. So the open cells form a tree, without a
lattice, on a grid of any height and width, odd or even. ``openings`` walls with open cells on two
or more sides are then opened, which makes loops.

The start is any open cell. The goal is one of the cells that are at least ``min_path`` steps away
**and to which only one shortest path leads**, so every label is the one right answer, loops or not.
In a tree that is every cell.

Tokens are those of official TRM training: "# SGo" are 1 to 5, wall, open, start, goal and path; 0
is padding; the vocabulary has 6. Labels are the inputs with every cell of the path between start
and goal marked. Maze-Hard itself has 30 x 30 cells and paths of more than 110 steps, and its mazes
come from another procedure.

Sources: Samsung SAIL Montreal, TinyRecursiveModels, dataset/build_maze_dataset.py (tokens,
symmetries); Wang et al. 2025, arXiv:2506.21734 (Maze-Hard).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trm_fast.data import _items, _native

Grids = NDArray[np.uint8]

CHARACTERS = "# SGo"
WALL, FREE, START, GOAL, PATH = range(1, 6)

# Mazes in one native call.
_PIECE = 256
_LONGEST = 1000


def generate_mazes(
    count: int,
    height: int = 30,
    width: int = 30,
    *,
    min_path: int = 1,
    openings: int = 0,
    seed: int = 0,
    threads: int | None = None,
    attempts: int = 1000,
    native: bool | None = None,
) -> tuple[Grids, Grids]:
    """Makes random mazes, no two alike, with their paths.

    An item depends on the seed and its place alone: not on ``threads``, ``native``, or how many are
    made. Parts of one call have nothing in common; two calls with different seeds may.

    Args:
        count: number of mazes, >= 0.
        height, width: cells, borders included, 4 to 1000.
        min_path: least number of steps from start to goal, >= 1.
        openings: walls to open, which makes loops, >= 0.
        seed: in [0, 2^64).
        threads: of the C++ form; None for as many as there are cores.
        attempts: mazes to try for one item before an error.
        native: True for C++, False for Python, None for C++ if it is built.

    Returns:
        Inputs and labels, uint8 [count, height * width], tokens as on the page.

    Raises:
        TypeError: a number is not a whole number.
        ValueError: an argument is out of range, or a maze has used up its attempts.
        BackendError: ``native`` is True and the C++ form cannot be used.
    """
    who = "generate_mazes"
    height, width = _shape(who, height, width)
    cells = height * width
    min_path = _items.number(who, "min_path", min_path, 1, cells)
    openings = _items.number(who, "openings", openings, 0, cells)
    module = _native.choose(who, native)

    def generate(items: Any) -> Any:
        return module.generate_mazes(items, height, width, openings, min_path)

    inputs, labels = _items.distinct_items(
        who, module, generate, count, seed, threads, attempts, _PIECE
    )
    return inputs, labels


def shortest_path(
    inputs: NDArray[Any],
    height: int = 30,
    width: int = 30,
    *,
    threads: int | None = None,
    native: bool | None = None,
) -> tuple[Grids, NDArray[np.int64], NDArray[np.int64]]:
    """Finds a shortest path of each maze by breadth-first search.

    Args:
        inputs: tokens, integers [count, height * width], each with one start and one goal; the
            border may be open.
        height, width: cells, 4 to 1000.
        threads: of the C++ form; None for as many as there are cores.
        native: True for C++, False for Python, None for C++ if it is built.

    Returns:
        Inputs with the cells between start and goal marked, uint8 of the same shape; steps from
        start to goal, int64 [count], -1 where there is no path; and the number of shortest paths,
        int64 [count]: 0, 1, or 2 for two or more, where the marked one turns, seen from the goal,
        up before left before right before down.

    Raises:
        TypeError: the inputs are no integers.
        ValueError: they have another shape, values other than 1 to 4, or not one start and one
            goal.
        BackendError: ``native`` is True and the C++ form cannot be used.
    """
    who = "shortest_path"
    height, width = _shape(who, height, width)
    inputs = _items.grids(who, "inputs", inputs, GOAL, height * width)
    if (inputs == 0).any():
        raise ValueError(f"{who}: inputs must hold values from 1 to 4; got 0")
    for name, token in (("start (3)", START), ("goal (4)", GOAL)):
        found = (inputs == token).sum(axis=1)
        wrong = np.flatnonzero(found != 1)
        if len(wrong):
            raise ValueError(
                f"{who}: inputs[{wrong[0]}] must have one {name}; got {found[wrong[0]]}"
            )
    module, threads = _native.choose(who, native), _items.thread_count(who, threads)
    pieces = _items.pieces(inputs, _PIECE)
    labels, lengths, numbers = _items.joined(
        [module.solve_mazes(piece, height, width, threads) for piece in pieces]
    )
    return labels, lengths, numbers


def maze_text(tokens: NDArray[Any], width: int = 30) -> str:
    """Returns one maze as lines of the characters "# SGo", "." for padding.

    Args:
        tokens: integers [cells] from 0 to 5.
        width: cells in a row.
    """
    characters = "".join(f".{CHARACTERS}"[token] for token in tokens)
    return "\n".join(characters[i : i + width] for i in range(0, len(characters), width))


class MazeAugment:
    """Turns and mirrors each maze of a batch at random: ``augment(inputs, labels, generator)``.

    A square has eight symmetries; another rectangle has four, as a quarter turn would change its
    shape.

    Args:
        height, width: cells, 4 to 1000.

    Raises:
        ValueError: a side is out of range.
    """

    def __init__(self, height: int = 30, width: int = 30) -> None:
        self.height, self.width = _shape("MazeAugment", height, width)

    def __call__(
        self, inputs: NDArray[Any], labels: NDArray[Any], generator: np.random.Generator
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Returns inputs and labels under one symmetry per example.

        Args:
            inputs: tokens [batch, height * width].
            labels: the same shape, any values.
            generator: source of the symmetries; advanced.

        Raises:
            ValueError: an array has another shape.
        """
        wanted = (len(inputs), self.height * self.width)
        if inputs.shape != wanted or labels.shape != wanted:
            shapes = f"{list(inputs.shape)} and {list(labels.shape)}"
            required = f"inputs and labels must be [batch, {wanted[1]}]"
            raise ValueError(f"MazeAugment: {required}; got {shapes}")
        symmetries = 8 if self.height == self.width else 4
        drawn = generator.integers(symmetries, size=len(inputs))
        moved = np.empty_like(inputs), np.empty_like(labels)
        for symmetry in range(symmetries):
            rows = np.flatnonzero(drawn == symmetry)
            for tokens, out in zip((inputs, labels), moved, strict=True):
                grids = tokens[rows].reshape(-1, self.height, self.width)
                out[rows] = _turned(grids, symmetry).reshape(-1, wanted[1])
        return moved


def _turned(grids: NDArray[Any], symmetry: int) -> NDArray[Any]:
    """Mirrors rows and columns and exchanges them, as the three bits of ``symmetry`` say."""
    if symmetry & 1:
        grids = grids[:, ::-1]
    if symmetry & 2:
        grids = grids[:, :, ::-1]
    return grids.swapaxes(1, 2) if symmetry & 4 else grids


def _shape(who: str, height: int, width: int) -> tuple[int, int]:
    return (
        _items.number(who, "height", height, 4, _LONGEST),
        _items.number(who, "width", width, 4, _LONGEST),
    )
