"""Puzzles: sets and batches of them, and what is known of Sudoku, mazes and ARC-AGI."""

from typing import TYPE_CHECKING

from trm_fast._lazy import exports

if TYPE_CHECKING:
    from trm_fast.data.puzzles.puzzle_batches import PuzzleBatches as PuzzleBatches
    from trm_fast.data.puzzles.puzzle_batches import evaluation_batches as evaluation_batches
    from trm_fast.data.puzzles.puzzle_set import PuzzleMetadata as PuzzleMetadata
    from trm_fast.data.puzzles.puzzle_set import PuzzleSet as PuzzleSet

# Resolved on first use: the generators need no torch.
__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "puzzle_batches": ("PuzzleBatches", "evaluation_batches"),
        "puzzle_set": ("PuzzleMetadata", "PuzzleSet"),
    },
)
