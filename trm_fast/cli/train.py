"""``trm-fast train``: runs a recipe with settings from a preset, a YAML file and flags."""

import argparse
from typing import TYPE_CHECKING, Any

from trm_fast.cli import COMMANDS, suggest
from trm_fast.cli._flags import errors_name_flags
from trm_fast.cli._streams import display_only
from trm_fast.recipes import RECIPES, load

if TYPE_CHECKING:
    from trm_fast.cli._settings import Options
    from trm_fast.recipes.recipe import Recipe

HELP = COMMANDS["train"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the name of the recipe; what follows it is read by the recipe's own parser."""
    width = max(map(len, RECIPES))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = (
        f"{parser.prog} RECIPE [--preset NAME] [--config FILE.yaml] [--set NAME=VALUE ...]\n"
        f"{' ' * (len(parser.prog) + 14)}[--out DIR] [--resume | --overwrite] [--dry-run]"
    )
    parser.epilog = "\n".join(
        [
            "recipes:",
            *(f"  {name:{width}}  {recipe.help}" for name, recipe in RECIPES.items()),
            "",
            f"{parser.prog} RECIPE --help shows every setting with its default.",
        ]
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="what to train, see below")
    parser.add_argument("fields", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Trains ``args.recipe`` with the settings in ``args.fields``.

    Returns:
        0, or 128 plus the number of the signal that interrupted the run.

    Raises:
        ValueError: there is no such recipe, or a setting is unknown or wrong.
        ModuleNotFoundError: jsonargparse, or what the recipe needs, is not installed.
    """
    if args.recipe is None:
        raise ValueError(f"train: name a recipe; choose from {', '.join(RECIPES)}")
    if args.recipe not in RECIPES:
        raise ValueError(f"train: unknown recipe {args.recipe!r}{suggest(args.recipe, RECIPES)}")
    from trm_fast.cli._settings import read_options

    recipe = load(args.recipe)
    with errors_name_flags(recipe.default):
        return _train(recipe, read_options(recipe, args.fields))


def _train(recipe: "Recipe[Any]", options: "Options") -> int:
    from trm_fast.recipes.running import runs_of, train

    if options.dry_run:
        runs = runs_of(recipe, options.config)
        name, config = next(iter(runs.items()))
        _rehearse(config, recipe.build(config))
        if len(runs) > 1:
            print(f"runs         {len(runs)}: {', '.join(runs)}; this was {name}")
        return 0
    with display_only():
        return train(recipe, options.config, resume=options.resume, overwrite=options.overwrite)


def _rehearse(config: Any, trainer: Any) -> None:
    """Prints the settings and what one step has shown."""
    from trm_fast._slow_paths import without_warnings
    from trm_fast.recipes.settings import leaves
    from trm_fast.train.dry_run import dry_run

    settings = list(leaves(config))
    width = max(len(name) for name, _ in settings)
    for name, value in settings:
        print(f"{name:{width}}  {value}")
    with without_warnings():
        found = dry_run(trainer)
    print()
    print(f"parameters   {found.parameters:,}")
    print(
        f"memory       weights {_size(found.weights)}, gradients {_size(found.gradients)}, "
        f"optimizers and averages {_size(found.optimizers)}; at most {_size(found.peak)} at once"
    )
    print(f"checkpoint   {_size(found.checkpoint)}")
    print(
        f"one step     loss {found.loss:.4f}, {found.seconds:.2f} s (the first one is the slowest)"
    )
    for line in found.slow_paths:
        print(line)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
