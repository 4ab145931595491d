"""Rows of a question and its answer as a ``PuzzleSet``: Sudoku, mazes, and puzzles of one's own.

A question and its answer are strings of equal length over one alphabet. The token of a character
is its place in the alphabet + 1; 0 is PAD.

Source: columns and alphabets of sapientinc/sudoku-extreme and sapientinc/maze-30x30-hard-1k as read
by SamsungSAILMontreal/TinyRecursiveModels at commit e7b6871, dataset/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import isqrt
from os import fspath
from typing import Any

import numpy as np

from trm_fast.data.puzzles import PuzzleSet
from trm_fast.data.puzzles.puzzle_set import Array
from trm_fast.data.sources.rows import (
    MAX_LINE_BYTES,
    OnBad,
    Path,
    Row,
    RowCounts,
    RowGuard,
    csv_rows,
    jsonl_rows,
)

SUFFIXES = (".csv", ".jsonl", ".ndjson")
# Titles that the header of a CSV file may have instead.
SHORT = {"question": "q", "answer": "a"}
SUDOKU_SIZES = {16: 4, 36: 6, 81: 9}
MAZE_ALPHABET = "# SGo"
_CHUNK = 4096  # rows that are checked at once


@dataclass(frozen=True)
class PairFormat:
    """What questions and answers of one kind of puzzle look like.

    Args:
        alphabet: characters, each once; the token of one is its place + 1.
        blank: the character of cells that an answer fills; all other cells of a question are
            givens, which an answer repeats. None if answers need not repeat anything.
        fills: characters that an answer may have in blank cells; by default all.
        answer_only: characters that no question may have.
        aliases: characters that stand for others, such as "." for "0".

    Raises:
        ValueError: a character is given twice, or is not in the alphabet.
    """

    alphabet: str
    blank: str | None = None
    fills: str | None = None
    answer_only: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.alphabet or len({*self.alphabet}) < len(self.alphabet):
            raise ValueError("PairFormat: alphabet must have characters, each once")
        if not {*(self.blank or ""), *(self.fills or ""), *self.answer_only} <= {*self.alphabet}:
            raise ValueError("PairFormat: blank, fills and answer_only must be in the alphabet")
        keys, values = {*self.aliases}, {*self.aliases.values()}
        if any(len(key) != 1 for key in keys) or not values <= {*self.alphabet}:
            raise ValueError("PairFormat: aliases must map characters to some of the alphabet")
        if keys & {*self.alphabet}:
            raise ValueError("PairFormat: aliases must not be in the alphabet themselves")

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet) + 1

    def ids(self, characters: str) -> list[int]:
        return [self.alphabet.index(character) + 1 for character in characters]


# The format for questions of some length, or the reason why there is none.
FormatOf = Callable[[int], "PairFormat | str"]


def sudoku_format(length: int) -> PairFormat | str:
    """The format of Sudokus of 16, 36 or 81 cells: token = digit + 1, blank ('0' or '.') = 1."""
    if length not in SUDOKU_SIZES:
        return f"question must have 16, 36 or 81 characters; got {length}"
    digits = "123456789"[: SUDOKU_SIZES[length]]
    return PairFormat("0" + digits, blank="0", fills=digits, aliases={".": "0"})


def maze_format(length: int) -> PairFormat | str:
    """The format of square mazes: wall '#', free ' ', start 'S', goal 'G', path 'o' = 1 to 5."""
    if not length or isqrt(length) ** 2 != length:
        return f"question must have a square number of characters; got {length}"
    return PairFormat(MAZE_ALPHABET, blank=" ", fills=" o", answer_only="o")


class _Codec:
    """Turns strings of one format and length into tokens, many rows at once."""

    def __init__(self, form: PairFormat, length: int) -> None:
        self.form, self.length = form, length
        self.dtype = np.uint8 if form.vocab_size <= 256 else np.uint16
        # One entry per code point; 0 marks what is not in the alphabet.
        self._table = np.zeros(0x110000, self.dtype)
        characters = [*form.alphabet, *form.aliases]
        ids = form.ids(form.alphabet + "".join(form.aliases.values()))
        self._table[[ord(character) for character in characters]] = ids

    def reason(self, question: str, answer: str) -> str | None:
        for name, text in (("question", question), ("answer", answer)):
            if len(text) != self.length:
                return f"{name} must have {self.length} characters; got {len(text)}"
        return None

    def tokens(self, texts: list[str]) -> Array:
        codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4")
        tokens: Array = self._table[codes].reshape(len(texts), self.length)
        return tokens

    def faults(self, question: Array, answer: Array) -> list[tuple[Array, str]]:
        """What can be wrong with rows of tokens: a mask of the rows, and the reason."""
        form = self.form
        asked = "".join(c for c in form.alphabet if c not in form.answer_only)
        not_asked = (question == 0) | np.isin(question, form.ids(form.answer_only))
        faults = [
            (not_asked, f"question must consist of '{asked}'"),
            (answer == 0, f"answer must consist of '{form.alphabet}'"),
        ]
        if form.blank is not None:
            open_cells = question == form.ids(form.blank)[0]
            fills = form.alphabet if form.fills is None else form.fills
            unfilled = open_cells & ~np.isin(answer, form.ids(fills))
            faults += [
                (~open_cells & (answer != question), "answer must repeat the question's givens"),
                (unfilled, f"answer must fill blank cells with '{fills}'"),
            ]
        return [(mask.any(axis=1), reason) for mask, reason in faults]


def pairs_of_rows(
    rows: Iterable[Row],
    format_of: FormatOf,
    guard: RowGuard,
    *,
    question: str = "question",
    answer: str = "answer",
) -> PuzzleSet:
    """Checks and encodes rows; the first of an acceptable length decides the length of all.

    Args:
        rows: with string fields of the two names.
        format_of: the format for questions of some length, or why there is none.
        guard: decides on bad rows; its counts are filled in, duplicates too.
        question, answer: names of the fields.

    Raises:
        ValueError: as the guard decides, or no row is good.
    """
    codec: _Codec | None = None
    inputs, labels, lines = [], [], []
    with guard:
        for chunk in _chunks(rows):
            reasons: list[str | None] = []
            for row in chunk:
                reason = row.reason
                if reason is None and codec is None:
                    form = format_of(len(row.fields[question]))
                    if isinstance(form, PairFormat):
                        codec = _Codec(form, len(row.fields[question]))
                    else:
                        reason = form
                if reason is None and codec is not None:
                    reason = codec.reason(row.fields[question], row.fields[answer])
                reasons.append(reason)
            if codec is not None:
                tokens = _encode(codec, chunk, reasons, question, answer)
            good = _sort_out(chunk, reasons, guard)
            if good:
                inputs.append(tokens[0])
                labels.append(tokens[1])
                lines += good
    if codec is None or not inputs:
        raise ValueError(f"{guard.name}: at least one good row is required; got none")
    name = guard.name
    sources = [f"{name}:{line}" for line in lines]
    asked = np.concatenate(inputs)
    _count_duplicates(asked, sources, guard.counts)
    return PuzzleSet.of_pairs(asked, np.concatenate(labels), codec.form.vocab_size, sources=sources)


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _encode(
    codec: _Codec, chunk: list[Row], reasons: list[str | None], question: str, answer: str
) -> tuple[Array, Array]:
    """Tokens of the good rows; fills in the reasons of those whose tokens are wrong."""
    places = [i for i, reason in enumerate(reasons) if reason is None]
    asked = codec.tokens([chunk[i].fields[question] for i in places])
    answered = codec.tokens([chunk[i].fields[answer] for i in places])
    bad = np.zeros(len(places), dtype=bool)
    for mask, reason in codec.faults(asked, answered):
        for i in np.flatnonzero(mask & ~bad):
            reasons[places[i]] = reason
        bad |= mask
    return asked[~bad], answered[~bad]


def _sort_out(chunk: list[Row], reasons: list[str | None], guard: RowGuard) -> list[int]:
    """Hands bad rows to the guard, in order; returns the lines of the good ones."""
    good = []
    for row, reason in zip(chunk, reasons, strict=True):
        if reason is None:
            guard.good()
            good.append(row.line)
        else:
            guard.bad(row.line, reason, row.raw)
    return good


def _count_duplicates(inputs: Array, sources: list[str], counts: RowCounts) -> None:
    # A row of tokens as one opaque value, so that equal rows can be found by sorting.
    whole = np.dtype((np.void, inputs.shape[1] * inputs.itemsize))
    rows = np.ascontiguousarray(inputs).view(whole)[:, 0]
    _, first, which = np.unique(rows, return_index=True, return_inverse=True)
    repeats = np.flatnonzero(first[which] != np.arange(len(rows)))
    counts.duplicated = len(repeats)
    if len(repeats):
        at = int(repeats[0])
        counts.first_duplicate = f"{sources[at]} repeats {sources[int(first[which[at]])]}"


def read_pairs(
    path: Path,
    alphabet: str | PairFormat,
    *,
    question: str = "question",
    answer: str = "answer",
    length: int | None = None,
    on_bad: OnBad = "error",
    bad_rows: Path | None = None,
    max_bad_fraction: float = 0.01,
    max_line_bytes: int = MAX_LINE_BYTES,
    counts: RowCounts | None = None,
) -> PuzzleSet:
    """Reads questions and answers from a CSV (.csv) or JSONL (.jsonl, .ndjson) file.

    Args:
        path: the file; other columns or fields are left alone.
        alphabet: the characters, or a ``PairFormat``, which can also require that answers repeat
            the givens of their question.
        question, answer: names of the two columns or fields; a CSV file may call columns of the
            default names "q" and "a".
        length: characters of every question and answer; by default those of the first row.
        on_bad, bad_rows, max_bad_fraction, max_line_bytes: see ``trm_fast.data.read_jsonl``.
        counts: filled in; says what became of the rows and how many questions come twice.

    Returns:
        Every row a puzzle of its own, token = place in the alphabet + 1, with sources.

    Raises:
        OSError: the file cannot be read, or ``bad_rows`` not written.
        ValueError: "file:line: reason" of a bad row, too many of them, or none that is good.
    """
    form = alphabet if isinstance(alphabet, PairFormat) else PairFormat(alphabet)

    def format_of(found: int) -> PairFormat | str:
        if found == (length or found) and found:
            return form
        return f"question must have {length or 'some'} characters; got {found}"

    rows = pair_rows(path, question, answer, max_line_bytes=max_line_bytes)
    guard = RowGuard(fspath(path), on_bad, bad_rows, max_bad_fraction, counts)
    return pairs_of_rows(rows, format_of, guard, question=question, answer=answer)


def pair_rows(
    path: Path,
    question: str = "question",
    answer: str = "answer",
    *,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Row]:
    """Yields the rows of a .csv, .jsonl or .ndjson file of questions and answers, good or bad.

    Raises:
        OSError, ValueError: as ``csv_rows`` and ``jsonl_rows``, or the name ends otherwise.
    """
    name = fspath(path).lower()
    if not name.endswith(SUFFIXES):
        raise ValueError(f"{fspath(path)}: a .csv, .jsonl or .ndjson file is required")
    if name.endswith(".csv"):
        return csv_rows(path, (question, answer), aliases=SHORT, max_line_bytes=max_line_bytes)
    fields: dict[str, Any] = {question: str, answer: str}
    return jsonl_rows(path, fields, max_line_bytes=max_line_bytes)


def read_sudoku_csv(
    path: Path,
    *,
    on_bad: OnBad = "error",
    bad_rows: Path | None = None,
    max_bad_fraction: float = 0.01,
    max_line_bytes: int = MAX_LINE_BYTES,
    counts: RowCounts | None = None,
    name: str | None = None,
) -> PuzzleSet:
    """Reads Sudokus of 16, 36 or 81 cells from a CSV file with the columns question and answer,
    or q and a.

    Blank cells are '0' or '.'; an answer has digits only and repeats the givens. Whether it obeys
    the rules of Sudoku is not checked.

    Args:
        path: the file, as that of Sudoku-Extreme (source,question,answer,rating).
        on_bad, bad_rows, max_bad_fraction, max_line_bytes, counts: as for ``read_pairs``.
        name: how messages and sources call the file, by default by its path.

    Returns:
        Every row a puzzle of its own, token = digit + 1, blank 1, vocabulary size + 2.

    Raises:
        OSError, ValueError: as ``read_pairs``.
    """
    rows = csv_rows(path, ("question", "answer"), aliases=SHORT, max_line_bytes=max_line_bytes)
    guard = RowGuard(name or fspath(path), on_bad, bad_rows, max_bad_fraction, counts)
    return pairs_of_rows(rows, sudoku_format, guard)


def read_maze_csv(
    path: Path,
    *,
    on_bad: OnBad = "error",
    bad_rows: Path | None = None,
    max_bad_fraction: float = 0.01,
    max_line_bytes: int = MAX_LINE_BYTES,
    counts: RowCounts | None = None,
    name: str | None = None,
) -> PuzzleSet:
    """Reads square mazes from a CSV file with the columns question and answer, or q and a.

    An answer repeats the walls '#', start 'S' and goal 'G' of its question and marks the path with
    'o' in free cells ' '.

    Args:
        path: the file, as that of Maze-Hard (source,question,answer,rating).
        on_bad, bad_rows, max_bad_fraction, max_line_bytes, counts, name: as for
            ``read_sudoku_csv``.

    Returns:
        Every row a puzzle of its own, tokens "# SGo" = 1 to 5, vocabulary 6.

    Raises:
        OSError, ValueError: as ``read_pairs``.
    """
    rows = csv_rows(path, ("question", "answer"), aliases=SHORT, max_line_bytes=max_line_bytes)
    guard = RowGuard(name or fspath(path), on_bad, bad_rows, max_bad_fraction, counts)
    return pairs_of_rows(rows, maze_format, guard)
