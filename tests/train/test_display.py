"""What shows a run may break in any way; the run, its files and its exit code stay as they were."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trm_fast.cli import main
from trm_fast.train import Progress
from trm_fast.train.display import Display, show_line, warn_from_handler

from .runs import STEPS, differences, function_run, result


class Refuses(io.StringIO):
    """Raises an error from the first character on, or from a later one."""

    def __init__(self, error: Exception, room: int = 0) -> None:
        super().__init__()
        self.error, self.room = error, room

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.room:
            raise self.error
        return super().write(text)

    def isatty(self) -> bool:
        return True


class OnlyWrites:
    """What a program may put in the place of stdout."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def without_reader() -> Any:
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", closefd=False)


STREAMS: dict[str, Callable[[], Any]] = {
    "EIO": lambda: Refuses(OSError(errno.EIO, "Input/output error")),
    "EIO later": lambda: Refuses(OSError(errno.EIO, "Input/output error"), room=500),
    "ENOSPC": lambda: Refuses(OSError(errno.ENOSPC, "No space left on device"), room=100),
    "another error": lambda: Refuses(RuntimeError("a widget is gone")),
    "no reader": without_reader,
    "closed": closed,
    "none": lambda: None,
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
    "only writes": OnlyWrites,
}


@pytest.mark.parametrize("bar", [False, True, None])
@pytest.mark.parametrize("name", STREAMS)
def test_a_run_goes_on_whatever_stands_in_the_place_of_stdout(name, bar, monkeypatch):
    monkeypatch.setattr(sys, "stdout", STREAMS[name]())
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    assert function_run(None, (Progress(bar=bar),)).fit().step == STEPS


def test_a_terminal_that_is_closed_changes_nothing_in_a_run(tmp_path, monkeypatch):
    function_run(tmp_path / "alone").fit()
    monkeypatch.setattr(sys, "stdout", STREAMS["EIO later"]())
    function_run(tmp_path / "shown", (Progress(),)).fit()
    assert differences(result(tmp_path / "alone"), result(tmp_path / "shown")) == []


def test_the_first_display_of_a_process_draws_nothing():
    # In a process of its own: what is imported at random is so once.
    code = """
import random, sys, torch
from trm_fast.train import Progress, Trainer, TrainerConfig

class Drawn(Progress):
    def on_start(self, run):
        before = random.getstate()
        super().on_start(run)
        assert "rich.style" in sys.modules and random.getstate() == before
        run.stop("seen")

model = torch.nn.Linear(1, 1)
loss = lambda model, batch: model(batch).sum()
optimizer = torch.optim.SGD(model.parameters())
assert "rich" not in sys.modules
Trainer(model, optimizer, [torch.ones(1, 1)], loss, callbacks=[Drawn(bar=True)], device="cpu").fit()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_encoding_without_the_characters_shows_question_marks(monkeypatch):
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, "ascii"))
    show_line("größer \udc80")
    assert data.getvalue() == b"gr??er ?\n"


def test_a_stream_that_only_writes_is_enough(monkeypatch):
    stream = OnlyWrites()
    monkeypatch.setattr(sys, "stdout", stream)
    show_line("a line")
    assert stream.text == "a line\n" and not Display(stream).isatty()


def test_a_handler_writes_into_no_file_that_has_the_number_of_stderr(monkeypatch, capfd):
    warn_from_handler("told")
    assert capfd.readouterr().err == "told\n"
    monkeypatch.setattr(sys, "__stderr__", None)
    warn_from_handler("not told")
    assert capfd.readouterr().err == ""


TRAIN = "train grokking --prime 7 --iterations 2 --plot false --device cpu --out"


@pytest.mark.parametrize("name", STREAMS)
def test_a_training_has_its_exit_code_whatever_takes_its_words(name, tmp_path, monkeypatch):
    stream = STREAMS[name]()
    monkeypatch.setattr(sys, "stdout", stream)
    assert main([*TRAIN.split(), str(tmp_path)]) == 0
    assert sys.stdout is stream


@pytest.mark.parametrize(
    ("command", "where", "code", "said"),
    [
        (TRAIN, "> /dev/full 2> /dev/full", 0, ""),
        ("train nonsense", "2> /dev/full", 2, ""),
        ("--help", "> /dev/full", 2, "trm-fast: stdout: No space left on device\n"),
        ("nonsense", "2>&-", 2, ""),
    ],
)
def test_a_full_disk_behind_a_stream(command, where, code, said, tmp_path):
    out = tmp_path / "run" if command.endswith("--out") else ""
    line = f"{sys.executable} -m trm_fast {command} {out} {where}"
    # As from a shell: what is printed is collected.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=buffered)
    assert (done.returncode, done.stderr, done.stdout) == (code, said, "")


def test_words_go_into_no_file_of_a_run_that_is_started_without_streams(tmp_path):
    line = f"exec {sys.executable} -m trm_fast {TRAIN} {tmp_path / 'run'} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", line]).returncode == 0
    for path in sorted(Path(tmp_path).rglob("*.jsonl")):
        assert all(line.startswith("{") for line in path.read_text().splitlines()), path
