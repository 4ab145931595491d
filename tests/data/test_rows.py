"""Rows of CSV and JSONL files: a bad one is named by its line and reason, never by its content."""

import json
import os
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trm_fast.data import RowCounts, read_csv, read_jsonl, read_pairs
from trm_fast.data.sources.rows import MAX_LINE_BYTES

GOOD = b'{"question": "secret", "answer": "b"}'
FIELDS = {"question": str, "answer": str}

BAD_JSON = {
    "blank line": b"",
    "blank line ": b" \t",
    "NUL byte": b'{"question": "secret\0", "answer": "b"}',
    "invalid UTF-8 at byte 18": b'{"question": "secr\xff", "answer": "b"}',
    "a row must be JSON; got Unterminated string starting at at column 14": b'{"question": "secr',
    "a row must be JSON; got Expecting ',' delimiter at column 36": b'{"question": "secret", '
    b'"answer":"b"',
    "a row must be JSON; got Extra data at column 38": GOOD + b"," + GOOD,
    "a row must be JSON; got Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1": (
        b"\xef\xbb\xbf" + GOOD
    ),
    "a row must be JSON; got NaN": b'{"question": "secret", "answer": NaN}',
    "a row must be JSON; got -Infinity": b'{"question": "secret", "x": -Infinity}',
    "a row must be JSON; got a number that is too large": b'{"question": "secret", "x": 1e999}',
    "a row must be JSON; got a key twice": b'{"secret": 1, "secret": 2}',
    "a row must be JSON; got a key twice ": b'{"a": [{"secret": 1, "secret": 2}]}',
    "a row must be JSON; got a lone surrogate": b'{"question": "secret\\ud800", "answer": "b"}',
    "a row must be JSON; got a lone surrogate ": b'{"a": {"\\uDC00secret": 1}}',
    "a row must be nested at most 64 deep; got 100000": b"[" * 100_000 + b"]" * 100_000,
    "a row must be a JSON object; got list": b'["secret"]',
    "field 'answer' is missing": b'{"question": "secret"}',
    "field 'answer' must be a string; got int": b'{"question": "secret", "answer": 1}',
    "field 'answer' must be a string; got NoneType": b'{"question": "secret", "answer": null}',
    f"a line must have at most {MAX_LINE_BYTES} bytes": b" " * MAX_LINE_BYTES + GOOD,
}
BAD_CSV = {
    "blank line": b"",
    "NUL byte": b"s,secret\0,b,1",
    "invalid UTF-8 at byte 2": b"s,\xff,secret,1",
    "a row must have 4 columns as the header; got 3": b"s,secret,b",
    "a row must have 4 columns as the header; got 5": b"s,secret,b,1,2",
    "malformed quotes: unexpected end of data": b's,"secret,b,1',
    "malformed quotes: ',' expected after '\"'": b's,"secret"x,b,1',
}


def write(tmp_path, name, *lines, end=b"\n"):
    path = tmp_path / name
    path.write_bytes(b"".join(line + end for line in lines))
    return path


