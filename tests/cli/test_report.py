"""``trm-fast report``: tables, files and one-line errors."""

import os
import re
import subprocess
import sys

import pytest

from trm_fast.cli import main
from trm_fast.cli._tables import aligned, printable
from trm_fast.train import RunDirectory
from trm_fast.train.reports.reading import read_run


def write(path, *lines, name="sudoku", percent=()):
    """A run with two evaluations, as a trainer leaves it."""
    with RunDirectory(path) as run:
        run.write_json("config.json", {"train": {"steps": 20}})
        report = {"steps": 20, "percent": [*percent]}
        run.write_json("run.json", {"name": name, "torch": "2.13.0", "report": report})
        for step, exact in ((10, 0.125), (20, 0.5)):
            seconds = step / 4
            pace = {"loss": 1.0 / step, "steps_per_second": 4.0}
            run.append("metrics.jsonl", {"kind": "train", "step": step, "seconds": seconds, **pace})
            found = {
                "kind": "evaluation",
                "step": step,
                "seconds": seconds,
                "exact_accuracy": exact,
            }
            run.append("metrics.jsonl", found)
        for message in lines:
            run.append("events.jsonl", {"event": "skipped", "step": 3, "message": message})
    return path


def error_of(capsys, *argv):
    """The one line on stderr of a command that must fail with 2."""
    assert main(["report", *map(str, argv)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("trm-fast: ") and text.count("\n") == 1
    return text.removeprefix("trm-fast: ").rstrip()


def names(path):
    return {file.name for file in path.iterdir()}


@pytest.mark.parametrize("argv", [["--help"], ["missing"], ["a", "b"]])
def test_help_and_usage_errors_import_no_torch(argv):
    code = (
        "import sys; from trm_fast.cli import main; code = main(['report', *sys.argv[1:]]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in argv else 2)
    assert done.stdout.splitlines()[-1] == "False"


def test_one_run_is_told_in_tables_and_drawn_into_its_directory(tmp_path, capsys):
    run = write(tmp_path / "run", "a step was not finite")
    before = names(run)
    assert main(["report", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = "finished at step 20 of 20: best exact_accuracy 50.00 % at step 20, last 50.00 %"
    assert lines[:2] == [f"sudoku run: {result}", "  all 20 steps are done"]
    rows = [line.split() for line in lines]
    assert ["10", "2.5", "s", "12.50", "%"] in rows
    assert ["20", "5.0", "s", "50.00", "%", "best"] in rows
    assert ["skipped", "steps", "1"] in rows
    assert "  3     skipped  a step was not finite" in lines
    assert lines[-1] == f"curves: {run / 'curves.png'}"
    assert names(run) - before == {"curves.png"}
    assert (run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_html_adds_one_page(tmp_path, capsys):
    run = write(tmp_path / "run")
    assert main(["report", str(run), "--html"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"page: {run / 'report.html'}"
    text = (run / "report.html").read_text()
    assert text.startswith("<!DOCTYPE html>") and "<title>sudoku: run</title>" in text


def test_out_takes_the_files_and_the_run_stays_as_it_was(tmp_path):
    run = write(tmp_path / "run")
    before = {file: file.read_bytes() for file in run.iterdir()}
    assert main(["report", str(run), "--html", "--out", str(tmp_path / "a" / "b")]) == 0
    assert names(tmp_path / "a" / "b") == {"curves.png", "report.html"}
    assert {file: file.read_bytes() for file in run.iterdir()} == before


def test_several_runs_are_one_table_and_one_drawing(tmp_path, capsys):
    runs = [write(tmp_path / "one"), write(tmp_path / "two", name="maze")]
    assert main(["report", *map(str, runs), "--html", "--out", str(tmp_path / "out")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name in ("one", "two"):
        told = [name, "finished", "20/20", "5.0", "s", "4", "exact_accuracy", "50.00", "%", "20"]
        assert [*told, "50.00", "%"] in rows
    text = (tmp_path / "out" / "report.html").read_text()
    assert "sudoku: one" in text and "maze: two" in text


def test_several_runs_need_a_place_for_their_drawing(tmp_path, capsys):
    runs = [write(tmp_path / "one"), write(tmp_path / "two")]
    assert error_of(capsys, *runs) == "report: --out must name the directory for 2 runs; got none"


def test_a_run_that_is_not_there_is_one_line(tmp_path, capsys):
    text = error_of(capsys, tmp_path / "nothing")
    assert text == (
        "report: RUN must be the directory of a run; got "
        f"{tmp_path / 'nothing'}, where there is nothing"
    )


def test_a_damaged_run_is_one_line_and_writes_nothing(tmp_path, capsys):
    run = write(tmp_path / "run")
    (run / "config.json").write_text("{")
    assert f"{run / 'config.json'}: must be JSON; got " in error_of(capsys, run)
    assert "curves.png" not in names(run)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    text = error_of(capsys, write(tmp_path / "run"), "--out", tmp_path / "file" / "x")
    assert text.startswith("report: ") and "Not a directory" in text


def test_an_unknown_flag_is_one_line(tmp_path, capsys):
    text = error_of(capsys, tmp_path, "--htm1")
    assert text == "report: unrecognized arguments: --htm1; did you mean '--html'?"


def test_a_missing_matplotlib_names_its_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = error_of(capsys, write(tmp_path / "run"))
    assert text == 'matplotlib is not installed: pip install "trm_fast[report]"'


def test_on_a_terminal_the_tables_are_drawn_and_texts_are_only_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["report", str(write(tmp_path / "run", "[red]a[/red]\x1b[2J"))]) == 0
    text = capsys.readouterr().out
    assert "│" in text and "50.00 %" in text
    assert "[red]a[/red]?[2J" in text


def test_the_output_for_a_file_has_no_control_characters(tmp_path, capsys):
    assert main(["report", str(write(tmp_path / "run", "a\x1b[2J\rb"))]) == 0
    text = capsys.readouterr().out
    assert "a?[2J?b" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)


def test_lines_are_aligned_numbers_to_the_right():
    assert aligned([("a", "bb"), ("ccc", "1")], numeric=True) == ["a    bb", "ccc   1"]
    assert aligned([("a", "bb"), ("ccc", "1")]) == ["a    bb", "ccc  1"]


def test_printable_keeps_what_can_be_read():
    assert printable("é ✓\n\x00") == "é ✓??"


def test_accuracies_in_percent_are_shown_as_such(tmp_path, capsys):
    run = write(tmp_path / "run", name="classify", percent=["accuracy"])
    with RunDirectory(run) as directory:
        record = {"kind": "evaluation", "step": 20, "seconds": 9.0, "accuracy": 21.5}
        directory.append("metrics.jsonl", record)
    assert main(["report", str(run)]) == 0
    text = capsys.readouterr().out
    assert "21.50 %" in text and "2150" not in text


def test_a_pipe_in_the_place_of_the_lock_is_refused(tmp_path):
    run = write(tmp_path / "a")
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    with pytest.raises(ValueError, match=r"\.lock: an ordinary file is required; got a pipe"):
        read_run(run)
