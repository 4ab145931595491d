"""Complete experiments: each recipe is a settings class and one function that runs it."""

from typing import NamedTuple


class Recipe(NamedTuple):
    """Where a recipe is found, by names only: listing recipes imports neither them nor torch.

    Its module has ``PRESETS``, for each recipe a settings object by name, the first of which is the
    default; ``build(config)``, which returns a ``Trainer``; and ``finish(trainer, summary)``, which
    returns the lines that are shown after a run.
    """

    help: str
    module: str
    config: str


RECIPES = {
    "sudoku": Recipe(
        help="Trains a TRM on Sudoku of size 4, 6 or 9.",
        module="trm_fast.recipes.puzzle",
        config="SudokuConfig",
    ),
    "maze": Recipe(
        help="Trains a TRM to find the shortest path through a maze.",
        module="trm_fast.recipes.puzzle",
        config="MazeConfig",
    ),
    "arc": Recipe(
        help="Trains a TRM on ARC-AGI-1 or -2, evaluated by voting.",
        module="trm_fast.recipes.puzzle",
        config="ArcConfig",
    ),
    "grokking": Recipe(
        help="Trains a small decoder on x*y mod 97 until it generalises (the Grokfast paper).",
        module="trm_fast.recipes.grokking",
        config="GrokkingConfig",
    ),
    "classify": Recipe(
        help="Trains a recursive classifier on feature vectors.",
        module="trm_fast.recipes.classify",
        config="ClassifyConfig",
    ),
}
