"""``pytest bench`` on tiny tables: turns, rows as items, and what pytest-benchmark makes of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each step writes its name to calls.txt, as do table and rows when they are made.
TABLES = """
import os
import time
from functools import partial

from ._tables import Case, Row, Unavailable, rows_of


def call(text):
    with open(os.environ["CALLS"], "a") as file:
        file.write(text + "\\n")


class Tiny:
    device = "cpu"
    baselines = ("base", "other base")
    floor = "floor"
    unit = "B"

    def __init__(self, name):
        self.name = name
        call(f"make {name}")
        if name == "wrong":
            raise AssertionError("the table is wrong")

    def row(self, name):
        call(f"row {self.name} {name}")
        if name == "missing":
            raise Unavailable("no such device")
        if name == "bad check":
            raise AssertionError("error must be small; got 1")
        step = lambda: self.step(name)
        work = None if name == "fast" else 1000.0
        return Row(step, items=4, work=work, facts=lambda: {"error": 0.5, "kept_bytes": 2048})

    def step(self, name):
        call(f"{self.name} {name}")
        time.sleep({"base": 0.002, "other base": 0.004}.get(name, 0.001))
        if name == "bad step" and counts["bad step"] == 2:
            raise RuntimeError("out of luck")
        counts[name] = counts.get(name, 0) + 1


