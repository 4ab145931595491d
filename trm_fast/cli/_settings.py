"""Settings of a run from a preset, the run that is resumed, a YAML file and flags."""

import dataclasses
import inspect
import re
from argparse import SUPPRESS
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args, get_type_hints

from trm_fast._json import read_object
from trm_fast._paths import expanded
from trm_fast.cli import suggest
from trm_fast.cli._flags import with_lists
from trm_fast.cli._settings_file import check_file, check_yaml
from trm_fast.cli._settings_numbers import check_flags, read_yaml
from trm_fast.recipes.recipe import Recipe
from trm_fast.recipes.settings import from_json, leaves, replaced
from trm_fast.train.run_directory import FILES


class Options(NamedTuple):
    """What a command line of ``trm-fast train`` asks for.

    Args:
        config: settings of the recipe.
        resume, overwrite, dry_run: the flags of these names.
    """

    config: Any
    resume: bool
    overwrite: bool
    dry_run: bool


# A directory with any of these holds a run.
_OF_A_RUN = ("config.json", "run.json", "ckpt")


def read_options(recipe: Recipe[Any], argv: list[str]) -> Options:
    """Reads a command line; later words win, and all win over the preset.

    Args:
        recipe: what is trained.
        argv: what follows the name of the recipe.

    Raises:
        ValueError: a setting is unknown or wrong, or flags contradict each other.
    """
    who = f"train {recipe.name}"
    argv = list(with_lists(_without_set(who, argv), _lists(recipe.default)))
    presets = recipe.presets
    check_flags(who, argv, _kinds(recipe.default))
    first = _flags(who, recipe.default, presets, argv)
    if first.resume and first.overwrite:
        raise ValueError(f"{who}: give one of --resume and --overwrite; got both")
    base = _base(who, recipe, first)
    parser = _parser(who, base, presets)
    values = parser.parse_args(argv)
    changes = _leaves_of(who, base, values)
    _refuse_none(who, base, changes)
    config = replaced(base, changes)
    if _resumes(who, first):
        _check_resumed(who, recipe, base, config)
    return Options(config, bool(first.resume), bool(first.overwrite), bool(first.dry_run))


def _refuse_none(who: str, config: Any, changes: Mapping[str, Any]) -> None:
    """Refuses None for settings that have no None, which the parser takes for not given."""
    for name, _, kind, _ in _fields(config):
        if changes[name] is None and type(None) not in get_args(kind):
            raise ValueError(f"{who}: --{name} must have a value; got None")


def changed(who: str, config: Any, words: Iterable[str]) -> Any:
    """Returns settings with some of them replaced.

    Args:
        who: begins the messages.
        config: settings of a recipe.
        words: "NAME=VALUE", with dotted names.

    Raises:
        ValueError: there is no such setting, or its value is wrong.
    """
    known = [name for name, _ in leaves(config)]
    given = list(words)
    for word in given:
        name, equals, _ = word.partition("=")
        if not name or not equals:
            raise ValueError(f"{who}: --set must be followed by NAME=VALUE; got {word!r}")
        if name not in known:
            raise ValueError(f"{who}: unknown setting {name!r}{suggest(name, known)}")
    flags = list(with_lists((f"--{word}" for word in given), _lists(config)))
    check_flags(who, flags, _kinds(config))
    values = _parser(who, config, {}).parse_args(flags)
    return replaced(config, _leaves_of(who, config, values))


def _lists(config: Any) -> set[str]:
    """Returns the names of the settings that have several values."""
    return {name for name, kind in _kinds(config).items() if "tuple" in str(kind)}


def _kinds(config: Any) -> dict[str, Any]:
    return {name: kind for name, _, kind, _ in _fields(config)}


def _leaves_of(who: str, config: Any, values: Any) -> dict[str, Any]:
    """Returns the value of each setting; a file may have put something in the place of a group."""
    found = {}
    for name, _ in leaves(config):
        if name not in values:
            group = name.rpartition(".")[0]
            raise ValueError(f"{who}: {group} must have settings below it; got something else")
        found[name] = values[name]
    return found


def _without_set(who: str, argv: list[str]) -> Iterator[str]:
    """Turns "--set a.b=c" and "--set=a.b=c" into "--a.b=c"."""
    words = iter(argv)
    for word in words:
        if word != "--set" and not word.startswith("--set="):
            yield _null(word)
            continue
        given = next(words, "") if word == "--set" else word.removeprefix("--set=")
        name, equals, _ = given.partition("=")
        if not name or not equals:
            raise ValueError(f"{who}: --set must be followed by NAME=VALUE; got {given!r}")
        yield _null(f"--{given}")


def _null(word: str) -> str:
    """Lets None be written as help and errors show it; the parser reads YAML, which has null."""
    return "null" if word == "None" else f"{word[:-4]}null" if word.endswith("=None") else word


def _flags(who: str, default: Any, presets: Mapping[str, Any], argv: list[str]) -> Any:
    """Reads a command line only for what decides where the settings start."""
    return _parser(who, default, presets).parse_args(argv)


