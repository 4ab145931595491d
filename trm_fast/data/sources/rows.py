"""Rows of CSV and JSONL files, read strictly: a bad row stops the reader or goes into quarantine.

A row is one physical line, so that every message can name it as ``file:line``; messages never
contain a row's content. A byte order mark at the start of a file and CRLF line ends are accepted.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BufferedReader
from os import PathLike, fspath
from typing import Any, Literal, NamedTuple, TextIO

from trm_fast._files import open_file, open_in_place
from trm_fast._json import load_object
from trm_fast._paths import expanded

OnBad = Literal["error", "quarantine"]
Path = str | PathLike[str]

MAX_LINE_BYTES = 1 << 20
_KEPT_BYTES = 4096  # of a bad row, in quarantine
_BOM = b"\xef\xbb\xbf"
_TYPE_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false",
               list: "a list", dict: "an object"}  # fmt: skip


@dataclass
class RowCounts:
    """What became of the rows of one reading: read = good + quarantined.

    Args:
        read: rows, without the header.
        good: rows that were used.
        quarantined: rows that were written to the file of bad rows.
        duplicated: good rows whose question an earlier row has too.
        first_duplicate: "file:line repeats file:line" of the first of these, or None.
    """

    read: int = 0
    good: int = 0
    quarantined: int = 0
    duplicated: int = 0
    first_duplicate: str | None = None


class Row(NamedTuple):
    """One row: its physical line, its fields or the reason why it is bad, and its bytes."""

    line: int
    fields: dict[str, Any]
    reason: str | None
    raw: bytes


class Rows(NamedTuple):
    """Good rows, the physical line of each, and what became of all."""

    rows: list[dict[str, Any]]
    lines: list[int]
    counts: RowCounts


class RowGuard(AbstractContextManager["RowGuard"]):
    """Counts rows and decides what a bad one does; used by every reader of rows.

    Args:
        name: how messages call the source.
        on_bad: "error" stops at the first bad row; "quarantine" writes it to ``bad_rows`` and goes
            on.
        bad_rows: file to which quarantined rows are appended, one JSON object a line: "file",
            "line", "reason", "row" (its first 4096 bytes).
        max_bad_fraction: more bad rows than this part of all stop the reader at the end, in [0, 1].
        counts: filled in.

    Raises:
        ValueError: an argument is wrong; on use, a row is bad, or too many are.
    """

    def __init__(
        self,
        name: str,
        on_bad: OnBad = "error",
        bad_rows: Path | None = None,
        max_bad_fraction: float = 0.01,
        counts: RowCounts | None = None,
    ) -> None:
        if on_bad not in ("error", "quarantine"):
            raise ValueError(f"on_bad must be error or quarantine; got {on_bad!r}")
        if on_bad == "quarantine" and bad_rows is None:
            raise ValueError("on_bad quarantine needs the path bad_rows; got None")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1]; got {max_bad_fraction}")
        self.name, self.counts = name, counts if counts is not None else RowCounts()
        self._path = bad_rows if on_bad == "quarantine" else None
        self._limit = max_bad_fraction
        self._file: TextIO | None = None
        self._first = ""

    def good(self, rows: int = 1) -> None:
        self.counts.read += rows
        self.counts.good += rows

    def bad(self, line: int, reason: str, raw: bytes) -> None:
        if self._path is None:
            raise ValueError(f"{self.name}:{line}: {reason}")
        if self._file is None:
            handle = open_in_place(expanded(self._path), os.O_APPEND)
            self._file = open(handle, "a", encoding="utf-8")
        text = raw[:_KEPT_BYTES].decode("utf-8", "backslashreplace")
        entry = {"file": self.name, "line": line, "reason": reason, "row": text}
        self._file.write(json.dumps(entry) + "\n")
        self._first = self._first or f"line {line}: {reason}"
        self.counts.read += 1
        self.counts.quarantined += 1

    def __exit__(self, kind: object, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        bad, read = self.counts.quarantined, self.counts.read
        if kind is None and bad > self._limit * read:
            raise ValueError(
                f"{self.name}: at most {self._limit:g} of the rows may be bad; got {bad} of "
                f"{read}, first {self._first}"
            )


def _lines(path: Path, max_line_bytes: int) -> Iterator[tuple[int, bytes, str | None]]:
    """Physical lines without their ends, from 1 on, each with the reason why it is bad, if any."""
    if max_line_bytes < 1:
        raise ValueError(f"max_line_bytes must be >= 1; got {max_line_bytes}")
    with open_file(expanded(path)) as file:
        _check_start(path, file.peek(4)[:4])
        if file.peek(3).startswith(_BOM):
            file.read(len(_BOM))
        number = 0
        while raw := file.readline(max_line_bytes + 2):
            number += 1
            line = raw.removesuffix(b"\n").removesuffix(b"\r")
            if len(line) > max_line_bytes:
                _skip_line(file, raw)
                yield number, line, f"a line must have at most {max_line_bytes} bytes"
            elif not line.strip():
                yield number, line, "blank line"
            elif b"\0" in line:
                yield number, line, "NUL byte"
            else:
                yield number, line, None


def _skip_line(file: BufferedReader, raw: bytes) -> None:
    """Reads to the end of a line in pieces, so that its length takes no memory."""
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(1 << 16)


def _check_start(path: Path, start: bytes) -> None:
    if start.startswith(b"\x1f\x8b"):
        raise ValueError(f"{fspath(path)}: text is required; got a gzip file, decompress it first")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{fspath(path)}: UTF-8 is required; got UTF-16 or UTF-32")


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start}") from None


def jsonl_rows(
    path: Path,
    fields: Mapping[str, type],
    optional: Mapping[str, type] | None = None,
    *,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Row]:
    """Yields every row of a JSONL file, good or bad; see ``read_jsonl``."""
    for number, line, reason in _lines(path, max_line_bytes):
        found: dict[str, Any] = {}
        if reason is None:
            try:
                found = _json_object(_decode(line))
                check_fields(found, fields, optional or {})
            except ValueError as error:
                reason = str(error)
        yield Row(number, found, reason, line)


def _json_object(text: str) -> dict[str, Any]:
    found = load_object(text, "a row", object_pairs_hook=_without_duplicates)
    # Surrogates come in as escapes only; written out once more, those without a partner fail.
    if "\\ud" in text.lower() and not _encodable(json.dumps(found, ensure_ascii=False)):
        raise ValueError("a row must be JSON; got a lone surrogate")
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def check_fields(
    found: Mapping[str, Any], fields: Mapping[str, type], optional: Mapping[str, type]
) -> None:
    """Checks that a row has its fields, of the right types, finite and encodable as UTF-8.

    Raises:
        ValueError: it has not; the message names the field.
    """
    for name, kind in (*fields.items(), *optional.items()):
        if name in found:
            _check_value(name, found[name], kind)
        elif name in fields:
            raise ValueError(f"field '{name}' is missing")


def _check_value(name: str, value: Any, kind: type) -> None:
    # true is an int to Python, and an int is as good as a float.
    fits = type(value) in ((int, float) if kind is float else (kind,))
    if not fits:
        wanted = _TYPE_NAMES.get(kind, kind.__name__)
        raise ValueError(f"field '{name}' must be {wanted}; got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"field '{name}' must be finite")
    if isinstance(value, str) and not _encodable(value):
        raise ValueError(f"field '{name}' has a lone surrogate")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def csv_rows(
    path: Path,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    *,
    aliases: Mapping[str, str] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Row]:
    """Yields every row of a CSV file after its header, good or bad; see ``read_csv``.

    ``aliases`` has another title for some of the columns, by which the header may call them.
    """
    lines = _lines(path, max_line_bytes)
    name = fspath(path)
    header = next(lines, None)
    if header is None or header[2] is not None:
        reason = header[2] if header else "an empty file"
        raise ValueError(f"{name}:1: a header with {', '.join(columns)} is required; got {reason}")
    try:
        titles = _csv_fields(_decode(header[1]))
    except ValueError as error:
        raise ValueError(f"{name}:1: {error}") from None
    wanted = _places(titles, columns, optional, aliases or {}, f"{name}:1")
    for number, line, reason in lines:
        found: dict[str, Any] = {}
        if reason is None:
            try:
                found = _csv_row(_decode(line), wanted, len(titles))
            except ValueError as error:
                reason = str(error)
        yield Row(number, found, reason, line)


def _places(
    titles: list[str],
    columns: Sequence[str],
    optional: Sequence[str],
    aliases: Mapping[str, str],
    where: str,
) -> list[tuple[str, int]]:
    """Returns the place of each wanted column in a header; blanks around titles do not count."""
    bare = [title.strip() for title in titles]
    shown = ", ".join(map(repr, titles))
    found = []
    for column in (*columns, *optional):
        names = [name for name in (column, aliases.get(column)) if name is not None]
        places = [i for i, title in enumerate(bare) if title in {name.strip() for name in names}]
        if len(places) > 1 or (column in columns and not places):
            either = " or ".join(f"'{name}'" for name in names)
            raise ValueError(
                f"{where}: the header must have the column {either} once; got {shown[:200]}"
            )
        found += [(column, place) for place in places]
    return found


def _csv_row(text: str, wanted: list[tuple[str, int]], count: int) -> dict[str, Any]:
    values = _csv_fields(text)
    if len(values) != count:
        raise ValueError(f"a row must have {count} columns as the header; got {len(values)}")
    return {title: values[place] for title, place in wanted}


def _csv_fields(text: str) -> list[str]:
    if '"' not in text:
        return text.split(",")
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise ValueError(f"malformed quotes: {error}") from None


def read_jsonl(
    path: Path,
    fields: Mapping[str, type],
    optional: Mapping[str, type] | None = None,
    *,
    on_bad: OnBad = "error",
    bad_rows: Path | None = None,
    max_bad_fraction: float = 0.01,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Rows:
    """Reads one JSON object a line.

    A row is bad if it is blank, longer than allowed, not UTF-8, not JSON (cut off, NaN, Infinity,
    a NUL, nested more than 64 deep), has a key twice, or lacks a field or has one of another type,
    not finite or with a lone surrogate. Other fields are kept as they are.

    Args:
        path: the file.
        fields: name -> str, int, float, bool, list or dict, of the fields that each row must have.
        optional: likewise of the fields that it may have.
        on_bad, bad_rows, max_bad_fraction: what a bad row does, see ``RowGuard``.
        max_line_bytes: longer lines are bad.

    Raises:
        OSError: the file cannot be read, or ``bad_rows`` not written.
        ValueError: "file:line: reason" of a bad row, too many of them, or the file is no text.
    """
    rows = jsonl_rows(path, fields, optional, max_line_bytes=max_line_bytes)
    return collect(rows, RowGuard(fspath(path), on_bad, bad_rows, max_bad_fraction))


def read_csv(
    path: Path,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    *,
    on_bad: OnBad = "error",
    bad_rows: Path | None = None,
    max_bad_fraction: float = 0.01,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Rows:
    """Reads comma-separated rows below a header; values are strings, blanks in them are kept.
    Blanks around the titles of the header do not count.

    A row is bad if it is blank, longer than allowed, not UTF-8, has a NUL, an unbalanced quote, or
    another number of columns than the header. Quoted line breaks are unbalanced quotes here.

    Args:
        path: the file.
        columns: columns that the header must have; ``optional``: that it may have. Others are left
            out.
        on_bad, bad_rows, max_bad_fraction, max_line_bytes: as for ``read_jsonl``.

    Raises:
        OSError: the file cannot be read, or ``bad_rows`` not written.
        ValueError: "file:line: reason" of a bad row, too many of them, a column is missing or there
            twice, or the file is no text.
    """
    rows = csv_rows(path, columns, optional, max_line_bytes=max_line_bytes)
    return collect(rows, RowGuard(fspath(path), on_bad, bad_rows, max_bad_fraction))


def collect(
    rows: Iterable[Row], guard: RowGuard, check: Callable[[dict[str, Any]], None] | None = None
) -> Rows:
    """Gathers the good rows.

    Args:
        rows: good and bad ones.
        guard: decides on the bad ones.
        check: raises ValueError with the reason if the fields of a row are bad.

    Raises:
        ValueError: as the guard decides.
    """
    found, lines = [], []
    with guard:
        for row in rows:
            reason = row.reason
            if reason is None and check is not None:
                try:
                    check(row.fields)
                except ValueError as error:
                    reason = str(error)
            if reason is not None:
                guard.bad(row.line, reason, row.raw)
                continue
            guard.good()
            found.append(row.fields)
            lines.append(row.line)
    return Rows(found, lines, guard.counts)
