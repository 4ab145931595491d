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
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trm_fast import _json
from trm_fast._json import read_object
from trm_fast._paths import expanded
from trm_fast.data.puzzles import PuzzleMetadata, PuzzleSet
from trm_fast.data.puzzles.arc_corpus import pairs_of
from trm_fast.data.puzzles.merging import concatenate
from trm_fast.data.puzzles.puzzle_set import Array
from trm_fast.data.sources.npy import read_npy

MAPPED = ("inputs", "labels")
INDICES = ("puzzle_identifiers", "puzzle_indices", "group_indices")
# What HRM's builder does not write, or what the arrays say anyway, may be missing.
_SPECIAL = {"pad_id", "ignore_label_id", "blank_identifier_id"}
_COUNTED = {"total_groups", "total_puzzles", "mean_puzzle_examples"}
_IDS = 1 << 31  # ids are int32 in every file of the official code


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
    for the number of puzzles, and HRM's builder no number of puzzles, so that ``total_puzzles`` and
    the mean are not compared. Where ``identifiers.json`` is there, it must name all identifiers.

    Raises:
        OSError, ValueError, TypeError: as ``read_official``.
    """
    home = expanded(folder) / split
    metadata, said = _read_metadata(home / "dataset.json")
    _check_identifiers(expanded(folder), metadata)
    sets = {name: _read_set(home, name, metadata) for name in metadata.sets}
    groups = sum(data.metadata.total_groups for data in sets.values())
    if said.get("total_groups", groups) != groups:
        raise ValueError(
            f"{home}: total_groups of dataset.json must be {groups} as the arrays say; "
            f"got {said['total_groups']}"
        )
    return sets


def _check_identifiers(folder: Path, metadata: PuzzleMetadata) -> None:
    path = folder / "identifiers.json"
    if not path.exists():
        return
    wanted, found = metadata.num_puzzle_identifiers, len(read_identifiers(folder))
    if found != wanted:
        raise ValueError(
            f"{path}: a name for each of the {wanted} identifiers of dataset.json is required; "
            f"got {found}"
        )


def _read_metadata(path: Path) -> tuple[PuzzleMetadata, dict[str, Any]]:
    """Returns what dataset.json says; numbers that are counted later stand as 0 at first."""
    found = read_object(path)
    names = {field.name for field in fields(PuzzleMetadata)}
    missing, unknown = names - _SPECIAL - _COUNTED - found.keys(), found.keys() - names
    if missing or unknown:
        wrong = f"{sorted(missing)} missing" if missing else f"{sorted(unknown)} unknown"
        raise ValueError(f"{path}: the fields of the official dataset.json are required; {wrong}")
    for name, value in found.items():
        _check_field(path, name, value)
    counted = dict.fromkeys(_COUNTED, 0)
    return PuzzleMetadata(**{**counted, **found, "sets": tuple(found["sets"])}), found


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
        least = -_IDS if name == "ignore_label_id" else 0
        if type(value) is int and not least <= value < _IDS:
            raise ValueError(f"{path}: {name} must be in [{least}, {_IDS}); got {value}")
    if not good:
        raise ValueError(f"{path}: {name} must be {wanted}; got {type(value).__name__}")


def _read_set(home: Path, name: str, metadata: PuzzleMetadata) -> PuzzleSet:
    inputs, labels = (read_npy(home / f"{name}__{field}.npy", mapped=True) for field in MAPPED)
    own_ids, puzzle_indices, group_indices = (
        read_npy(home / f"{name}__{field}.npy") for field in INDICES
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


def read_identifiers(folder: str | PathLike[str]) -> list[str]:
    """Reads the name of each puzzle identifier from ``identifiers.json``.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is no JSON list of strings.
    """
    path = expanded(folder) / "identifiers.json"
    names = _json.read(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: a list of strings is required; got {type(names).__name__}")
    return names


def read_test_puzzles(folder: str | PathLike[str]) -> dict[str, Any]:
    """Reads ``test_puzzles.json``: name -> {"train": [...], "test": [{"input", "output"}, ...]}.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is no JSON object of tasks.
    """
    path = expanded(folder) / "test_puzzles.json"
    found = read_object(path)
    for name, task in found.items():
        try:
            pairs_of(name, "test", task)
        except ValueError as error:
            raise ValueError(f"{path}: an object of tasks is required; {error}") from None
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
    home = expanded(folder) / split
    home.mkdir(parents=True, exist_ok=True)
    for name, data in parts.items():
        for field in (*MAPPED, *INDICES):
            array = getattr(data, field)
            _replace(home / f"{name}__{field}.npy", partial(_save, array))
    if identifiers is not None:
        _write_json(expanded(folder) / "identifiers.json", list(identifiers))
    if test_puzzles is not None:
        _write_json(expanded(folder) / "test_puzzles.json", dict(test_puzzles))
    # Last: a folder without it is incomplete for every reader.
    _write_json(home / "dataset.json", asdict(metadata))


def _joint_metadata(parts: Mapping[str, PuzzleSet]) -> PuzzleMetadata:
    every = [data.metadata for data in parts.values()]
    kept = ("vocab_size", "seq_len", "num_puzzle_identifiers", *sorted(_SPECIAL))
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
    # A name that nothing has: a link or a file of this name is neither followed nor written over.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "xb") as file:
            write(file)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
