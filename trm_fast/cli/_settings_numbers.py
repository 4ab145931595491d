"""Numbers of settings, which are decimal ones without quotes.

YAML 1.1 reads 0500 as 320, 1:30 as 90 and 0x10 as 16, and its words yes, no, on and off as true and
false: here they are refused where a number is wanted, and text where text is.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, get_args

_INT = r"[-+]?(?:0|[1-9][0-9]*)"
_FLOAT = r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_DECIMAL = re.compile(_FLOAT)
_LIKE_NUMBER = re.compile(r"[-+.]*\d")
_BETWEEN = re.compile(r"[\[\](),\s]+")  # the values of a list
_PLAIN = {  # what words without quotes are, by the first letters that they may have
    "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (_INT, [*"-+0123456789"]),
    "float": (rf"{_FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", [*"-+.0123456789"]),
}


def is_numeric(kind: Any) -> bool:
    """Returns whether a setting of this type holds numbers and no text."""
    kinds = {*_kinds(kind)}
    return bool(kinds & {int, float}) and str not in kinds


def _kinds(kind: Any) -> Iterator[Any]:
    yield kind
    for inner in get_args(kind):
        if not isinstance(inner, str):  # the word of a Literal
            yield from _kinds(inner)


def check_number(text: str, quoted: bool, subject: str) -> None:
    """Refuses what is no number for a person, or only by its quotes; words are left to others.

    Args:
        text: a value of a setting that holds numbers, without quotes.
        quoted: whether it had some.
        subject: begins the message, as "train sudoku: --train.steps".

    Raises:
        ValueError: it is a number in quotes, or one that is not decimal.
    """
    if not _LIKE_NUMBER.match(text):
        return
    if not _DECIMAL.fullmatch(text):
        raise ValueError(
            f"{subject} must be a decimal number, such as 500 or 1e-3; got {text}. Leading zeros, "
            "underscores, colons and other bases are not read"
        )
    if quoted:
        raise ValueError(f"{subject} must be a number; got the text {text!r}. Leave out the quotes")


def check_flags(who: str, words: Iterable[str], kinds: Mapping[str, Any]) -> None:
    """Checks the numbers of a command line.

    Args:
        who: begins the messages.
        words: "--NAME=VALUE", or "--NAME" followed by the value.
        kinds: the types of all settings by their dotted names.

    Raises:
        ValueError: as ``check_number``.
    """
    flag = ""
    for word in words:
        name, equals, value = word.partition("=")
        setting = name.removeprefix("--") if equals and word.startswith("--") else flag
        if setting in kinds and is_numeric(kinds[setting]):
            for item in _BETWEEN.split(value if equals else word):
                bare = item.strip("'\"")
                check_number(bare, bare != item, f"{who}: --{setting}")
        flag = word.removeprefix("--") if word.startswith("--") and not equals else ""


@cache
def _loader() -> Any:
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - as in its base

    for name, (pattern, first) in _PLAIN.items():
        Loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), first
        )
    return Loader


def read_yaml(text: str) -> Any:
    """Returns what YAML holds; words without quotes are null, true, false, decimal numbers or text.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    import yaml

    return yaml.load(text, Loader=_loader())
