"""Settings between a person and the code: lists as people write them, errors that name flags."""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from trm_fast.recipes.settings import leaves

_NUMBER = r"[-+]?\d[\d.e+-]*"
_LIST = re.compile(rf"\(?\s*{_NUMBER}(?:\s*,\s*{_NUMBER})+\s*,?\s*\)?")


def with_lists(words: Iterable[str], lists: Collection[str]) -> Iterator[str]:
    """Lets the values of some settings be written as ``(8, 12)``, which help and errors show, and
    as ``8,12``, besides ``[8, 12]``.

    Args:
        words: of a command line.
        lists: names of the settings that have several values.
    """
    flag = ""
    for word in words:
        name, equals, value = word.partition("=")
        if name.removeprefix("--") in lists and equals:
            yield f"{name}={_as_list(value)}"
        else:
            yield _as_list(word) if flag in lists else word
        flag = word.removeprefix("--") if word.startswith("--") else ""


def _as_list(value: str) -> str:
    return f"[{value.strip('() ')}]" if _LIST.fullmatch(value.strip()) else value


@contextmanager
def errors_name_flags(config: Any) -> Iterator[None]:
    """Has errors name flags where they name an argument of a class: "TrainerConfig: steps must be"
    becomes "--train.steps must be", and "resume the run" becomes "--resume the run".

    Args:
        config: settings of a recipe.
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        # Others, as of files, are told by their number and name.
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (_flagged(error.args[0], config),)
        raise


def _flagged(message: str, config: Any) -> str:
    message = re.sub(r"(, |or )(resume|overwrite) (the runs?|it|them)\b", r"\1--\2 \3", message)
    found = re.match(r"(\w+): (\w+) (?=must |needs )", message)
    flag = None if found is None else _flag_of(found[1], found[2], config)
    return message if found is None or flag is None else f"--{flag} {message[found.end() :]}"


def _flag_of(owner: str, argument: str, config: Any) -> str | None:
    """Returns the setting that an argument of a class or function is, if there is just one."""
    names = list(_owned(config))
    exact = [name for kind, name in names if kind == owner and _last(name) == argument]
    # Others call what they get from a setting nearly the same.
    near = [name for _, name in names if _last(name) in (argument, argument.removesuffix("_size"))]
    for found in (exact, near):
        if len(found) == 1:
            return found[0]
    return None


def _owned(config: Any) -> Iterator[tuple[str, str]]:
    """Yields the class and the dotted name of every setting."""
    for name, _ in leaves(config):
        group = name.rpartition(".")[0]
        yield type(attrgetter(group)(config) if group else config).__name__, name


def _last(name: str) -> str:
    return name.rpartition(".")[2]
