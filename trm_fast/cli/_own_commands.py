"""The recipes' own commands: ``trm-fast COMMAND RECIPE``."""

import argparse
from importlib import import_module

from trm_fast.recipes import RECIPES


def add_own_commands(command: str, parser: argparse.ArgumentParser) -> None:
    """Adds the recipes that have this command, each with its own options."""
    recipes = parser.add_subparsers(dest="recipe", metavar="RECIPE", title="recipes")
    for name, module in _modules(command).items():
        own = import_module(module)
        own.add_arguments(recipes.add_parser(name, help=own.HELP, description=own.HELP))


def run_own_command(command: str, args: argparse.Namespace) -> int:
    """Runs the command of the recipe ``args.recipe``; returns its exit code.

    Raises:
        ValueError: none is named.
    """
    modules = _modules(command)
    if args.recipe is None:
        raise ValueError(f"{command}: name a recipe; choose from {', '.join(modules)}")
    code: int = import_module(modules[args.recipe]).run(args)
    return code


def _modules(command: str) -> dict[str, str]:
    return {
        name: listing.commands[command]
        for name, listing in RECIPES.items()
        if command in listing.commands
    }
