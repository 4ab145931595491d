"""What a person writes and reads: lists, flags in errors, suggestions."""

import re
import subprocess
import sys

import pytest

from trm_fast.cli import main, suggest
from trm_fast.cli._flags import errors_name_flags, with_lists
from trm_fast.cli._settings import changed, read_options
from trm_fast.recipes import load
from trm_fast.recipes.puzzle.config import PRESETS

SUDOKU = load("sudoku").default


def error_of(capsys, *argv, code=2):
    assert main(list(argv)) == code
    text = capsys.readouterr().err
    assert text.startswith("trm-fast: ") and text.count("\n") == 1
    return text.removeprefix("trm-fast: ").rstrip()


@pytest.mark.parametrize("value", ["(8, 12)", "(8,12)", "[8, 12]", "[8,12]", "8,12", "8, 12"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_list_may_be_written_as_it_is_shown(value, joined):
    name = "--data.clues"
    words = [f"{name}={value}"] if joined else [name, value]
    assert read_options(load("sudoku"), words).config.data.clues == (8, 12)
    assert changed("eval", SUDOKU, [f"data.clues={value}"]).data.clues == (8, 12)


NOT_DECIMAL = ["0500", "1_000", "1:30", "0x10", "0o17", "0b11", "-010", "٣", "00.5", "1_0.5"]


@pytest.mark.parametrize("value", NOT_DECIMAL)
@pytest.mark.parametrize("name", ["train.steps", "optimizer.lr", "data.clues"])
@pytest.mark.parametrize("way", ["flag", "joined", "set", "file", "changed"])
def test_numbers_that_are_not_decimal_are_refused(value, name, way, tmp_path):
    shown = f"[8, {value}]" if name == "data.clues" else value
    words = {
        "flag": [f"--{name}", shown],
        "joined": [f"--{name}={shown}"],
        "set": ["--set", f"{name}={shown}"],
        "file": ["--config", str(tmp_path / "my.yaml")],
    }
    group, _, last = name.partition(".")
    (tmp_path / "my.yaml").write_text(f"{group}:\n  {last}: {shown}\n")
    message = f"{name} must be a decimal number, such as 500 or 1e-3; got {value}. "
    with pytest.raises(ValueError, match=re.escape(message)):
        if way == "changed":
            changed("eval", SUDOKU, [f"{name}={shown}"])
        else:
            read_options(load("sudoku"), words[way])


@pytest.mark.parametrize("value", ["'5'", '"5"'])
def test_a_number_in_quotes_is_refused(value, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(f"train: {{steps: {value}}}\n")
    for words in (["--config", str(file)], ["--train.steps", value]):
        with pytest.raises(ValueError, match=r"train\.steps must be a number; got the text '5'"):
            read_options(load("sudoku"), words)


@pytest.mark.parametrize("value", ["1e-4", "1E-4", "1.0e-4", "1e+4", ".5", "5.", "0.5", "+3", "0"])
def test_decimal_numbers_are_read_as_they_are(value, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(f"optimizer: {{lr: {value}}}\n")
    for words in (["--config", str(file)], [f"--optimizer.lr={value}"]):
        assert read_options(load("sudoku"), words).config.optimizer.lr == float(value)


@pytest.mark.parametrize("value", ["yes", "no", "on", "off", "0500", "1_000", "1:30", "2001-01-01"])
def test_text_stays_text(value, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(f"train: {{monitor: {value}}}\n")
    for words in (["--config", str(file)], ["--train.monitor", value]):
        assert read_options(load("sudoku"), words).config.train.monitor == value


def test_a_tag_makes_no_other_value_of_a_text(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("train: {steps: !!int '0500'}\n")
    with pytest.raises(ValueError, match="must have no tags; got tag:yaml"):
        read_options(load("sudoku"), ["--config", str(file)])


def test_other_settings_are_left_as_they_are():
    words = ["--out", "8,12", "--clues", "8,1e-3", "--out=(1,2)", "--clues", "many"]
    wanted = ["--out", "8,12", "--clues", "[8,1e-3]", "--out=(1,2)", "--clues", "many"]
    assert list(with_lists(words, {"clues"})) == wanted


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "1"], "unknown setting 'lr'; did you mean --optimizer.lr?"),
        (["--seed", "1"], "unknown setting 'seed'; did you mean --train.seed or --data.seed?"),
        (["--train.steps", "-1"], "--train.steps must be >= 0; got -1"),
        (["--batch", "0", "--data.train", "4", "--data.test", "2"], "--batch must be >= 1; got 0"),
        (["--data.size", "5"], "--data.size must be 4, 6 or 9; got 5"),
        (["--device", "abacus"], "--device must be auto or one that torch can use; got 'abacus'"),
    ],
)
def test_errors_name_flags(flags, message, tmp_path, capsys):
    assert message in error_of(capsys, "train", "sudoku", "--out", str(tmp_path / "run"), *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Two: lr and warmup must be small; got 3", "Two: lr and warmup must be small; got 3"),
        ("PuzzleSet: path must be one", "--data.path must be one"),
        ("Anything: unknown must be here", "Anything: unknown must be here"),
        ("Trainer: seed must be one of two", "Trainer: seed must be one of two"),  # of data, train
        ("a, resume the run, or overwrite it", "a, --resume the run, or --overwrite it"),
        ("a checkpoint to resume the run", "a checkpoint to resume the run"),
    ],
)
def test_only_what_is_one_setting_becomes_a_flag(message, shown):
    with pytest.raises(ValueError) as caught, errors_name_flags(SUDOKU):
        raise ValueError(message)
    assert str(caught.value) == shown


def test_errors_of_files_stay_as_they_are():
    with pytest.raises(PermissionError) as caught, errors_name_flags(PRESETS["maze"]["tiny"]):
        raise PermissionError(13, "Permission denied", "x")
    assert (caught.value.errno, caught.value.filename) == (13, "x")


def test_an_existing_run_names_both_ways_out(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    text = error_of(
        capsys, "train", "grokking", "--prime", "7", "--plot", "false", "--out", str(tmp_path)
    )
    assert "--resume the run, or --overwrite it" in text


@pytest.mark.parametrize(
    ("flag", "meant"), [("--train", "--count"), ("--cuont", "--count"), ("--tset", "--test")]
)
def test_an_unknown_option_gets_a_suggestion(flag, meant, capsys):
    text = error_of(capsys, "data", "make", "sudoku", "--out", "x", flag, "100")
    assert text.endswith(f"unrecognized arguments: {flag} 100; did you mean '{meant}'?")


def test_a_name_without_its_group_is_suggested_with_it():
    assert suggest("lr", ["optimizer.lr", "puzzle_lr"]) == "; did you mean --optimizer.lr?"
    assert suggest("lr", ["lr", "warmup"]) == "; did you mean 'lr'?"


@pytest.mark.parametrize(("words", "code"), [([], 2), (["grokking"], 2), (["--help"], 0)])
def test_the_module_of_a_system_lists_its_own_recipes(words, code):
    line = [sys.executable, "-m", "trm_fast.recipes.puzzle", *words]
    done = subprocess.run(line, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == code and "sudoku|maze|arc" in text and "Grokfast" not in text
