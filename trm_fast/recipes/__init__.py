"""Complete experiments: one folder for each system."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from trm_fast.recipes.recipe import Recipe


class Listing(NamedTuple):
    """Where a recipe is found, by names only: listing recipes imports neither them nor torch.

    Args:
        help: what it does, in one sentence.
        system: its folder below ``trm_fast.recipes``, whose word is found in every tree.
        recipe: the ``Recipe`` in the system's ``trainer.py``.
        commands: the recipe's own commands beside ``trm-fast train``, and the module of each, which
            has what a module of ``trm_fast.cli`` has: HELP, add_arguments and run. "bench" becomes
            ``trm-fast bench NAME`` and "data convert" ``trm-fast data convert NAME``; "data make"
            adds the kind NAME to ``trm-fast data make``.
    """

    help: str
    system: str
    recipe: str = "RECIPE"
    commands: Mapping[str, str] = MappingProxyType({})


RECIPES = {
    "sudoku": Listing("Trains a TRM on Sudoku of size 4, 6 or 9.", "puzzle", "SUDOKU"),
    "maze": Listing("Trains a TRM to find the shortest path through a maze.", "puzzle", "MAZE"),
    "arc": Listing("Trains a TRM on ARC-AGI-1 or -2, evaluated by voting.", "puzzle", "ARC"),
    "grokking": Listing(
        "Trains a small decoder on x*y mod 97 until it generalises (the Grokfast paper).",
        "grokking",
        commands={"bench": "trm_fast.recipes.grokking.bench.command"},
    ),
    "classify": Listing("Trains a recursive classifier on feature vectors.", "classify"),
}


def load(name: str) -> "Recipe[Any]":
    """Imports a recipe of ``RECIPES``."""
    listing = RECIPES[name]
    module = import_module(f"trm_fast.recipes.{listing.system}.trainer")
    recipe: Recipe[Any] = getattr(module, listing.recipe)
    return recipe