def quarantined(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("reason", BAD_JSON)
def test_a_bad_json_row_stops_with_file_line_and_reason(tmp_path, reason):
    path = write(tmp_path, "rows.jsonl", GOOD, GOOD, BAD_JSON[reason], GOOD)
    with pytest.raises(ValueError) as caught:
        read_jsonl(path, FIELDS)
    assert str(caught.value) == f"{path}:3: {reason.strip()}"


@pytest.mark.parametrize("reason", BAD_CSV)
def test_a_bad_csv_row_stops_with_file_line_and_reason(tmp_path, reason):
    header = b"source,question,answer,rating"
    path = write(tmp_path, "rows.csv", header, b"s,secret,b,1", BAD_CSV[reason], b"s,secret,b,1")
    with pytest.raises(ValueError) as caught:
        read_csv(path, ("question", "answer"))
    assert str(caught.value) == f"{path}:3: {reason}"


@pytest.mark.parametrize("kind", ["a link", "a hard link", "a pipe"])
def test_quarantine_writes_to_a_file_of_its_own_only(tmp_path, kind):
    path = write(tmp_path, "rows.jsonl", b"{}")
    mine, kept = tmp_path / "mine", tmp_path / "bad_rows.jsonl"
    mine.write_text("mine")
    if kind == "a pipe":
        os.mkfifo(kept)
    else:
        os.symlink(mine, kept) if kind == "a link" else os.link(mine, kept)
    with pytest.raises(OSError, match=f"bad_rows.jsonl must .*{kind}"):
        read_jsonl(path, FIELDS, on_bad="quarantine", bad_rows=kept, max_bad_fraction=1)
    assert mine.read_text() == "mine"


def test_quarantine_keeps_all_bad_rows_with_reasons(tmp_path):
    bad = [*BAD_JSON.values()]
    lines = [line for row in bad for line in (GOOD, row)]
    path = write(tmp_path, "rows.jsonl", *lines)
    kept = tmp_path / "bad_rows.jsonl"
    found = read_jsonl(path, FIELDS, on_bad="quarantine", bad_rows=kept, max_bad_fraction=0.5)
    assert found.rows == [json.loads(GOOD)] * len(bad)
    assert found.lines == [*range(1, 2 * len(bad), 2)]
    counts = found.counts
    assert (counts.read, counts.good, counts.quarantined) == (2 * len(bad), len(bad), len(bad))
    entries = quarantined(kept)
    assert [entry["line"] for entry in entries] == [*range(2, 2 * len(bad) + 1, 2)]
    assert [entry["reason"] for entry in entries] == [reason.strip() for reason in BAD_JSON]
    assert {entry["file"] for entry in entries} == {str(path)}
    rows = [row[:4096].decode("utf-8", "backslashreplace") for row in bad]
    assert [entry["row"] for entry in entries] == rows


@pytest.mark.parametrize(("bad", "stops"), [(0, False), (1, False), (2, True)])
def test_more_than_the_allowed_fraction_stops(tmp_path, bad, stops):
    path = write(tmp_path, "rows.jsonl", *[GOOD] * (100 - bad), *[b"{"] * bad)
    kept = tmp_path / "bad_rows.jsonl"
    if not stops:
        found = read_jsonl(path, FIELDS, on_bad="quarantine", bad_rows=kept)
        assert found.counts == RowCounts(100, 100 - bad, bad)
    else:
        with pytest.raises(ValueError, match=r"at most 0\.01 of the rows may be bad; got 2 of 100"):
            read_jsonl(path, FIELDS, on_bad="quarantine", bad_rows=kept)
    assert len(quarantined(kept)) == bad


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_a_byte_order_mark_are_accepted(tmp_path, end, mark):
    rows = write(tmp_path, "rows.jsonl", mark + GOOD, GOOD, end=end)
    assert read_jsonl(rows, FIELDS).rows == [json.loads(GOOD)] * 2
    table = write(tmp_path, "rows.csv", mark + b"question,answer", b"a ,' b'", end=end)
    assert read_csv(table, ("question", "answer")).rows == [{"question": "a ", "answer": "' b'"}]


def test_the_last_line_needs_no_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD)
    assert read_jsonl(path, FIELDS).lines == [1, 2]


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_longest_line_counts_its_own_bytes_only(tmp_path, extra, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + end)
    read = lambda: read_jsonl(path, FIELDS, max_line_bytes=len(GOOD) - extra)  # noqa: E731
    if extra > 0:
        with pytest.raises(ValueError, match=":1: a line must have at most"):
            read()
    else:
        assert read().lines == [1]


def test_lines_after_a_giant_one_keep_their_numbers(tmp_path):
    path = write(tmp_path, "rows.jsonl", b"x" * (1 << 20), b"{", b"y" * 200_000)
    kept = tmp_path / "bad_rows.jsonl"
    read_jsonl(
        path, FIELDS, on_bad="quarantine", bad_rows=kept, max_bad_fraction=1, max_line_bytes=100
    )
    assert [entry["line"] for entry in quarantined(kept)] == [1, 2, 3]


