"""Grids of ARC tasks: their form as tokens, their symmetries, and the way back.

A grid of colours 0 to 9 stands on a canvas of 30 x 30 tokens: PAD 0, EOS 1, colour + 2. The cells
below its last row and right of its last column are EOS, as far as the canvas has them.

Source: SamsungSAILMontreal/TinyRecursiveModels at commit e7b6871, dataset/build_arc_dataset.py,
dataset/common.py (numbering of the symmetries), evaluators/arc.py (crop).
"""

from __future__ import annotations

import numpy as np

from trm_fast.data.puzzles.puzzle_set import Array

SIDE = 30
COLOURS = 10
PAD, EOS, FIRST_COLOUR = 0, 1, 2
VOCAB_SIZE = FIRST_COLOUR + COLOURS
SEPARATOR = "|||"
_INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)


def dihedral(grid: Array, symmetry: int) -> Array:
    """Applies one of the 8 symmetries of the square to the last two axes; returns a view.

    Args:
        grid: [..., rows, cols].
        symmetry: 0 none, 1 to 3 quarter turns to the left, 4 columns reversed, 5 rows reversed,
            6 transposed, 7 mirrored at the other diagonal.

    Raises:
        ValueError: there is no such symmetry.
    """
    if not 0 <= symmetry < 8:
        raise ValueError(f"dihedral: symmetry must be in [0, 8); got {symmetry}")
    if symmetry < 4:
        return np.rot90(grid, symmetry, axes=(-2, -1))
    if symmetry == 4:
        return grid[..., ::-1]
    if symmetry == 5:
        return grid[..., ::-1, :]
    flipped = grid.swapaxes(-2, -1)
    return flipped if symmetry == 6 else flipped[..., ::-1, ::-1]


def inverse_dihedral(grid: Array, symmetry: int) -> Array:
    """Undoes ``dihedral``.

    Raises:
        ValueError: there is no such symmetry.
    """
    return dihedral(grid, _INVERSE[symmetry] if 0 <= symmetry < 8 else symmetry)


def augmented_name(task: str, symmetry: int, colours: Array) -> str:
    """The name ``task|||t<symmetry>|||<colours>`` of a task whose colour i became colours[i]."""
    return SEPARATOR.join((task, f"t{symmetry}", "".join(map(str, colours))))


def split_name(name: str) -> tuple[str, int, Array]:
    """The task, symmetry and colours of a name; no symmetry and equal colours for a plain one.

    Raises:
        ValueError: the name is neither plain nor one of ``augmented_name``.
    """
    parts = name.split(SEPARATOR)
    if len(parts) == 1:
        return name, 0, np.arange(COLOURS, dtype=np.uint8)
    symmetry, colours = parts[-2:]
    known = {f"t{number}" for number in range(8)}
    if len(parts) != 3 or symmetry not in known or sorted(colours) != list("0123456789"):
        raise ValueError(f"arc: a name must be task{SEPARATOR}t<k>{SEPARATOR}<colours>; got {name}")
    return parts[0], int(symmetry[1:]), np.array([int(c) for c in colours], dtype=np.uint8)


def undo(grid: Array, symmetry: int, colours: Array) -> Array:
    """Turns the grid of an augmented task back into one of the task itself.

    Args:
        grid: colours [rows, cols], uint8.
        symmetry, colours: of the augmentation; see ``split_name``.
    """
    original: Array = np.argsort(colours).astype(np.uint8)[inverse_dihedral(grid, symmetry)]
    return original


def draw(canvases: Array, grids: Array, rows: Array, cols: Array) -> None:
    """Writes grids and their EOS cells onto empty canvases.

    Args:
        canvases: [count, 30, 30] uint8, zero, C-contiguous; overwritten.
        grids: colours [count, height, width], uint8.
        rows, cols: place of the top left cell on each canvas, [count]; the grids must fit.
    """
    height, width = grids.shape[1:]
    flat = canvases.reshape(-1)
    base = (np.arange(len(canvases)) * SIDE + rows) * SIDE + cols
    cells = np.arange(height)[:, None] * SIDE + np.arange(width)
    flat[base[:, None, None] + cells] = grids + np.uint8(FIRST_COLOUR)
    below = base[rows + height < SIDE]
    flat[below[:, None] + (height * SIDE + np.arange(width))] = EOS
    right = base[cols + width < SIDE]
    flat[right[:, None] + (np.arange(height) * SIDE + width)] = EOS


def crop_sizes(canvases: Array) -> tuple[Array, Array]:
    """Finds the largest rectangle of colours at the top left of each canvas.

    Of rectangles with equal area it is the one with the fewest rows.

    Args:
        canvases: tokens [count, 900] or [count, 30, 30].

    Returns:
        Height and width of each, [count]; 0 and 0 where the first cell is no colour.
    """
    tokens = canvases.reshape(-1, SIDE, SIDE)
    colours = (tokens >= FIRST_COLOUR) & (tokens < VOCAB_SIZE)
    # Widths that all rows down to each one have in common.
    widths = np.logical_and.accumulate(colours, axis=2).sum(axis=2)
    widths = np.minimum.accumulate(widths, axis=1)
    height = (widths * np.arange(1, SIDE + 1)).argmax(axis=1) + 1
    width = widths[np.arange(len(tokens)), height - 1]
    return np.where(width > 0, height, 0), width


def crop(canvases: Array) -> list[Array]:
    """Cuts the grid of colours out of each canvas; see ``crop_sizes``.

    Args:
        canvases: tokens [count, 900] or [count, 30, 30].

    Returns:
        One grid of colours [rows, cols], uint8, for each; empty where there is none.
    """
    tokens = canvases.reshape(-1, SIDE, SIDE)
    sizes = zip(*crop_sizes(tokens), strict=True)
    return [
        (canvas[:height, :width] - FIRST_COLOUR).astype(np.uint8)
        for canvas, (height, width) in zip(tokens, sizes, strict=True)
    ]
