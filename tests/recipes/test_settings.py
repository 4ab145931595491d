"""Settings from JSON: each of the type that it must have, or refused by its name."""

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from trm_fast.recipes.settings import from_json, to_json


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int] = (1, 2)
    many: tuple[float, ...] = ()


@dataclass(frozen=True)
class Settings:
    lr: float = 1.0
    steps: int = 1
    fast: bool = True
    name: str = "x"
    kind: Literal["a", 2] = "a"
    clip: float | None = None
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    "settings", [Settings(), Settings(lr=2, kind=2, clip=1.5, inner=Inner((3, 4), (0.5, 1, 2)))]
)
def test_settings_come_back_from_json(settings):
    assert from_json(Settings, json.loads(json.dumps(to_json(settings)))) == settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": "1"}, "lr must be of type float; got '1'"),
        ({"lr": True}, "lr must be of type float; got True"),
        ({"steps": 1.5}, "steps must be of type int; got 1.5"),
        ({"steps": False}, "steps must be of type int; got False"),
        ({"fast": 1}, "fast must be of type bool; got 1"),
        ({"kind": True}, "kind must be of type .*; got True"),
        ({"clip": []}, r"clip must be of type float \| None; got \[\]"),
        ({"inner": 3}, "inner must be of type .*Inner; got 3"),
        ({"inner": {"size": [1], "many": []}}, r"Inner: size must be of type .*; got \[1\]"),
        ({"inner": {"size": [1, 2], "many": ["a"]}}, "Inner: many must be of type .*"),
        ({"new": 1}, "Settings: the setting 'new' is unknown"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_name(changed, message):
    with pytest.raises(ValueError, match=message):
        from_json(Settings, {**to_json(Settings()), **changed})