def test_quoted_csv_values_are_unquoted(tmp_path):
    path = write(tmp_path, "rows.csv", b'question,"answer"', b'"a,""b""",c', b"x,y")
    rows = read_csv(path, ("question", "answer")).rows
    assert rows == [{"question": 'a,"b"', "answer": "c"}, {"question": "x", "answer": "y"}]


def test_only_named_columns_are_kept(tmp_path):
    path = write(tmp_path, "rows.csv", b"source,question,answer,rating", b"s,q,a,3")
    assert read_csv(path, ("question",), ("rating", "x")).rows == [{"question": "q", "rating": "3"}]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            b"source,question",
            ":1: the header must have the column 'answer' once; got 'source', 'question'$",
        ),
        (b"answer,question,answer", "'answer' once; got 'answer', 'question', 'answer'$"),
        (b"", ":1: a header with question, answer is required; got blank line"),
        (b'"question,answer', ":1: malformed quotes"),
        (b"\xff,question", ":1: invalid UTF-8 at byte 0"),
    ],
)
def test_a_header_without_the_columns_is_refused_whatever_on_bad(tmp_path, header, message):
    path = write(tmp_path, "rows.csv", header, b"a,b")
    with pytest.raises(ValueError, match=message):
        read_csv(path, ("question", "answer"), on_bad="quarantine", bad_rows=tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("start", "message"),
    [(b"\x1f\x8b\x08\0", "got a gzip file, decompress it first"), (b"\xff\xfea\0", "got UTF-16")],
)
def test_files_that_are_no_text_are_refused(tmp_path, start, message):
    path = write(tmp_path, "rows.jsonl", start)
    with pytest.raises(ValueError, match=message):
        read_jsonl(path, FIELDS)
    with pytest.raises(ValueError, match=message):
        read_csv(path, ("question",))


def test_empty_and_missing_files(tmp_path):
    path = write(tmp_path, "rows.jsonl")
    assert read_jsonl(path, FIELDS).rows == []
    with pytest.raises(ValueError, match="got an empty file"):
        read_csv(path, ("question",))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_jsonl(tmp_path / "none.jsonl", FIELDS)


