"""``trm-fast train``: runs a recipe with settings from a YAML file and flags."""

import argparse
import dataclasses
import inspect
import re
from importlib import import_module
from typing import Any, NoReturn, get_type_hints

from trm_fast.cli import COMMANDS, suggest
from trm_fast.recipes import RECIPES

HELP = COMMANDS["train"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the name of the recipe; what follows it is read by the recipe's own parser."""
    width = max(map(len, RECIPES))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = f"{parser.prog} RECIPE [--config FILE.yaml] [--FIELD VALUE ...]"
    parser.epilog = "\n".join(
        [
            "recipes:",
            *(f"  {name:{width}}  {recipe.help}" for name, recipe in RECIPES.items()),
            "",
            f"{parser.prog} RECIPE --help shows every field with its default.",
        ]
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="what to train, see below")
    parser.add_argument("fields", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Trains ``args.recipe`` with the settings in ``args.fields``.

    Raises:
        ValueError: there is no such recipe, or a setting is unknown or wrong.
        ModuleNotFoundError: jsonargparse, or what the recipe needs, is not installed.
    """
    if args.recipe is None:
        raise ValueError(f"train: name a recipe; choose from {', '.join(RECIPES)}")
    if args.recipe not in RECIPES:
        raise ValueError(f"train: unknown recipe {args.recipe!r}{suggest(args.recipe, RECIPES)}")
    recipe = RECIPES[args.recipe]
    module = import_module(recipe.module)
    config = _read_config(getattr(module, recipe.config), args.fields, args.recipe)
    getattr(module, recipe.run)(config)
    return 0


def _read_config(config: type[Any], argv: list[str], recipe: str) -> Any:
    """Builds the dataclass ``config`` from flags and files; a flag after --config overrides it."""
    from jsonargparse import ArgumentParser

    fields = [field.name for field in dataclasses.fields(config)]

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ValueError(f"train {recipe}: {_plain(message, fields)}") from ex

    summary = (inspect.getdoc(config) or "").partition("\n")[0]
    parser = Parser(prog=f"trm-fast train {recipe}", description=summary, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML or JSON file with fields.")
    types, docs = get_type_hints(config), field_docs(config)
    for field in dataclasses.fields(config):
        # argparse formats help texts with %.
        help = docs[field.name].replace("%", "%%")
        parser.add_argument(
            f"--{field.name}", type=types[field.name], default=field.default, help=help
        )
    values = parser.parse_args(argv)
    return config(**{name: values[name] for name in fields})


def field_docs(config: type[Any]) -> dict[str, str]:
    """Reads the description of each field from the ``Args`` of a dataclass's docstring."""
    text = inspect.getdoc(config) or ""
    docs = {}
    for field in dataclasses.fields(config):
        found = re.search(rf"^    {field.name}: (.+(?:\n {{8}}.+)*)", text, re.MULTILINE)
        docs[field.name] = " ".join(found[1].split()) if found else ""
    return docs


def _plain(message: str, fields: list[str]) -> str:
    """Puts a message of jsonargparse in our words: flag first, plain type names, a suggestion."""
    message = " ".join(message.split())
    unknown = re.match(r"[Uu]nrecognized arguments: (\S+)|Option '(\S+)' is not accepted", message)
    if unknown:
        word = (unknown[1] or unknown[2]).lstrip("-").partition("=")[0]
        return f"unknown field {word!r}{suggest(word, fields)}"
    if message.startswith("Unexpected config"):
        # Its rest is the whole file.
        return "--config: expected a file with one 'field: value' per line"
    message = re.sub(r'^Parser key "(\S+)":', r"--\1:", message)
    message = re.sub(r"a typing\.Literal\[(.+?)\]", r"one of \1", message)
    return re.sub(r"<class '(\w+)'>", r"\1", message)
