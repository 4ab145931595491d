"""Fields of a dataclass of settings, which are of the types that they declare."""

from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

_NAMES = {int: "an int", float: "a number", bool: "True or False", str: "a str"}


def check_fields(config: Any) -> None:
    """Checks the fields that hold numbers, words, True or False, or None; others are left alone.

    A bool is no number, an int is a float, and scalars of NumPy become the plain values they are.

    Args:
        config: an instance of a dataclass, in its ``__post_init__``.

    Raises:
        TypeError: a field is of another type; the line names class, field and value.
    """
    for name, kinds in _checked(type(config)):  # type: ignore[arg-type]
        value = getattr(config, name)
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(config, name, value)  # also of a frozen one
        if not any(_is_of(value, kind) for kind in kinds):
            wanted = ", ".join(_NAMES[kind] for kind in kinds if kind in _NAMES)
            none = ", or None" if type(None) in kinds else ""
            owner = type(config).__name__
            raise TypeError(f"{owner}: {name} must be {wanted}{none}; got {value!r}")


def _is_of(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


@cache
def _checked(kind: Any) -> tuple[tuple[str, tuple[type, ...]], ...]:
    """Returns the names of the fields that are checked, with the types that each may be of."""
    hints = get_type_hints(kind)
    found = [(field.name, tuple(_kinds(hints[field.name]))) for field in fields(kind)]
    known = {*_NAMES, type(None)}
    return tuple((name, kinds) for name, kinds in found if known.issuperset(kinds))


def _kinds(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from dict.fromkeys(map(type, get_args(hint)))
    elif get_args(hint) and type(None) in get_args(hint):
        for inner in get_args(hint):
            yield from _kinds(inner)
    else:
        yield hint