def test_types_are_told_apart(tmp_path):
    row = {"s": "a", "i": 1, "f": 1, "b": True, "l": [], "d": {}}
    kinds = {"s": str, "i": int, "f": float, "b": bool, "l": list, "d": dict}
    path = write(tmp_path, "rows.jsonl", json.dumps(row).encode())
    assert read_jsonl(path, kinds).rows == [row]
    assert read_jsonl(path, {}, {"none": int}).rows == [row]
    for name in "ifd":
        write(tmp_path, "rows.jsonl", json.dumps({**row, name: True}).encode())
        with pytest.raises(ValueError, match=f"field '{name}' must be .*; got bool"):
            read_jsonl(path, kinds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_bad": "skip"}, "on_bad must be error or quarantine; got 'skip'"),
        ({"on_bad": "quarantine"}, "needs the path bad_rows"),
        ({"max_bad_fraction": 1.5}, r"max_bad_fraction must be in \[0, 1\]; got 1.5"),
        ({"max_bad_fraction": float("nan")}, r"max_bad_fraction must be in \[0, 1\]; got nan"),
        ({"max_line_bytes": 0}, "max_line_bytes must be >= 1; got 0"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, arguments, message):
    path = write(tmp_path, "rows.jsonl", GOOD)
    with pytest.raises(ValueError, match=message):
        read_jsonl(path, FIELDS, **arguments)


# Pieces from which fuzzed lines are made: good rows, every class of bad ones, and noise.
SHORT = [row for row in BAD_JSON.values() if len(row) < 1000]
PIECES = st.one_of(
    st.just(GOOD),
    st.sampled_from([*SHORT, *BAD_CSV.values(), b"question,answer", b"q,a", b'"', b"\r", b","]),
    st.binary(max_size=40),
    st.builds(lambda row, cut: row[:cut], st.just(GOOD), st.integers(0, len(GOOD))),
)
FILES = st.lists(st.tuples(PIECES, st.sampled_from([b"\n", b"\r\n", b""])), max_size=12).map(
    lambda parts: b"".join(piece + end for piece, end in parts)
)
FUZZ = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def physical_lines(data: bytes) -> int:
    return data.count(b"\n") + (not data.endswith(b"\n") and data != b"")


def check_fuzzed(tmp_path, read, data, header_lines):
    kept = tmp_path / "bad_rows.jsonl"
    kept.unlink(missing_ok=True)
    try:
        found = read(kept)
    except (ValueError, OSError):
        return
    # A mark at the start is no part of the first line; alone, it leaves none.
    count = physical_lines(data.removeprefix(b"\xef\xbb\xbf")) - header_lines
    counts, bad = found.counts, quarantined(kept)
    assert counts.read == counts.good + counts.quarantined == count
    assert (counts.good, counts.quarantined) == (len(found.rows), len(bad))
    lines = sorted([*found.lines, *(entry["line"] for entry in bad)])
    assert lines == [*range(1 + header_lines, count + header_lines + 1)]
    own = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for entry in bad:
        raw = own[entry["line"] - 1].removesuffix(b"\r")
        assert entry["row"] == raw.decode("utf-8", "backslashreplace")
    return found, own, bad


def strict_json(raw: bytes):
    """Whether a line is a good row, told in another way: raises ValueError if it is not."""
    found = json.loads(raw.decode("utf-8"), parse_constant=lambda name: int("x"))
    if type(found) is not dict or any(type(found.get(name)) is not str for name in FIELDS):
        raise ValueError
    json.dumps(found, ensure_ascii=False).encode()


@FUZZ
@given(FILES)
def test_fuzzed_json_files(tmp_path, data):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)

    def read(kept):
        return read_jsonl(path, FIELDS, on_bad="quarantine", bad_rows=kept, max_bad_fraction=1)

    result = check_fuzzed(tmp_path, read, data, 0)
    if result is not None:
        found, own, bad = result
        for row, line in zip(found.rows, found.lines, strict=True):
            assert json.loads(own[line - 1]) == row
        for entry in bad:
            with pytest.raises(ValueError):
                strict_json(own[entry["line"] - 1])


@FUZZ
@given(FILES)
def test_fuzzed_csv_files(tmp_path, data):
    data = b"question,answer\n" + data
    path = tmp_path / "rows.csv"
    path.write_bytes(data)

    def read(kept):
        columns = ("question", "answer")
        return read_csv(path, columns, on_bad="quarantine", bad_rows=kept, max_bad_fraction=1)

    result = check_fuzzed(tmp_path, read, data, 1)
    assert result is not None
    found, own, _ = result
    for row, line in zip(found.rows, found.lines, strict=True):
        text = own[line - 1].removesuffix(b"\r").decode()
        if '"' not in text:
            assert f"{row['question']},{row['answer']}" == text


@FUZZ
@given(FILES)
def test_fuzzed_files_of_pairs(tmp_path, data):
    path, kept = tmp_path / "rows.jsonl", tmp_path / "bad_rows.jsonl"
    path.write_bytes(data)
    kept.unlink(missing_ok=True)
    counts = RowCounts()
    options = {"on_bad": "quarantine", "bad_rows": kept, "max_bad_fraction": 1, "counts": counts}
    try:
        found = read_pairs(path, "abcrest", **options)
    except (ValueError, OSError):
        return
    assert counts.read == counts.good + counts.quarantined == physical_lines(data)
    assert len(found) == len(found.sources) == counts.good


def test_recursion_is_bounded_even_close_to_the_limit(tmp_path):
    """A reader that is called deep in a stack must not leave with RecursionError."""
    path = write(tmp_path, "rows.jsonl", b"[" * 5000)

    def dive(depth):
        return dive(depth - 1) if depth else read_jsonl(path, FIELDS)

    with pytest.raises(ValueError, match="a row must be nested at most 64 deep; got 5000"):
        dive(sys.getrecursionlimit() // 2)