def _base(who: str, recipe: Recipe[Any], flags: Any) -> Any:
    name = flags.preset or next(iter(recipe.presets))
    if name not in recipe.presets:
        raise ValueError(f"{who}: unknown preset {name!r}{suggest(name, recipe.presets)}")
    if not _resumes(who, flags):
        return recipe.presets[name]
    if flags.preset:
        raise ValueError(f"{who}: --resume takes the settings of the run; got --preset as well")
    run = expanded(flags.out)
    if _has_begun(run):
        found = read_json(run / "run.json").get("name")
        if found != recipe.name:
            raise ValueError(
                f"{who}: --out must be a run of {recipe.name} to resume; got "
                f"{f'one of {found}' if found else 'one that no recipe has made'}"
            )
    path = run / "config.json"
    found = read_json(path)
    try:
        return from_json(recipe.settings, found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{who}: {path}: {error}") from None


def _has_begun(run: Path) -> bool:
    """Returns whether there is more of a run than its settings, which are written first: a process
    that was killed just then has left a run that can be resumed without knowing its name."""
    return any((run / name).exists() for name in (*_OF_A_RUN, *FILES) if name != "config.json")


def _resumes(who: str, flags: Any) -> bool:
    """Returns whether there is a run to be resumed."""
    if flags.resume and not flags.out:
        raise ValueError(f"{who}: --resume needs --out, the directory of the run")
    return bool(flags.resume) and any((expanded(flags.out) / name).exists() for name in _OF_A_RUN)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file that a run has written.

    Raises:
        ValueError, OSError: it is not there, or holds something else.
    """
    try:
        return read_object(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: must be there, as in every run; got no such file") from None


def _check_resumed(who: str, recipe: Recipe[Any], run: Any, now: Any) -> None:
    for name, (before, value) in recipe.changes(run, now).items():
        raise ValueError(
            f"{who}: --{name} must be {before!r} as in the run that is resumed; got {value!r}. "
            "Leave it out, or begin another run with another --out"
        )


def _parser(who: str, config: Any, presets: Mapping[str, Any]) -> Any:
    from jsonargparse import ArgumentParser, set_loader

    def read_checked(text: str) -> Any:
        check_yaml(text, f"{who}: settings")
        found = read_yaml(text)
        _check_numbers(found, f"{who}: settings")
        return found

    # Of files and of every value on the command line, which are YAML too.
    set_loader(_CHECKED, read_checked, _yaml_errors())
    kinds = _kinds(config)

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ValueError(f"{who}: {_plain(message, [*kinds])}") from ex

        def parse_string(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Any:
            check_file(content, f"{who}: {path or '--config'}:", kinds)
            return super().parse_string(content, path, *args, **kwargs)

    summary = (inspect.getdoc(type(config)) or "").partition("\n")[0]
    parser = Parser(
        prog=f"trm-fast {who}", description=summary, allow_abbrev=False, parser_mode=_CHECKED
    )
    known = ", ".join(presets)
    parser.add_argument(
        "--preset", default="", help=f"settings to start from: {known}; empty means the first one"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="remove the run that is there")
    parser.add_argument("--dry-run", action="store_true", help="show all settings, take one step")
    parser.add_argument("--config", action="config", help="YAML or JSON file with settings")
    # Read by _without_set; here for --help.
    parser.add_argument(
        "--set", metavar="NAME=VALUE", default=SUPPRESS, help="the same as --NAME VALUE"
    )
    for name, value, kind, help in _fields(config):
        # argparse formats help texts with %.
        parser.add_argument(f"--{name}", type=kind, default=value, help=help.replace("%", "%%"))
    return parser


def _check_numbers(value: Any, subject: str) -> None:
    """Refuses integers that no float holds; what is nested is bounded before."""
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError(f"{subject} must have integers of 64 bits; got {value.bit_length()}")
    inner = value.values() if isinstance(value, dict) else value
    for item in inner if isinstance(value, (dict, list)) else ():
        _check_numbers(item, subject)


_CHECKED = "yaml of bounded depth"


def _yaml_errors() -> tuple[type[Exception], ...]:
    import yaml

    return yaml.YAMLError, ValueError


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Yields dotted name, value, type and description of every setting."""
    kinds, docs = get_type_hints(type(config)), field_docs(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, kinds[field.name], docs[field.name]


def field_docs(config: type[Any]) -> dict[str, str]:
    """Reads the description of each field from the ``Args`` of the docstrings of a dataclass and
    its bases."""
    texts = [inspect.cleandoc(kind.__doc__ or "") for kind in config.__mro__]
    docs = {}
    for field in dataclasses.fields(config):
        pattern = rf"^    {field.name}: (.+(?:\n {{8}}.+)*)"
        found = [match for text in texts if (match := re.search(pattern, text, re.MULTILINE))]
        docs[field.name] = " ".join(found[0][1].split()) if found else ""
    return docs


def _plain(message: str, fields: list[str]) -> str:
    """Puts a message of jsonargparse in our words: flag first, plain type names, a suggestion."""
    message = " ".join(message.split())
    unknown = re.match(r"[Uu]nrecognized arguments: (\S+)|Option '(\S+)' is not accepted", message)
    if unknown:
        word = (unknown[1] or unknown[2]).lstrip("-").partition("=")[0]
        return f"unknown setting {word!r}{suggest(word, fields)}"
    if message.startswith("Unexpected config"):
        # Its rest is the whole file.
        return "--config: expected a file with one 'setting: value' per line"
    message = re.sub(r'^Parser key "(\S+)":', r"--\1:", message)
    message = re.sub(r"a typing\.Literal\[(.+?)\]", r"one of \1", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    return message.replace("Expected a int", "Expected an int")
