"""Reads data sets to their end, and says what is in them and what is wrong."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trm_fast.cli._tables import printable
from trm_fast.data.puzzles import PuzzleSet
from trm_fast.data.puzzles.arc_grids import SIDE, VOCAB_SIZE
from trm_fast.data.puzzles.forms import (
    KeysOf,
    Repeats,
    arc_keys,
    exact_keys,
    maze_keys,
    repeats,
    sudoku_keys,
)
from trm_fast.data.puzzles.maze import GOAL, PATH, START, WALL, shortest_path
from trm_fast.data.puzzles.sudoku import BOXES, check_sudoku
from trm_fast.data.sources.official import read_official_sets, read_test_puzzles
from trm_fast.data.sources.pairs import (
    MAZE_ALPHABET,
    SUDOKU_SIZES,
    PairFormat,
    maze_format,
    pair_rows,
    pairs_of_rows,
    sudoku_format,
)
from trm_fast.data.sources.rows import Row, RowGuard
from trm_fast.data.sources.splits import SPLITS, check_alike, is_official, split_files
from trm_fast.data.synthetic.listops import WORDS, evaluate_listops, listops_tokens

Array = NDArray[Any]

_SHOWN = 20  # bad rows that are listed one by one
_CHUNK = 1 << 14  # rows that are looked at together, fewer of long ones
_CHUNK_TOKENS = 1 << 21
_KIND_ROWS = 1000  # rows by which the kind of a file is told
_PADDING = 64  # a file of ListOps may have so many tokens with padding for each without


@dataclass
class _Part:
    """A split or a file: what was read, and what is wrong in it.

    Args:
        name: how it is called.
        kind: of puzzles.
        data: the good rows; None if there is none.
        rows: how many were read, the bad ones too; 0 if the data has no rows of text.
        remarks: further words on them.
        faults: "place: reason" of the first ones.
        bad: how many there are.
    """

    name: str
    kind: str = "puzzles"
    data: PuzzleSet | None = None
    rows: int = 0
    remarks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    bad: int = 0

    def fault(self, place: str, reason: str) -> None:
        self.bad += 1
        if len(self.faults) < _SHOWN:
            self.faults.append(f"{place}: {reason}")

    def source(self, example: int) -> str:
        """Names an example by file and line, or by its number."""
        if self.data is not None and self.data.sources:
            return self.data.sources[example]
        return f"{self.name}: example {example}"


class _Collector(RowGuard):
    """Collects bad rows, however many there are."""

    def __init__(self, part: _Part) -> None:
        super().__init__(part.name)
        self.part = part

    def bad(self, line: int, reason: str, raw: bytes) -> None:
        self.counts.read += 1
        self.part.fault(f"{self.name}:{line}", reason)

    def __exit__(self, kind: object, *_: object) -> None:
        pass


def check(path: Path) -> int:
    """Prints what is in a data set and what is wrong with it.

    Returns:
        0, or 1 if something is wrong.

    Raises:
        ValueError, OSError: it cannot be read at all.
    """
    parts = list(_parts(path))
    for part in parts:
        _check_rules(part)
    # Expressions of ListOps are padded to the longest of their file.
    fixed = [part.data for part in parts if part.data is not None and part.kind != "listops"]
    try:
        check_alike(path, fixed)
    except ValueError as error:
        parts[-1].fault(str(path), str(error).removeprefix(f"{path}: "))
    shared, summary = _shared(parts)
    for part in parts:
        print(printable(f"{part.name}: {part.kind}, {'; '.join(_described(part))}"))
    by_name = {part.name: part for part in parts}
    if len(by_name) > 1:
        print(printable(f"questions of the test: {summary}"))
    faults = list(chain.from_iterable(part.faults for part in parts))[:_SHOWN]
    for fault in faults:
        print(printable(fault))
    bad = sum(part.bad for part in parts)
    if bad > len(faults):
        print(f"and {bad - len(faults):,} more")
    wrong = [f"{bad:,} bad"] * (bad > 0) + [f"{shared.seen:,} in train and test"] * (
        shared.seen > 0
    )
    print(", ".join(wrong) or "nothing is wrong")
    return int(bool(wrong))


def _parts(path: Path) -> Iterator[_Part]:
    if path.is_file():
        yield _read_rows(path)
        return
    if not path.is_dir():
        raise ValueError(f"data check: PATH must be a file or directory with data; got {path}")
    if is_official(path):
        for split in SPLITS:
            yield from _read_official(path, split)
        return
    yield from map(_read_rows, split_files(path).values())


def _read_official(folder: Path, split: str) -> Iterator[_Part]:
    part = _Part(split)
    try:
        sets = read_official_sets(folder, split)
        if (folder / "test_puzzles.json").exists():
            read_test_puzzles(folder)
    except (ValueError, TypeError) as error:
        part.fault(str(folder / split), str(error))
        yield part
        return
    for name, data in sets.items():
        part = _Part(split if len(sets) == 1 else f"{split} ({name})", data=data)
        meta = data.metadata
        puzzles = f"{meta.total_puzzles:,} puzzles in {meta.total_groups:,} groups"
        part.remarks.append(f"{len(data):,} examples of {puzzles}")
        part.kind = _kind_of(data)
        yield part


def _kind_of(data: PuzzleSet) -> str:
    meta = data.metadata
    if (meta.seq_len, meta.vocab_size) == (SIDE**2, VOCAB_SIZE):
        return "arc"
    size, labels = SUDOKU_SIZES.get(meta.seq_len), data.labels[next(_chunks(data))]
    # A maze of 4 x 4 has the sizes of a Sudoku, but walls in its labels.
    if size is not None and meta.vocab_size == size + 2 and (labels > 1).all():
        return "sudoku"
    is_square = int(meta.seq_len**0.5) ** 2 == meta.seq_len
    if meta.vocab_size == len(MAZE_ALPHABET) + 1 and is_square and (labels == WALL).any():
        return "maze"
    return "puzzles"


def _read_rows(path: Path) -> _Part:
    """Reads a file of questions and answers; most of its first rows decide of what kind it is."""
    part = _Part(path.name)
    first = islice(
        (row.fields["question"] for row in pair_rows(path) if not row.reason), _KIND_ROWS
    )
    kinds = Counter(map(_kind_of_question, first)).most_common(1)
    part.kind = kinds[0][0] if kinds else "puzzles"
    guard = _Collector(part)
    try:
        if part.kind == "listops":
            part.data = _listops(pair_rows(path), guard)
        elif part.kind == "puzzles":
            alphabet = PairFormat(_alphabet(path))
            part.data = pairs_of_rows(pair_rows(path), lambda _: alphabet, guard)
        else:
            form = sudoku_format if part.kind == "sudoku" else maze_format
            part.data = pairs_of_rows(pair_rows(path), form, guard)
    except ValueError:
        # Without any row there is nothing to say.
        if not part.bad:
            raise
    counts = guard.counts
    part.rows = counts.read
    if counts.duplicated:
        place = counts.first_duplicate
        part.remarks.append(f"{counts.duplicated:,} repeat an earlier question ({place})")
    return part


def _kind_of_question(question: str) -> str:
    letters = {*question}
    if len(question) in SUDOKU_SIZES and letters <= {*"0123456789."}:
        return "sudoku"
    if letters <= {*MAZE_ALPHABET} and {"S", "G"} <= letters:
        return "maze"
    return "listops" if question.split(" ")[0] in WORDS[11:15] else "puzzles"


def _alphabet(path: Path) -> str:
    letters: set[str] = set()
    for row in pair_rows(path):
        if row.reason is None:
            letters.update(row.fields["question"], row.fields["answer"])
    return "".join(sorted(letters)) or "?"


def _listops(rows: Iterator[Row], guard: _Collector) -> PuzzleSet:
    """Checks expressions and their values; the label of an expression is its value."""
    found: list[tuple[str, str, int]] = []
    for row in rows:
        reason = row.reason or _listops_reason(row.fields["question"], row.fields["answer"])
        if reason is not None:
            guard.bad(row.line, reason, row.raw)
            continue
        guard.good()
        found.append((row.fields["question"], row.fields["answer"], row.line))
    if not found:
        raise ValueError(f"{guard.name}: at least one good row is required; got none")
    lengths = [len(question.split()) for question, _, _ in found]
    length = max(lengths)
    if length * len(found) > _PADDING * sum(lengths):
        line = found[lengths.index(length)][2]
        raise ValueError(
            f"{guard.name}:{line}: question must have at most {_PADDING} times the mean length, as "
            f"the others are padded to it; got {length} words"
        )
    inputs = np.stack([listops_tokens(question, length) for question, _, _ in found])
    labels = np.zeros_like(inputs)
    labels[:, 0] = [int(answer) + 1 for _, answer, _ in found]
    sources = [f"{guard.name}:{line}" for _, _, line in found]
    return PuzzleSet.of_pairs(inputs, labels, len(WORDS), sources=sources)


def _listops_reason(question: str, answer: str) -> str | None:
    try:
        tokens = listops_tokens(question, max(1, len(question.split())))
        value = int(evaluate_listops(tokens[None], threads=1)[0])
    except ValueError:
        return "question must be one expression of ListOps"
    return None if answer == str(value) else "answer must be the value of the expression"


def _check_rules(part: _Part) -> None:
    """Checks the answers by the rules of the puzzles."""
    if part.data is None or part.kind not in _RULES:
        return
    data = part.data
    for rows in _chunks(data):
        for mask, reason in _RULES[part.kind](data.inputs[rows], data.labels[rows]):
            for place in np.flatnonzero(mask):
                part.fault(part.source(rows.start + int(place)), reason)


def _chunks(data: PuzzleSet) -> Iterator[slice]:
    """Yields pieces of a set, so that memory holds a part of a mapped one only."""
    size = max(1, min(_CHUNK, _CHUNK_TOKENS // max(1, data.metadata.seq_len)))
    for start in range(0, len(data), size):
        yield slice(start, min(start + size, len(data)))


def _sudoku_faults(inputs: Array, labels: Array) -> Iterator[tuple[Array, str]]:
    # As numbers with a sign: the token of padding, 0, becomes no digit.
    given, answer = inputs.astype(np.int16) - 1, labels.astype(np.int16) - 1
    lawful = check_sudoku(answer)
    yield ~lawful, "answer must have every digit once in each row, column and box"
    yield lawful & ~check_sudoku(answer, given), "answer must repeat the question's givens"


def _maze_faults(inputs: Array, labels: Array) -> Iterator[tuple[Array, str]]:
    side = int(inputs.shape[1] ** 0.5)
    known = ((inputs >= WALL) & (inputs <= GOAL)).all(axis=1)
    known &= ((inputs == START).sum(axis=1) == 1) & ((inputs == GOAL).sum(axis=1) == 1)
    yield ~known, "question must have walls, free cells, one start and one goal"
    kept = (labels == inputs) | ((inputs == WALL + 1) & (labels == PATH))
    whole = known & kept.all(axis=1)
    yield known & ~whole, "answer must repeat the question and mark free cells only"
    marked = labels == PATH
    # If all but the marked cells were walls, the way would still be there, and no shorter one.
    alone = np.where(marked, WALL + 1, np.where(inputs == WALL + 1, WALL, inputs))
    shortest, along = np.full(len(inputs), -1), np.full(len(inputs), -1)
    if whole.any():
        shortest[whole] = shortest_path(inputs[whole], side, side)[1]
        along[whole] = shortest_path(alone[whole], side, side)[1]
    steps = marked.sum(axis=1) + 1
    yield whole & (along != steps), "answer must mark one path from start to goal"
    right = whole & (along == steps)
    yield right & (steps != shortest), "answer must mark a shortest path"


_RULES = {"sudoku": _sudoku_faults, "maze": _maze_faults}


def _described(part: _Part) -> list[str]:
    """Says how many rows there are and what they are like."""
    rows = [f"{part.rows:,} rows, {part.rows - part.bad:,} good and {part.bad:,} bad"]
    return [*(rows if part.rows else []), *part.remarks, *_sizes(part)]


def _sizes(part: _Part) -> list[str]:
    """Says how long the examples are, and how much of the vocabulary they use."""
    if part.data is None:
        return []
    data, meta = part.data, part.data.metadata
    used: set[int] = set()
    lengths, blanks = [], []
    for rows in _chunks(data):
        inputs, labels = data.inputs[rows], data.labels[rows]
        for tokens in (inputs, labels):
            used.update(np.unique(tokens).tolist())
        lengths.append((inputs != meta.pad_id).sum(axis=1))
        blanks.append((inputs > 1).sum(axis=1))
    used = {token for token in used if 0 <= token < meta.vocab_size and token != meta.pad_id}
    shown = [f"{meta.seq_len:,} tokens each"]
    longest = np.concatenate(lengths)
    if longest.min() < meta.seq_len:
        shown.append(f"{longest.min()} to {longest.max()} without padding")
    shown.append(f"vocabulary {meta.vocab_size:,}, of which {len(used)} and padding are used")
    if part.kind == "sudoku":
        clues = np.concatenate(blanks)
        shown.append(f"{clues.min()} to {clues.max()} clues")
    return shown


def _shared(parts: list[_Part]) -> tuple[Repeats, str]:
    """Counts the test questions that are in the training data too, in the forms that augmentation
    draws; says how many, and names the first."""
    whole = [part for part in parts if part.data is not None]
    train, test = ([part for part in whole if part.name.startswith(split)] for split in SPLITS)
    keys_of = _keys_of([*train, *test])
    sets = [[part.data for part in split if part.data is not None] for split in (train, test)]
    found = repeats(sets[0], sets[1], keys_of)
    form = "" if keys_of is exact_keys else ", or a form of one that augmentation draws"
    if found.test is None or found.train is None:
        return found, f"none is in train{form}"
    named = [
        split[index].source(example)
        for split, (index, example) in ((test, found.test), (train, found.train))
    ]
    return found, f"{found.seen:,} are in train too{form}, first: {' repeats '.join(named)}"


def _keys_of(parts: list[_Part]) -> KeysOf:
    """Returns what tells which examples are forms of each other."""
    kinds = {(part.kind, part.data.metadata.seq_len) for part in parts if part.data is not None}
    kind, length = kinds.pop() if len(kinds) == 1 else ("puzzles", 0)
    side = isqrt(length)
    if kind == "sudoku" and side in BOXES:
        return sudoku_keys(side)
    if kind == "maze" and side * side == length:
        return maze_keys(side, side)
    return arc_keys if kind == "arc" else exact_keys
