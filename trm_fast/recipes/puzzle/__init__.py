"""Official TRM on puzzles: Sudoku, mazes and ARC-AGI; see ``trm_fast.recipes.puzzle.trainer``."""

from typing import TYPE_CHECKING

from trm_fast._lazy import exports

if TYPE_CHECKING:
    from trm_fast.recipes.puzzle.config import PRESETS as PRESETS
    from trm_fast.recipes.puzzle.config import ArcConfig as ArcConfig
    from trm_fast.recipes.puzzle.config import MazeConfig as MazeConfig
    from trm_fast.recipes.puzzle.config import PuzzleConfig as PuzzleConfig
    from trm_fast.recipes.puzzle.config import SudokuConfig as SudokuConfig
    from trm_fast.recipes.puzzle.data import ArcTasks as ArcTasks
    from trm_fast.recipes.puzzle.data import MazeData as MazeData
    from trm_fast.recipes.puzzle.data import Splits as Splits
    from trm_fast.recipes.puzzle.data import SudokuData as SudokuData
    from trm_fast.recipes.puzzle.evaluation import Evaluation as Evaluation
    from trm_fast.recipes.puzzle.optimizer import PuzzleOptimizerConfig as PuzzleOptimizerConfig
    from trm_fast.recipes.puzzle.report import finish as finish
    from trm_fast.recipes.puzzle.trainer import build as build

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "config": ("PRESETS", "ArcConfig", "MazeConfig", "PuzzleConfig", "SudokuConfig"),
        "data": ("ArcTasks", "MazeData", "Splits", "SudokuData"),
        "evaluation": ("Evaluation",),
        "optimizer": ("PuzzleOptimizerConfig",),
        "report": ("finish",),
        "trainer": ("build",),
    },
)
