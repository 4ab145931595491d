"""Complete experiments: each recipe is a settings class and one function that runs it."""

from typing import NamedTuple


class Recipe(NamedTuple):
    """Where a recipe is found, by names only: listing recipes imports neither them nor torch."""

    help: str
    module: str
    config: str
    run: str


RECIPES = {
    "grokking": Recipe(
        help="Trains a small decoder on x*y mod 97 until it generalises (the Grokfast paper).",
        module="trm_fast.recipes.grokking",
        config="GrokkingConfig",
        run="train_grokking",
    ),
}
