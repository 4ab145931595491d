"""Data of the recipes: puzzles in memory and on disk, readers, generators and splits."""

from typing import TYPE_CHECKING

from trm_fast._lazy import exports

if TYPE_CHECKING:
    from trm_fast.data.puzzles import PuzzleBatches as PuzzleBatches
    from trm_fast.data.puzzles import PuzzleMetadata as PuzzleMetadata
    from trm_fast.data.puzzles import PuzzleSet as PuzzleSet
    from trm_fast.data.puzzles import evaluation_batches as evaluation_batches
    from trm_fast.data.puzzles.arc import ArcData as ArcData
    from trm_fast.data.puzzles.arc import build_arc as build_arc
    from trm_fast.data.puzzles.arc import encode_arc as encode_arc
    from trm_fast.data.puzzles.arc_corpus import ArcTask as ArcTask
    from trm_fast.data.puzzles.arc_corpus import arc_tasks as arc_tasks
    from trm_fast.data.puzzles.arc_corpus import read_arc_folder as read_arc_folder
    from trm_fast.data.puzzles.arc_voting import ArcVoting as ArcVoting
    from trm_fast.data.puzzles.maze import MazeAugment as MazeAugment
    from trm_fast.data.puzzles.maze import generate_mazes as generate_mazes
    from trm_fast.data.puzzles.maze import maze_text as maze_text
    from trm_fast.data.puzzles.maze import shortest_path as shortest_path
    from trm_fast.data.puzzles.merging import merge as merge
    from trm_fast.data.puzzles.merging import merge_identifiers as merge_identifiers
    from trm_fast.data.puzzles.sudoku import SudokuAugment as SudokuAugment
    from trm_fast.data.puzzles.sudoku import check_sudoku as check_sudoku
    from trm_fast.data.puzzles.sudoku import generate_sudoku as generate_sudoku
    from trm_fast.data.puzzles.sudoku import solve_sudoku as solve_sudoku
    from trm_fast.data.puzzles.sudoku import sudoku_difficulty as sudoku_difficulty
    from trm_fast.data.puzzles.sudoku import sudoku_tokens as sudoku_tokens
    from trm_fast.data.sources.hub import hub_file as hub_file
    from trm_fast.data.sources.hub import hub_rows as hub_rows
    from trm_fast.data.sources.hub import load_hub as load_hub
    from trm_fast.data.sources.official import read_identifiers as read_identifiers
    from trm_fast.data.sources.official import read_official as read_official
    from trm_fast.data.sources.official import read_official_sets as read_official_sets
    from trm_fast.data.sources.official import read_test_puzzles as read_test_puzzles
    from trm_fast.data.sources.official import write_official as write_official
    from trm_fast.data.sources.pairs import PairFormat as PairFormat
    from trm_fast.data.sources.pairs import read_maze_csv as read_maze_csv
    from trm_fast.data.sources.pairs import read_pairs as read_pairs
    from trm_fast.data.sources.pairs import read_sudoku_csv as read_sudoku_csv
    from trm_fast.data.sources.rows import RowCounts as RowCounts
    from trm_fast.data.sources.rows import Rows as Rows
    from trm_fast.data.sources.rows import read_csv as read_csv
    from trm_fast.data.sources.rows import read_jsonl as read_jsonl
    from trm_fast.data.synthetic.listops import evaluate_listops as evaluate_listops
    from trm_fast.data.synthetic.listops import generate_listops as generate_listops
    from trm_fast.data.synthetic.listops import listops_text as listops_text
    from trm_fast.data.synthetic.modular import modular_equations as modular_equations
    from trm_fast.data.synthetic.modular import split_equations as split_equations
    from trm_fast.data.synthetic.vectors import (
        SyntheticRecursiveDataset as SyntheticRecursiveDataset,
    )

# Resolved on first use, so that a reader of text does not pay for torch.
__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "puzzles.arc": ("ArcData", "build_arc", "encode_arc"),
        "puzzles.arc_corpus": ("ArcTask", "arc_tasks", "read_arc_folder"),
        "puzzles.arc_voting": ("ArcVoting",),
        "sources.hub": ("hub_file", "hub_rows", "load_hub"),
        "synthetic.listops": ("evaluate_listops", "generate_listops", "listops_text"),
        "puzzles.maze": ("MazeAugment", "generate_mazes", "maze_text", "shortest_path"),
        "puzzles.merging": ("merge", "merge_identifiers"),
        "synthetic.modular": ("modular_equations", "split_equations"),
        "sources.official": (
            "read_identifiers",
            "read_official",
            "read_official_sets",
            "read_test_puzzles",
            "write_official",
        ),
        "sources.pairs": ("PairFormat", "read_maze_csv", "read_pairs", "read_sudoku_csv"),
        "puzzles": ("PuzzleBatches", "PuzzleMetadata", "PuzzleSet", "evaluation_batches"),
        "sources.rows": ("RowCounts", "Rows", "read_csv", "read_jsonl"),
        "synthetic.vectors": ("SyntheticRecursiveDataset",),
        "puzzles.sudoku": (
            "SudokuAugment",
            "check_sudoku",
            "generate_sudoku",
            "solve_sudoku",
            "sudoku_difficulty",
            "sudoku_tokens",
        ),
    },
)
