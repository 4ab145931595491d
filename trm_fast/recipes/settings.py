"""Settings of a recipe as a tree of dataclasses: to flat names, to JSON, and back."""

import dataclasses
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

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
        ValueError: a setting is missing, unknown or out of range.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in {*values} ^ {*names}:
        what = "unknown" if name in values else "missing"
        raise ValueError(f"{kind.__name__}: the setting {name!r} is {what}")
    return kind(**{name: _value(hints[name], values[name]) for name in names})


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_json(hint, value)  # type: ignore[arg-type]
    # JSON has lists only; settings are never lists.
    return tuple(value) if isinstance(value, list) else value
