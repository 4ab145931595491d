"""Settings of a recipe as a tree of dataclasses: to flat names, to JSON, and back."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from trm_fast._paths import expanded

Config = TypeVar("Config")


def require(owner: str, holds: bool, what: str, value: object) -> None:
    """Checks a setting.

    Args:
        owner: the recipe.
        holds: whether the setting is as it has to be.
        what: says how it has to be.
        value: the setting.

    Raises:
        ValueError: it is not.
    """
    if not holds:
        raise ValueError(f"{owner}: {what}; got {value!r}")


def directory_of(out: str, name: str) -> str:
    """Returns the directory of a run: ``out``, or one below runs/ if that is empty."""
    return str(expanded(out) if out else Path("runs") / name)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every setting with its dotted name, such as ("model.hidden_size", 64)."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the settings with some of them, by dotted name, replaced.

    Raises:
        ValueError: there is no such setting, or a value is out of range.
    """
    known = [name for name, _ in leaves(config)]
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(known)}"
            raise ValueError(f"unknown setting {name!r}{hint}")
    new: Config = _replaced(config, values)
    return new


def _replaced(config: Any, values: Mapping[str, Any]) -> Any:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        inner = getattr(config, field.name)
        if dataclasses.is_dataclass(inner):
            start = f"{field.name}."
            within = {name[len(start) :]: v for name, v in values.items() if name.startswith(start)}
            changes[field.name] = _replaced(inner, within)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(config, **changes)


def to_json(config: Any) -> dict[str, Any]:
    """Returns the settings as nested plain values."""
    return dataclasses.asdict(config)


def from_json(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Returns the settings that ``to_json`` gave, also after a way through JSON.

    Raises:
        ValueError: a setting is missing, unknown, out of range or of another type.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in sorted({*values} ^ {*names}):
        what = "unknown" if name in values else "missing"
        raise ValueError(f"{kind.__name__}: the setting {name[:80]!r} is {what}")
    for name in names:
        if not _fits(hints[name], values[name]):
            wanted = inspect.formatannotation(hints[name])
            raise ValueError(
                f"{kind.__name__}: {name} must be of type {wanted}; got {values[name]!r:.80}"
            )
    return kind(**{name: _value(hints[name], values[name]) for name in names})


def _fits(hint: Any, value: Any) -> bool:
    """Returns whether a value from JSON is of a type; of types that JSON has not, any is."""
    origin, inner = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) or origin is dict:
        items = value.items() if isinstance(value, Mapping) else None
        return items is not None and (
            origin is None or all(_fits(inner[0], k) and _fits(inner[1], v) for k, v in items)
        )
    if origin in (Union, UnionType):
        return any(_fits(one, value) for one in inner)
    if origin is Literal:
        return any(type(one) is type(value) and one == value for one in inner)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        if origin is list or inner[1:] == (...,):
            return all(_fits(inner[0], item) for item in value)
        return len(value) == len(inner) and all(map(_fits, inner, value))
    # True is an int to Python, and an int is as good as a float.
    if hint in (bool, int, str, NoneType):
        return type(value) is hint
    return hint is not float or type(value) in (int, float)


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_json(hint, value)  # type: ignore[arg-type]
    # JSON has lists only; settings are never lists.
    return tuple(value) if isinstance(value, list) else value
