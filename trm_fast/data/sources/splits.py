"""The two splits of a data set in a directory, found alike by training and by its checks."""

from collections.abc import Sequence
from pathlib import Path

from trm_fast.data.puzzles import PuzzleSet
from trm_fast.data.sources.pairs import SUFFIXES

SPLITS = ("train", "test")


def is_official(folder: Path) -> bool:
    """Returns whether a directory holds data in the official layout, or a part of it."""
    return any((folder / split / "dataset.json").exists() for split in SPLITS)


def split_files(folder: Path) -> dict[str, Path]:
    """Returns the file of each split: train and test, each as .csv, .jsonl or .ndjson.

    Raises:
        ValueError: a split has none of them, or several.
    """
    found = {}
    for split in SPLITS:
        files = [folder / f"{split}{suffix}" for suffix in SUFFIXES]
        there = [path for path in files if path.exists()]
        if len(there) != 1:
            names = " and ".join(path.name for path in there) or "none"
            raise ValueError(
                f"{folder}: either train/dataset.json and test/dataset.json are required, or one "
                f"file {split}.csv, {split}.jsonl or {split}.ndjson; got {names}"
            )
        found[split] = there[0]
    return found


def check_alike(folder: str | Path, sets: Sequence[PuzzleSet]) -> None:
    """Checks that the parts of a data set fit one model.

    Raises:
        ValueError: their sequences or vocabularies differ.
    """
    for name in ("seq_len", "vocab_size"):
        values = [getattr(data.metadata, name) for data in sets]
        if len({*values}) > 1:
            raise ValueError(f"{folder}: {name} must be equal in train and test; got {values}")
