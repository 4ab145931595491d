"""Mutated files end in a declared error; ``python -m tests.fuzz`` does the same for longer."""

import os
from collections import Counter
from itertools import count, takewhile
from random import Random

import pytest

from . import fuzz as fuzz_module
from .fuzz import fuzz
from .support.fuzz_jobs import run_jobs
from .support.mutations import mutated
from .support.readers import READERS
from .support.restorable import Restorable

# Inputs of these take tens of milliseconds, and hundreds of them where something is drawn.
SLOW = {"draw_bench", "draw_report", "eval", "resume_settings"}
NAMES = [
    pytest.param(name, marks=pytest.mark.long) if name.startswith("draw") else name
    for name in READERS
]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "number", [6, pytest.param(400, marks=pytest.mark.long)], ids=["short", "long"]
)
@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_are_read_or_refused(tmp_path, name, number, traced):
    if name in SLOW:
        number //= 6
    if traced:
        number //= 2  # several times slower
    found = fuzz(name, range(number), 0, tmp_path, traced)
    assert not [said for said in found if said.startswith("!")]
    assert found.total() == number


def reading(monkeypatch, read, name="npy"):
    monkeypatch.setitem(READERS, name, READERS[name]._replace(read=read))


def test_an_undeclared_exception_is_counted(tmp_path, monkeypatch):
    def read(folder):
        if b"\x93NUMPY" not in (folder / "a.npy").read_bytes():
            raise KeyError("a")

    reading(monkeypatch, read)
    found = fuzz("npy", range(40), 0, tmp_path)
    assert any(said.startswith("!KeyError in test_fuzz.py:") for said in found)


@pytest.mark.parametrize("blocked", [False, True])
def test_a_reader_that_does_not_end_is_interrupted(tmp_path, monkeypatch, blocked):
    monkeypatch.setattr(fuzz_module, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz_module, "WAITING", 0.2 if blocked else 300)
    calls = count()
    os.mkfifo(tmp_path.with_suffix(".pipe"))

    def read(folder):
        first = next(calls) == 0
        while not first:
            try:
                if blocked:
                    tmp_path.with_suffix(".pipe").read_bytes()
            except Exception:  # which must not keep it from being interrupted
                continue

    reading(monkeypatch, read)
    found = fuzz("npy", range(2), 0, tmp_path)
    assert len(found) == 2 and all(said.startswith("!hang in ") for said in found)


@pytest.mark.parametrize("traced", [False, True])
def test_memory_beyond_the_multiple_is_counted(tmp_path, monkeypatch, traced):
    monkeypatch.setattr(fuzz_module, "FIXED", 0)
    sizes = iter((0, 80, 64, 70))  # of these, each is given back to the system
    reading(monkeypatch, lambda folder: b"x" * (next(sizes) << 20))
    found = fuzz("npy", range(3), 0, tmp_path, traced)
    assert all(said.startswith("!") and " MB for files of " in said for said in found), found


def test_an_input_that_ends_the_process_is_counted_and_passed():
    def work(numbers):
        found = Counter()
        for number in numbers:
            if number == 5:
                os._exit(3)
            found["read"] += 1
        return found

    def numbers(job, after):
        return takewhile((20).__gt__, count(job if after is None else after + 2, 2))

    found = run_jobs(work, numbers, 2, 60)
    assert found == {"read": 17, "not counted": 2, "!ended by 3 (--start 5)": 1}


def test_files_come_back_as_they_were(tmp_path):
    for name in ("a", "b/c", "b/d", "e/f"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = Restorable(tmp_path)
    for name in ("a", "b/c"):
        (tmp_path / name).write_text("x" * len(name))
    (tmp_path / "b" / "d").unlink()
    (tmp_path / "e" / "f").rename(tmp_path / "new")
    (tmp_path / "e").rmdir()
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "h").symlink_to("nowhere")
    files.restore()
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"a", "b/c", "b/d", "e/f"} and not (tmp_path / "g").exists()
    assert all((tmp_path / name).read_text() == name for name in found)


def test_mutations_are_those_of_the_seed():
    data = b'{"a": [1, 2, {"b": "x"}]}'
    one, two = ([mutated(data, Random(seed), ".json") for seed in range(50)] for _ in range(2))
    assert one == two and len({*one}) > 20
