"""The functions of csrc/data/module.cpp; the same in Python: trm_fast/data/_reference."""

import numpy as np
from numpy.typing import NDArray

REVISION: int

class Items:
    def __init__(
        self, seed: int, indices: NDArray[np.int64], first: int, tries: int, threads: int
    ) -> None: ...

def generate_sudoku(
    items: Items,
    box_rows: int,
    box_columns: int,
    fewest_clues: int,
    most_clues: int,
    unique: bool,
    least_depth: int,
    most_depth: int,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]: ...
def solve_sudoku(
    puzzles: NDArray[np.uint8], box_rows: int, box_columns: int, threads: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
def generate_mazes(
    items: Items, height: int, width: int, openings: int, min_path: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]: ...
def solve_mazes(
    inputs: NDArray[np.uint8], height: int, width: int, threads: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]: ...
def generate_listops(
    items: Items, min_length: int, max_length: int, max_depth: int, max_args: int, nesting: float
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]: ...
def evaluate_listops(tokens: NDArray[np.uint8], threads: int) -> NDArray[np.int64]: ...
