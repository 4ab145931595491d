"""Readers of data sets and settings, with valid files for them."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from trm_fast.cli._settings import read_options
from trm_fast.cli._settings_file import check_file
from trm_fast.data import (
    ArcVoting,
    PuzzleSet,
    encode_arc,
    load_hub,
    read_arc_folder,
    read_identifiers,
    read_jsonl,
    read_maze_csv,
    read_official,
    read_pairs,
    read_sudoku_csv,
    read_test_puzzles,
    write_official,
)
from trm_fast.data.sources.npy import read_npy
from trm_fast.recipes import load

from .reader import Reader, command

SUDOKUS = (("1030341021434301", "1234341221434321"), ("0030341021434301", "1234341221434321"))
GRID = [[0, 1], [2, 3]]
PAIR = {"input": GRID, "output": GRID}


def write_npy(folder: Path) -> None:
    np.save(folder / "a.npy", np.arange(12, dtype=np.int16).reshape(3, 4))


def read_arrays(folder: Path) -> None:
    read_npy(folder / "a.npy").sum()
    read_npy(folder / "a.npy", mapped=True).sum()


def write_csv(folder: Path) -> None:
    for split, pair in zip(("train", "test"), SUDOKUS, strict=True):
        rows = "".join(f'"{question}",{answer},7\n' for question, answer in [pair])
        (folder / f"{split}.csv").write_text(f"question,answer,rating\n{rows}")


def read_csv(folder: Path) -> None:
    bad = folder / "bad.jsonl"
    read_sudoku_csv(folder / "train.csv", on_bad="quarantine", bad_rows=bad, max_bad_fraction=1)
    read_sudoku_csv(folder / "test.csv")


def write_maze(folder: Path) -> None:
    (folder / "a.csv").write_text("q,a\n####SG###,####SG###\n#### SG##,####oSG##\n")


def check_data(folder: Path) -> None:
    command("data", "check", folder)


def write_jsonl(folder: Path) -> None:
    rows = {
        "train": ("[MAX 2 9 [MIN 4 7 ] 0 ]", "9"),
        "test": ("[SM 7 [MED 1 2 4 ] 3 ]", "2"),
    }
    for split, (question, answer) in rows.items():
        row = json.dumps({"question": question, "answer": answer})
        (folder / f"{split}.jsonl").write_text(f"{row}\n{row}\n")


def read_rows(folder: Path) -> None:
    # Both look at every file, whatever the other one says of it.
    with contextlib.suppress(ValueError):
        read_pairs(folder / "train.jsonl", "[MAXIN2947 ]0")
    read_jsonl(folder / "test.jsonl", {"question": str}, {"answer": str})


def write_folder(folder: Path) -> None:
    for split, pair in zip(("train", "test"), SUDOKUS, strict=True):
        inputs, labels = (np.array([[int(digit) + 1 for digit in text]]) for text in pair)
        data = PuzzleSet.of_pairs(inputs, labels, 6)
        write_official(folder, split, data, test_puzzles={"a": {"test": [PAIR]}})


def read_folder(folder: Path) -> None:
    with contextlib.suppress(ValueError, TypeError, OSError):
        read_official(folder, "train"), read_official(folder, "test")
    ArcVoting(read_identifiers(folder), read_test_puzzles(folder)).scores()


def write_tasks(folder: Path) -> None:
    (folder / "tasks").mkdir()
    (folder / "tasks" / "a.json").write_text(json.dumps({"train": [PAIR], "test": [PAIR]}))
    challenges = {name: {"train": [PAIR], "test": [{"input": GRID}]} for name in ("b", "c")}
    (folder / "x_challenges.json").write_text(json.dumps(challenges))
    (folder / "x_solutions.json").write_text(json.dumps({"b": [GRID], "c": [GRID]}))


def read_tasks(folder: Path) -> None:
    encode_arc([], read_arc_folder(folder), 2)


def write_cache(folder: Path) -> None:
    home = folder / "datasets--sapientinc--sudoku-extreme"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc").mkdir(parents=True)
    write_csv(home / "snapshots" / "abc")


def read_cache(folder: Path) -> None:
    for split in ("train", "test"):
        load_hub("sapientinc/sudoku-extreme", split, cache_dir=folder)


def write_settings(folder: Path) -> None:
    text = "data:\n  size: 4\n  clues: [5, 9]\n  path: ''\nout: runs/x\ntrain: {steps: 10}\n"
    (folder / "a.yaml").write_text(text)


SETTINGS: dict[str, Any] = {
    "data.size": int, "data.clues": tuple[int, int], "data.path": str, "out": str,
    "train.steps": int, "train.log_every": int,
}  # fmt: skip


def check_settings(folder: Path) -> None:
    text = (folder / "a.yaml").read_bytes().decode("utf-8", "replace")
    check_file(text, f"{folder / 'a.yaml'}:", SETTINGS)


def read_settings(folder: Path) -> None:
    read_options(load("sudoku"), ["--config", str(folder / "a.yaml")])


DATA_READERS: dict[str, Reader] = {
    "npy": Reader(write_npy, read_arrays),
    "csv": Reader(write_csv, read_csv),
    "maze": Reader(write_maze, lambda folder: read_maze_csv(folder / "a.csv")),
    "jsonl": Reader(write_jsonl, read_rows),
    "official": Reader(write_folder, read_folder),
    "arc": Reader(write_tasks, read_tasks),
    "hub": Reader(write_cache, read_cache),
    "check_csv": Reader(write_csv, check_data),
    "check_jsonl": Reader(write_jsonl, check_data),
    "check_official": Reader(write_folder, check_data),
    "yaml": Reader(write_settings, check_settings),
    "settings": Reader(write_settings, read_settings),
}
