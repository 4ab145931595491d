"""The recipes' own commands, as their listings name them: ``trm-fast COMMAND RECIPE``.

A word such as "merge" is a command of ``trm-fast``; two words such as "data convert" are an action
of ``trm-fast data``, and "data make" adds a kind to it.
"""

import argparse
import re
from collections.abc import Collection
from importlib import import_module
from types import ModuleType

from trm_fast.cli._streams import display_only
from trm_fast.recipes import RECIPES

# Sentences for ``trm-fast --help``, where there are better ones than the general one.
_HELP = {"bench": "Compares optimizers on a recipe, in many runs that can be interrupted."}
_WORD = r"[a-z][a-z0-9_-]*"
_GROUP = "data"  # whose actions recipes may add to


def own_commands(known: Collection[str]) -> dict[str, str]:
    """Returns the commands of one word, each with a sentence about it.

    Args:
        known: the commands that are there without recipes.

    Raises:
        ValueError: a recipe declares a command that cannot be one.
    """
    found = {}
    for name, listing in RECIPES.items():
        for command in listing.commands:
            is_command = re.fullmatch(_WORD, command) is not None and command not in known
            is_action = re.fullmatch(f"{_GROUP} {_WORD}", command) and command != f"{_GROUP} check"
            if not is_command and not is_action:
                raise ValueError(
                    f"recipe {name}: commands must be words that are no command yet, or "
                    f'"{_GROUP} WORD"; got {command!r}'
                )
            if is_command:
                found[command] = _HELP.get(command, _sentence(command))
    return found


def own_actions() -> dict[str, str]:
    """Returns the actions that recipes add to ``trm-fast data``, each with a sentence about it."""
    commands = {command for listing in RECIPES.values() for command in listing.commands}
    actions = sorted(c.partition(" ")[2] for c in commands if c.startswith(f"{_GROUP} "))
    return {action: _sentence(f"{_GROUP} {action}") for action in actions}


def _sentence(command: str) -> str:
    return f"What it does is said by each recipe: {', '.join(_modules(command))}."


def own_modules(command: str) -> dict[str, ModuleType]:
    """Returns the modules of the recipes that have a command, imported, by their recipes."""
    return {name: import_module(module) for name, module in _modules(command).items()}


def add_own_commands(command: str, parser: argparse.ArgumentParser) -> None:
    """Adds the recipes that have this command, each with its own options."""
    recipes = parser.add_subparsers(dest="recipe", metavar="RECIPE", title="recipes")
    for name, own in own_modules(command).items():
        own.add_arguments(recipes.add_parser(name, help=own.HELP, description=own.HELP))


def run_own_command(command: str, args: argparse.Namespace) -> int:
    """Runs the command of the recipe ``args.recipe``; returns its exit code. It may train for
    hours, so what it prints is only shown.

    Raises:
        ValueError: none is named.
    """
    modules = _modules(command)
    if args.recipe is None:
        raise ValueError(f"{command}: name a recipe; choose from {', '.join(modules)}")
    with display_only():
        code: int = import_module(modules[args.recipe]).run(args)
    return code


def _modules(command: str) -> dict[str, str]:
    return {
        name: listing.commands[command]
        for name, listing in RECIPES.items()
        if command in listing.commands
    }
