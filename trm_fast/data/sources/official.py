"""Puzzle data sets on disk, in the layout of the official code.

    <folder>/<split>/dataset.json                    sizes and special ids
    <folder>/<split>/<set>__inputs.npy               [examples, seq_len]
    <folder>/<split>/<set>__labels.npy               [examples, seq_len]
    <folder>/<split>/<set>__puzzle_identifiers.npy   [puzzles]
    <folder>/<split>/<set>__puzzle_indices.npy       [puzzles + 1]
    <folder>/<split>/<set>__group_indices.npy        [groups + 1]
    <folder>/identifiers.json                        name of each puzzle identifier
    <folder>/test_puzzles.json                       ARC only: the tasks on which answers are judged

Source: SamsungSAILMontreal/TinyRecursiveModels at commit e7b6871, dataset/ and puzzle_dataset.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trm_fast._json import load_object, loads
from trm_fast.data.puzzles import PuzzleMetadata, PuzzleSet
from trm_fast.data.puzzles.merging import concatenate
from trm_fast.data.puzzles.puzzle_set import Array

MAPPED = ("inputs", "labels")
INDICES = ("puzzle_identifiers", "puzzle_indices", "group_indices")
_OPTIONAL = {"pad_id", "ignore_label_id", "blank_identifier_id"}


def read_official(folder: str | PathLike[str], split: str = "train") -> PuzzleSet:
    """Reads one split; its sets, if it has several, stand one after another.

    Inputs and labels of a single set stay on disk and are mapped. Sets of one folder share their
    identifiers, which are kept; folders are joined with ``merge``.

    Args:
        folder: where the splits and ``identifiers.json`` are.
        split: name of the split, such as "train" or "test".

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError, TypeError: a file is damaged, or the files contradict each other; the message
            names the folder or the file.
    """
    sets = read_official_sets(folder, split)
    if len(sets) == 1:
        return next(iter(sets.values()))
    parts = list(sets.values())
    identifiers = [data.puzzle_identifiers for data in parts]
    return concatenate(
        parts, identifiers, parts[0].metadata.num_puzzle_identifiers, tuple(sets.keys())
    )


def read_official_sets(folder: str | PathLike[str], split: str = "train") -> dict[str, PuzzleSet]:
    """Reads one split, each of its sets by itself; see ``read_official``.

    Totals are counted from the arrays: the official Sudoku builder writes the number of groups
    for the number of puzzles, so that ``total_puzzles`` and the mean are not compared.

    Raises:
        OSError, ValueError, TypeError: as ``read_official``.
    """
    home = Path(folder) / split
    metadata = _read_metadata(home / "dataset.json")
    sets = {name: _read_set(home, name, metadata) for name in metadata.sets}
    groups = sum(data.metadata.total_groups for data in sets.values())
    if groups != metadata.total_groups:
        raise ValueError(
            f"{home}: total_groups of dataset.json must be {groups} as the arrays say; "
            f"got {metadata.total_groups}"
        )
    return sets


def _read_metadata(path: Path) -> PuzzleMetadata:
    found = load_object(path.read_bytes(), f"{path}:")
    names = {field.name for field in fields(PuzzleMetadata)}
    missing, unknown = names - _OPTIONAL - found.keys(), found.keys() - names
    if missing or unknown:
        wrong = f"{sorted(missing)} missing" if missing else f"{sorted(unknown)} unknown"
        raise ValueError(f"{path}: the fields of the official dataset.json are required; {wrong}")
    for name, value in found.items():
        _check_field(path, name, value)
    return PuzzleMetadata(**{**found, "sets": tuple(found["sets"])})


def _check_field(path: Path, name: str, value: Any) -> None:
    if name == "sets":
        names = value if isinstance(value, list) else []
        # Names become parts of file names.
        good = bool(names) and all(isinstance(n, str) and Path(n).name == n for n in names)
        wanted = "a list of plain names, each once"
        good = good and len({*names}) == len(names)
    elif name == "mean_puzzle_examples":
        good, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    elif name == "ignore_label_id" and value is None:
        return
    else:
        good, wanted = type(value) is int, "an integer"
    if not good:
        raise ValueError(f"{path}: {name} must be {wanted}; got {type(value).__name__}")


def _read_set(home: Path, name: str, metadata: PuzzleMetadata) -> PuzzleSet:
    inputs, labels = (_load(home / f"{name}__{field}.npy", "r") for field in MAPPED)
    own_ids, puzzle_indices, group_indices = (
        _load(home / f"{name}__{field}.npy", None) for field in INDICES
    )
    puzzles = len(puzzle_indices) - 1
    own = replace(
        metadata,
        sets=(name,),
        total_puzzles=puzzles,
        total_groups=len(group_indices) - 1,
        mean_puzzle_examples=len(inputs) / max(1, puzzles),
    )
    try:
        return PuzzleSet(inputs, labels, own_ids, puzzle_indices, group_indices, own)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{home} ({name}): {error}") from None


def _load(path: Path, mmap_mode: Any) -> Array:
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: a complete .npy array is required; got {reason}") from None
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise ValueError(f"{path}: a .npy array is required; got something else")
    return array


def read_identifiers(folder: str | PathLike[str]) -> list[str]:
    """Reads the name of each puzzle identifier from ``identifiers.json``.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is no JSON list of strings.
    """
    path = Path(folder) / "identifiers.json"
    names = loads(path.read_bytes(), f"{path}:")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: a list of strings is required; got {type(names).__name__}")
    return names


def read_test_puzzles(folder: str | PathLike[str]) -> dict[str, Any]:
    """Reads ``test_puzzles.json``: name -> {"train": [...], "test": [{"input", "output"}, ...]}.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is no JSON object of tasks.
    """
    path = Path(folder) / "test_puzzles.json"
    found = load_object(path.read_bytes(), f"{path}:")
    tasks = found.values()
    if not all(isinstance(task, dict) and isinstance(task.get("test"), list) for task in tasks):
        raise ValueError(f"{path}: an object of tasks, each with a list 'test', is required")
    return found


def write_official(
    folder: str | PathLike[str],
    split: str,
    sets: PuzzleSet | Mapping[str, PuzzleSet],
    *,
    identifiers: Sequence[str] | None = None,
    test_puzzles: Mapping[str, Any] | None = None,
) -> None:
    """Writes one split in the official layout; the official code reads it.

    Args:
        folder: made if it does not exist; files of the same names are replaced.
        split: name of the split.
        sets: the split, or its parts by name; a single one is named "all".
        identifiers: names of the puzzle identifiers; by default one "<blank>" if there is no
            other identifier, and no file otherwise.
        test_puzzles: ARC's tasks, or None for no file.

    Raises:
        OSError: a file cannot be written.
        ValueError: names or sizes contradict each other.
    """
    parts = {"all": sets} if isinstance(sets, PuzzleSet) else dict(sets)
    if not parts or any(Path(name).name != name for name in parts):
        raise ValueError(f"write_official: sets need plain names; got {list(parts)}")
    metadata = _joint_metadata(parts)
    num = metadata.num_puzzle_identifiers
    if identifiers is None and num == 1:
        identifiers = ["<blank>"]
    if identifiers is not None and len(identifiers) != num:
        raise ValueError(f"write_official: {num} identifiers are required; got {len(identifiers)}")
    home = Path(folder) / split
    home.mkdir(parents=True, exist_ok=True)
    for name, data in parts.items():
        for field in (*MAPPED, *INDICES):
            array = getattr(data, field)
            _replace(home / f"{name}__{field}.npy", partial(_save, array))
    if identifiers is not None:
        _write_json(Path(folder) / "identifiers.json", list(identifiers))
    if test_puzzles is not None:
        _write_json(Path(folder) / "test_puzzles.json", dict(test_puzzles))
    # Last: a folder without it is incomplete for every reader.
    _write_json(home / "dataset.json", asdict(metadata))


def _joint_metadata(parts: Mapping[str, PuzzleSet]) -> PuzzleMetadata:
    every = [data.metadata for data in parts.values()]
    kept = ("vocab_size", "seq_len", "num_puzzle_identifiers", *sorted(_OPTIONAL))
    for name in kept:
        values = [getattr(one, name) for one in every]
        if len({*values}) > 1:
            raise ValueError(f"write_official: {name} must be equal in all sets; got {values}")
    puzzles = sum(one.total_puzzles for one in every)
    return replace(
        every[0],
        total_groups=sum(one.total_groups for one in every),
        total_puzzles=puzzles,
        mean_puzzle_examples=sum(map(len, parts.values())) / puzzles,
        sets=tuple(parts),
    )


def _save(array: Array, file: BinaryIO) -> None:
    np.save(file, array, allow_pickle=False)


def _write_json(path: Path, value: Any) -> None:
    _replace(path, lambda file: file.write(json.dumps(value).encode()))


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file beside its place first: the data may be a mapping of the file it replaces."""
    beside = path.with_name(f"{path.name}.tmp")
    with open(beside, "wb") as file:
        write(file)
    beside.replace(path)
