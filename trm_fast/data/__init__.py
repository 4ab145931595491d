"""Data of the recipes: puzzles in memory and on disk, readers, generators and splits."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trm_fast.data.arc import ArcData, build_arc, encode_arc
    from trm_fast.data.arc_corpus import ArcTask, arc_tasks, read_arc_folder
    from trm_fast.data.arc_voting import ArcVoting
    from trm_fast.data.hub import hub_file, hub_rows, load_hub
    from trm_fast.data.listops import evaluate_listops, generate_listops, listops_text
    from trm_fast.data.maze import MazeAugment, generate_mazes, maze_text, shortest_path
    from trm_fast.data.merging import merge, merge_identifiers
    from trm_fast.data.modular import modular_equations, split_equations
    from trm_fast.data.official import (
        read_identifiers,
        read_official,
        read_official_sets,
        read_test_puzzles,
        write_official,
    )
    from trm_fast.data.pairs import PairFormat, read_maze_csv, read_pairs, read_sudoku_csv
    from trm_fast.data.puzzles import (
        PuzzleBatches,
        PuzzleMetadata,
        PuzzleSet,
        evaluation_batches,
    )
    from trm_fast.data.rows import RowCounts, Rows, read_csv, read_jsonl
    from trm_fast.data.sudoku import (
        SudokuAugment,
        check_sudoku,
        generate_sudoku,
        solve_sudoku,
        sudoku_difficulty,
        sudoku_tokens,
    )
    from trm_fast.data.vectors import SyntheticRecursiveDataset

__all__ = [
    "ArcData",
    "ArcTask",
    "ArcVoting",
    "MazeAugment",
    "PairFormat",
    "PuzzleBatches",
    "PuzzleMetadata",
    "PuzzleSet",
    "RowCounts",
    "Rows",
    "SudokuAugment",
    "SyntheticRecursiveDataset",
    "arc_tasks",
    "build_arc",
    "check_sudoku",
    "encode_arc",
    "evaluate_listops",
    "evaluation_batches",
    "generate_listops",
    "generate_mazes",
    "generate_sudoku",
    "hub_file",
    "hub_rows",
    "listops_text",
    "load_hub",
    "maze_text",
    "merge",
    "merge_identifiers",
    "modular_equations",
    "read_arc_folder",
    "read_csv",
    "read_identifiers",
    "read_jsonl",
    "read_maze_csv",
    "read_official",
    "read_official_sets",
    "read_pairs",
    "read_sudoku_csv",
    "read_test_puzzles",
    "shortest_path",
    "solve_sudoku",
    "split_equations",
    "sudoku_difficulty",
    "sudoku_tokens",
    "write_official",
]

# Where each public name is; resolved on first use, so that a reader of text does not pay for torch.
_NAMES = {
    "arc": ("ArcData", "build_arc", "encode_arc"),
    "arc_corpus": ("ArcTask", "arc_tasks", "read_arc_folder"),
    "arc_voting": ("ArcVoting",),
    "hub": ("hub_file", "hub_rows", "load_hub"),
    "listops": ("evaluate_listops", "generate_listops", "listops_text"),
    "maze": ("MazeAugment", "generate_mazes", "maze_text", "shortest_path"),
    "merging": ("merge", "merge_identifiers"),
    "modular": ("modular_equations", "split_equations"),
    "official": (
        "read_identifiers", "read_official", "read_official_sets", "read_test_puzzles",
        "write_official",
    ),
    "pairs": ("PairFormat", "read_maze_csv", "read_pairs", "read_sudoku_csv"),
    "puzzles": ("PuzzleBatches", "PuzzleMetadata", "PuzzleSet", "evaluation_batches"),
    "rows": ("RowCounts", "Rows", "read_csv", "read_jsonl"),
    "vectors": ("SyntheticRecursiveDataset",),
    "sudoku": (
        "SudokuAugment", "check_sudoku", "generate_sudoku", "solve_sudoku", "sudoku_difficulty",
        "sudoku_tokens",
    ),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'trm_fast.data' has no attribute {name!r}")
    value = getattr(import_module(f"trm_fast.data.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
