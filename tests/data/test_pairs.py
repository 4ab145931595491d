"""Questions and answers as puzzles: Sudoku, mazes and alphabets of one's own."""

import json

import numpy as np
import pytest

from trm_fast.data import PairFormat, RowCounts, read_maze_csv, read_pairs, read_sudoku_csv

HEADER = "source,question,answer,rating"
SMALL = ("1..." + "..2." + ".3.." + "...3", "1234" + "3421" + "4312" + "2143")
MAZE = ("######S  #### ##G  ######", "######Soo####o##Goo######")


def table(tmp_path, *rows, header=HEADER):
    path = tmp_path / "puzzles.csv"
    path.write_text("\n".join([header, *(f"s,{q},{a},3" for q, a in rows)]) + "\n")
    return path


def test_sudoku_tokens_are_digits_plus_one(tmp_path):
    path = table(tmp_path, SMALL, (SMALL[0].replace(".", "0"), SMALL[1]))
    counts = RowCounts()
    data = read_sudoku_csv(path, counts=counts)
    question = [1 if c == "." else int(c) + 1 for c in SMALL[0]]
    assert data.inputs.tolist() == [question] * 2
    assert data.labels.tolist() == [[int(c) + 1 for c in SMALL[1]]] * 2
    meta = data.metadata
    assert (meta.vocab_size, meta.seq_len, meta.num_puzzle_identifiers) == (6, 16, 1)
    assert (meta.total_groups, meta.total_puzzles, meta.pad_id, meta.ignore_label_id) == (
        2,
        2,
        0,
        0,
    )
    assert data.sources == (f"{path}:2", f"{path}:3")
    assert (counts.read, counts.good, counts.duplicated) == (2, 2, 1)
    assert counts.first_duplicate == f"{path}:3 repeats {path}:2"


@pytest.mark.parametrize(("cells", "size"), [(16, 4), (36, 6), (81, 9)])
def test_the_size_follows_from_the_length(tmp_path, cells, size):
    answer = ("123456789"[:size] * size)[:cells]
    data = read_sudoku_csv(table(tmp_path, ("." * cells, answer)))
    assert data.metadata.vocab_size == size + 2
    assert data.inputs.tolist() == [[1] * cells]
    assert data.labels.max() == size + 1


def test_maze_tokens_are_those_of_the_official_charset(tmp_path):
    data = read_maze_csv(table(tmp_path, MAZE))
    assert data.inputs.tolist() == [["# SGo".index(c) + 1 for c in MAZE[0]]]
    assert data.labels.tolist() == [["# SGo".index(c) + 1 for c in MAZE[1]]]
    assert (data.metadata.vocab_size, data.metadata.seq_len) == (6, 25)


BAD_SUDOKU = [
    ((SMALL[0][:-1], SMALL[1]), "question must have 16 characters; got 15"),
    ((SMALL[0], SMALL[1] + "1"), "answer must have 16 characters; got 17"),
    ((SMALL[0].replace("3", "5"), SMALL[1]), "question must consist of '01234'"),
    ((SMALL[0], SMALL[1].replace("2", "x")), "answer must consist of '01234'"),
    ((SMALL[0], SMALL[1].replace("4", "é")), "answer must consist of '01234'"),
    ((SMALL[0], "2" + SMALL[1][1:]), "answer must repeat the question's givens"),
    ((SMALL[0], SMALL[1][0] + "0" + SMALL[1][2:]), "answer must fill blank cells with '1234'"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_SUDOKU)
def test_a_bad_sudoku_stops_with_file_line_and_reason(tmp_path, row, reason):
    path = table(tmp_path, SMALL, SMALL, row, SMALL)
    with pytest.raises(ValueError) as caught:
        read_sudoku_csv(path)
    assert str(caught.value) == f"{path}:4: {reason}"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ((MAZE[0][:-1], MAZE[1]), "question must have a square number of characters; got 24"),
        ((MAZE[1], MAZE[1]), "question must consist of '# SG'"),
        ((MAZE[0], MAZE[1].replace("S", "o")), "answer must repeat the question's givens"),
        ((MAZE[0], MAZE[1].replace("o", "#")), "answer must fill blank cells with ' o'"),
        ((MAZE[0], MAZE[1].replace("o", ".")), "answer must consist of '# SGo'"),
    ],
)
def test_a_bad_maze_stops_with_file_line_and_reason(tmp_path, row, reason):
    path = table(tmp_path, row, MAZE)
    with pytest.raises(ValueError) as caught:
        read_maze_csv(path)
    assert str(caught.value) == f"{path}:2: {reason}"