counts = {"bad step": 0}
"""
PLAIN = """
ROWS = ("base", "fast", "floor")
test_tiny = rows_of([
    Case("first", "First table", partial(Tiny, "first"), ROWS, ("rare",)),
    Case("second", "Second table", partial(Tiny, "second"), (*ROWS, "other base")),
    Case("third", "Third table", partial(Tiny, "third"), ROWS, default=False),
])
"""
BROKEN = """
ROWS = ("base", "bad check", "bad step", "missing", "fast")
test_broken = rows_of([
    Case("rows", "Broken rows", partial(Tiny, "rows"), ROWS),
    Case("table", "Broken table", partial(Tiny, "wrong"), ("base", "fast")),
    Case("after", "After it", partial(Tiny, "after"), ("base", "fast")),
])
"""
NO_BASELINE = """
Tiny.baselines = ("bad check",)
test_broken = rows_of([Case("a", "A table", partial(Tiny, "a"), ("bad check", "fast"))])
"""
# A few samples are enough, as nothing is asserted about time.
QUICK = ("--benchmark-min-rounds=4", "--benchmark-max-time=0.01")
Done = subprocess.CompletedProcess[str]


class Folder:
    """A checkout with the machinery of the bench and tiny tables."""

    def __init__(self, path: Path, tables: str) -> None:
        self.path = path
        (path / "bench").mkdir()
        for file in (ROOT / "bench").glob("*.py"):
            if not file.name.startswith("bench_"):
                shutil.copy(file, path / "bench")
        (path / "bench/bench_tiny.py").write_text(TABLES + tables)
        (path / "pytest.ini").write_text(
            "[pytest]\naddopts = --import-mode=importlib\npython_files = bench_*.py\n"
        )

    def run(self, module: str, *arguments: str, **variables: str) -> Done:
        (self.path / "calls.txt").write_text("")
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=self.path, capture_output=True, text=True,
            env={"PATH": os.environ["PATH"], "CALLS": "calls.txt", **variables},
        )  # fmt: skip
        done.stdout += done.stderr
        return done

    def bench(self, *arguments: str, **variables: str) -> Done:
        return self.run("pytest", "bench", *QUICK, *arguments, **variables)

    def calls(self) -> list[str]:
        return (self.path / "calls.txt").read_text().splitlines()

    def saved(self, name: str) -> dict:
        return json.loads((self.path / name).read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path, PLAIN)


@pytest.fixture
def broken(tmp_path: Path) -> Folder:
    return Folder(tmp_path, BROKEN)


def outcomes(done: Done) -> str:
    """Returns the counts that pytest ends with, such as "1 failed, 2 passed, 1 warning"."""
    return re.findall(r"^=* ?(\d+ \w+.*) in [\d.]+s", done.stdout, re.MULTILINE)[-1]


def test_rows_are_measured_in_turns(folder: Folder) -> None:
    # Steps of a millisecond, of which a turn has at most eleven: at least four turns.
    done = folder.bench("-k", "first", "--benchmark-min-rounds=40")
    assert done.returncode == 0, done.stdout
    calls = folder.calls()
    assert calls[:4] == ["make first", "row first base", "row first fast", "row first floor"]
    steps = [call.removeprefix("first ") for call in calls[4:]]
    warm_up, turns = steps[:6], steps[6:]
    assert warm_up == ["base", "base", "fast", "fast", "floor", "floor"]
    blocks = [name for name, _ in groupby(turns)]
    assert all(blocks.count(name) >= 2 for name in ("base", "fast", "floor"))
    # No row is finished before each of the others has begun.
    first = {name: blocks.index(name) for name in blocks}
    last = {name: len(blocks) - 1 - blocks[::-1].index(name) for name in blocks}
    assert min(last.values()) > max(first.values())


def test_the_json_has_groups_samples_and_our_columns(folder: Folder) -> None:
    done = folder.bench("-k", "second", "--benchmark-json=x.json")
    assert done.returncode == 0, done.stdout
    saved = folder.saved("x.json")
    rows = {row["params"]["row"]: row for row in saved["benchmarks"]}
    assert [*rows] == ["base", "fast", "floor", "other base"]
    assert {row["group"] for row in rows.values()} == {"Second table"}
    assert rows["fast"]["fullname"] == "bench/bench_tiny.py::test_tiny[second-fast]"
    for row in rows.values():
        data = row["stats"]["data"]
        assert len(data) == row["stats"]["rounds"] >= 4
        # Times of an item, of which a step makes four; a step sleeps a millisecond at least.
        assert 0.001 / 4 <= min(data) == row["stats"]["min"]
    medians = {name: row["stats"]["median"] for name, row in rows.items()}
    info = rows["fast"]["extra_info"]
    assert info["ratio_to"] == {
        name: medians["fast"] / medians[name] for name in ("base", "other base")
    }
    assert (info["error"], info["kept_bytes"]) == (0.5, 2048)
    assert "bytes" not in info and "share_of_floor" not in info
    info = rows["base"]["extra_info"]
    assert (info["bytes"], info["floor"]) == (250.0, "floor")
    assert info["share_of_floor"] == pytest.approx(medians["floor"] / medians["base"])
    machine, commit = saved["machine_info"], saved["commit_info"]
    assert "node" not in machine and {"threads", "cores", "torch", "gpu", "packages"} <= {*machine}
    assert {"trm_fast", "trm_fast_commit", "compiler", "load_average"} <= {*commit}


@pytest.mark.long
def test_tables_are_printed_side_by_side(folder: Folder) -> None:
    done = folder.bench("-k", "second")
    table = done.stdout[done.stdout.index("bench, side by side") :]
    heading = next(line for line in table.splitlines() if "median" in line)
    assert heading.split("  ")[0] == ""
    for column in ("quartiles", "/ base", "/ other base", "moved", "GB/s", "of floor", "kept"):
        assert column in heading
    (base,) = (line for line in table.splitlines() if line.startswith("base "))
    assert " 1.00x " in base and " 250 B " in base and base.rstrip().endswith("2.05 kB")


@pytest.mark.long
def test_two_saved_runs_are_compared(folder: Folder) -> None:
    assert folder.bench("-k", "first", "--benchmark-autosave").returncode == 0
    done = folder.bench("-k", "first", "--benchmark-autosave", "--benchmark-compare")
    assert done.returncode == 0, done.stdout
    assert "Comparing against benchmarks from" in done.stdout
    assert "machine_info is different" not in done.stdout
    assert "(NOW)" in done.stdout and "(0001" in done.stdout
    files = [str(path) for path in sorted((folder.path / ".benchmarks").rglob("*.json"))]
    assert len(files) == 2
    done = folder.run("pytest_benchmark", "compare", *files, "--between=median")
    assert done.returncode == 0, done.stdout
    assert "First table" in done.stdout and "2 sources" in done.stdout


@pytest.mark.long
def test_a_regression_fails_and_the_tables_are_still_printed(folder: Folder) -> None:
    assert folder.bench("-k", "first", "--benchmark-autosave").returncode == 0
    (saved,) = (folder.path / ".benchmarks").rglob("*.json")
    run = json.loads(saved.read_text())
    for row in run["benchmarks"]:
        row["stats"]["median"] /= 1000
    saved.write_text(json.dumps(run))
    options = ("--benchmark-compare", "--benchmark-compare-fail=median:200%")
    done = folder.bench("-k", "first", *options)
    assert done.returncode != 0
    assert "Performance has regressed" in done.stdout and "bench, side by side" in done.stdout


@pytest.mark.long
def test_a_histogram_is_written_or_pygal_is_asked_for(folder: Folder) -> None:
    done = folder.bench("-k", "first", "--benchmark-histogram=plots/x")
    try:
        import pygal  # noqa: F401
    except ImportError:
        assert "Please install pygal" in done.stdout
    else:
        assert done.returncode == 0, done.stdout
        (plot,) = (folder.path / "plots").glob("*.svg")
        assert "test_tiny[first-fast]" in plot.read_text()


@pytest.mark.long
def test_disabled_each_row_takes_one_step(folder: Folder) -> None:
    done = folder.bench("-k", "first", "--benchmark-disable")
    assert done.returncode == 0 and outcomes(done).startswith("3 passed")
    assert folder.calls() == [
        "make first",
        *(
            line
            for row in ("base", "fast", "floor")
            for line in (f"row first {row}", f"first {row}")
        ),
    ]
    assert "side by side" not in done.stdout


@pytest.mark.long
def test_under_xdist_nothing_is_timed(folder: Folder) -> None:
    done = folder.bench("-k", "first", "-n2", "--benchmark-json=x.json")
    assert done.returncode == 0 and outcomes(done).startswith("3 passed")
    assert "automatically disabled because xdist" in done.stdout
    assert not (folder.path / "x.json").exists()
    steps = [call for call in folder.calls() if call.startswith("first")]
    assert sorted(steps) == ["first base", "first fast", "first floor"]


@pytest.mark.long
def test_one_row_is_measured_with_its_baseline_and_floor(folder: Folder) -> None:
    done = folder.bench("-k", "second and fast", "--benchmark-json=x.json", "--benchmark-only")
    assert done.returncode == 0 and outcomes(done).startswith("1 passed")
    (row,) = folder.saved("x.json")["benchmarks"]
    assert row["params"]["row"] == "fast" and {*row["extra_info"]["ratio_to"]} == {"base"}
    measured = {call for call in folder.calls() if call.startswith("row")}
    assert measured == {"row second fast", "row second base", "row second floor"}


def test_broken_rows_fail_alone(broken: Folder) -> None:
    done = broken.bench("--benchmark-json=x.json")
    assert done.returncode == 1
    assert outcomes(done).startswith("4 failed, 4 passed, 1 skipped")
    kept = [(row["group"], row["params"]["row"]) for row in broken.saved("x.json")["benchmarks"]]
    assert kept == [
        ("Broken rows", "base"),
        ("Broken rows", "fast"),
        ("After it", "base"),
        ("After it", "fast"),
    ]
    assert "RuntimeError: out of luck" in done.stdout
    assert "bad check: AssertionError: error must be small; got 1" in done.stdout
    assert "missing: not measured: no such device" in done.stdout
    assert "AssertionError: the table is wrong" in done.stdout


@pytest.mark.long
def test_a_broken_baseline_costs_the_ratios_only(tmp_path: Path) -> None:
    folder = Folder(tmp_path, NO_BASELINE)
    done = folder.bench("-k", "fast", "--benchmark-json=x.json")
    assert done.returncode == 0, done.stdout
    (row,) = folder.saved("x.json")["benchmarks"]
    assert row["extra_info"]["ratio_to"] == {}
    assert "bad check: AssertionError: error must be small; got 1" in done.stdout


@pytest.mark.long
def test_rows_left_out_are_measured_on_demand(folder: Folder) -> None:
    listed = ("--collect-only", "-q")
    assert "7 tests collected" in folder.bench(*listed).stdout.replace("7/11", "7")
    assert "11 tests collected" in folder.bench(*listed, "--all-rows").stdout
    # Those alone need no flag.
    assert "test_tiny[first-rare]" in folder.bench(*listed, "-k", "rare").stdout


@pytest.mark.long
def test_the_interpreter_of_triton_is_never_timed(folder: Folder) -> None:
    done = folder.bench(TRITON_INTERPRET="1")
    assert done.returncode == 4 and "unset TRITON_INTERPRET" in done.stdout


@pytest.mark.long
def test_without_pytest_benchmark_the_message_names_the_command(folder: Folder) -> None:
    done = folder.run("pytest", "bench", "-p", "no:benchmark")
    assert done.returncode == 4 and "pip install -e '.[bench]'" in done.stdout


@pytest.mark.long
def test_the_decoder_of_the_tables_is_that_of_the_recipe() -> None:
    code = (
        "from bench._workload import SIZES; from trm_fast.recipes.grokking.model import Decoder; "
        "shapes = [tuple(param.shape) for param in Decoder(tokens=99).parameters()]; "
        "assert SIZES['grokking decoder'] == shapes, shapes"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.long
def test_committed_results_are_compared_in_the_checkout() -> None:
    # From here pytest-benchmark imports the conftest.py of the tests, in its own way.
    command = [sys.executable, "-m", "pytest_benchmark", "--storage=bench/results", "compare"]
    done = subprocess.run(
        [*command, "0001", "0003", "-k", "filter_sums", "--between=median"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "'Sums of gradients and means, TRM 7M, cpu': 5 tests, 2 sources" in done.stdout