def test_quarantine_keeps_the_order_of_good_and_bad_rows(tmp_path):
    # More rows than are checked at once, so that bad ones lie in several pieces.
    bad = {5: BAD_SUDOKU[0], 4000: BAD_SUDOKU[3], 4096: BAD_SUDOKU[5], 9000: BAD_SUDOKU[6]}
    rows = [bad[i][0] if i in bad else SMALL for i in range(10_000)]
    path, kept, counts = table(tmp_path, *rows), tmp_path / "bad.jsonl", RowCounts()
    data = read_sudoku_csv(path, on_bad="quarantine", bad_rows=kept, counts=counts)
    assert (counts.read, counts.good, counts.quarantined) == (10_000, 9_996, 4)
    assert counts.duplicated == 9_995
    entries = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(e["line"], e["reason"]) for e in entries] == [(i + 2, r) for i, (_, r) in bad.items()]
    expected = [f"{path}:{i + 2}" for i in range(10_000) if i not in bad]
    assert [*data.sources] == expected


def test_bad_rows_before_the_first_good_one_do_not_decide_the_length(tmp_path):
    path, kept = table(tmp_path, ("1", "1"), SMALL), tmp_path / "bad.jsonl"
    options = {"on_bad": "quarantine", "bad_rows": kept, "max_bad_fraction": 0.5}
    assert read_sudoku_csv(path, **options).sources == (f"{path}:3",)


def test_nothing_good_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one good row is required; got none"):
        read_sudoku_csv(table(tmp_path))
    path, kept = table(tmp_path, ("1", "1")), tmp_path / "bad.jsonl"
    with pytest.raises(ValueError, match="at least one good row is required; got none"):
        read_maze_csv(
            table(tmp_path, ("##", "##")), on_bad="quarantine", bad_rows=kept, max_bad_fraction=1
        )
    with pytest.raises(ValueError, match=r"at most 0\.01 of the rows may be bad; got 1 of 1"):
        read_sudoku_csv(path, on_bad="quarantine", bad_rows=kept)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_an_alphabet_of_ones_own(tmp_path, suffix):
    path = tmp_path / f"chess.{suffix}"
    rows = [("♔.♟", "♟♔."), ("...", "♔♔♔")]
    if suffix == "csv":
        path.write_text("from,to\n" + "".join(f"{q},{a}\n" for q, a in rows), encoding="utf-8")
    else:
        lines = (json.dumps({"from": q, "to": a, "x": 1}) for q, a in rows)
        path.write_text("\n".join(lines))
    data = read_pairs(path, ".♔♟", question="from", answer="to", length=3)
    assert data.inputs.tolist() == [[2, 1, 3], [1, 1, 1]]
    assert data.labels.tolist() == [[3, 2, 1], [2, 2, 2]]
    assert data.metadata.vocab_size == 4
    with pytest.raises(ValueError, match=r":(1|2): question must have 4 characters; got 3"):
        read_pairs(path, ".♔♟", question="from", answer="to", length=4)


def test_a_large_alphabet_takes_two_bytes(tmp_path):
    alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": alphabet, "answer": alphabet[::-1]}))
    data = read_pairs(path, alphabet)
    assert data.inputs.dtype == np.uint16
    assert data.inputs[0].tolist() == [*range(1, 301)]


def test_givens_of_a_format_of_ones_own(tmp_path):
    form = PairFormat("_abc", blank="_", fills="ab", aliases={"?": "_"})
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "c?_", "answer": "cab"}')
    assert read_pairs(path, form).inputs.tolist() == [[4, 1, 1]]
    path.write_text('{"question": "c?_", "answer": "cac"}')
    with pytest.raises(ValueError, match=":1: answer must fill blank cells with 'ab'"):
        read_pairs(path, form)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alphabet": ""}, "alphabet must have characters, each once"),
        ({"alphabet": "aba"}, "alphabet must have characters, each once"),
        ({"alphabet": "ab", "blank": "c"}, "must be in the alphabet"),
        ({"alphabet": "ab", "aliases": {"c": "d"}}, "aliases must map characters"),
        ({"alphabet": "ab", "aliases": {"a": "b"}}, "aliases must not be in the alphabet"),
    ],
)
def test_a_format_checks_itself(arguments, message):
    with pytest.raises(ValueError, match=message):
        PairFormat(**arguments)


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a \.csv, \.jsonl or \.ndjson file is required"):
        read_pairs(tmp_path / "rows.txt", "ab")


@pytest.mark.parametrize("header", ["q,a", "question, answer", " a ,q", "\ufeffq,a"])
def test_titles_may_be_short_and_have_blanks_around_them(tmp_path, header):
    path = tmp_path / "x.csv"
    pair = ("14.....1.2.....3", "1432234132144123")
    row = pair[::-1] if header.strip().startswith("a") else pair
    path.write_text(f"{header}\n{','.join(row)}\n", "utf-8")
    assert read_sudoku_csv(path).inputs[0, :2].tolist() == [2, 5]
    assert read_pairs(path, "01234.").labels[0, :2].tolist() == [2, 5]


def test_a_title_in_both_forms_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("q,question,a\n1,1,1\n")
    with pytest.raises(ValueError, match="the column 'question' or 'q' once; got 'q', 'question'"):
        read_sudoku_csv(tmp_path / "x.csv")
