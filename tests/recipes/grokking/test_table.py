"""The report of the grokking benchmark: reached, not reached, diverged, and what is still open."""

import dataclasses
import struct

import pytest

from trm_fast.recipes.grokking import GrokkingConfig
from trm_fast.recipes.grokking.bench import runs as bench
from trm_fast.recipes.grokking.bench.runs import Outcome, Plan, Timing
from trm_fast.recipes.grokking.bench.table import report, write_report

PLAIN, EMA, HIGHPASS = (f"adamw-wd1-{name}" for name in ("plain", "ema", "highpass"))
HERE = {"processor": "Abacus", "threads": 1, "torch": "2.13.0", "trm_fast": "0.1.0"}


def plan_of(out, rows=(PLAIN, EMA), seeds=(0, 1, 2), **fields):
    return Plan(rows, seeds, GrokkingConfig(**{"iterations": 3000, **fields}), out)


def outcome(plan, row, seed, reached=None, accuracy=0.25, **fields):
    """A run that ended at ``reached``, or after all iterations at an accuracy."""
    end = reached or plan.base.iterations
    curve = {
        "iteration": [end // 2, end],
        "train_accuracy": [0.5, 1.0],
        "validation_accuracy": [0.125, 0.96 if reached else accuracy],
    }
    base = Outcome(
        row=row,
        seed=seed,
        config=bench._as_json(plan.config(row, seed)),
        reached=reached,
        diverged=False,
        iterations=end,
        wall_seconds=1.0,
        cpu_seconds=1.0,
        environment=HERE,
        curve=curve,
    )
    return dataclasses.replace(base, **fields)


def outcomes_of(plan, **reached):
    """Outcomes per row, by the last word of its name; ... stands for a run that is still open."""
    rows = {row.rpartition("-")[2]: row for row in plan.rows}
    return {
        (rows[name], seed): outcome(plan, rows[name], seed, value)
        for name, values in reached.items()
        for seed, value in zip(plan.seeds, values, strict=True)
        if value is not ...
    }


def lines_of(plan, outcomes, timing=None):
    """The lines of the tables, as lists of cells by filter."""
    text = report(plan, outcomes, timing, "")
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in rows}


def test_the_columns_are_named(tmp_path):
    plan = plan_of(tmp_path)
    assert lines_of(plan, {})["filter"] == [
        *("seed 0", "seed 1", "seed 2", "median", "range", "gain", "ms each", "seconds")
    ]


def test_a_row_shows_every_seed_median_range_and_gain(tmp_path):
    plan = plan_of(tmp_path)
    found = outcomes_of(plan, plain=[1200, 1000, 2000], ema=[910, 400, 1330])
    lines = lines_of(plan, found)
    assert lines["none"][:6] == ["1,200", "1,000", "2,000", "**1,200**", "1,000 to 2,000", ""]
    line = lines["ema, alpha 0.98, lamb 2"]
    assert line[:6] == ["910", "400", "1,330", "**910**", "400 to 1,330", "1.32"]


@pytest.mark.parametrize(
    ("reached", "median", "range"),
    [
        ([900, 1000, None], "**1,000**", "900 to > 3,000"),
        ([900, None, None], "not within 3,000", "900 to > 3,000"),
        ([None, None, None], "not within 3,000", ""),
        ([900, 1001], "**950**", "900 to 1,001"),
        ([900, None], "not within 3,000", "900 to > 3,000"),
        ([900, 1000, 2000, None], "**1,500**", "900 to > 3,000"),
        ([900, 1000, None, None], "not within 3,000", "900 to > 3,000"),
    ],
)
def test_a_run_that_did_not_get_there_counts_as_infinite(tmp_path, reached, median, range):
    plan = plan_of(tmp_path, seeds=tuple(map(int, [*"0123"][: len(reached)])))
    line = lines_of(plan, outcomes_of(plan, plain=reached))["none"]
    seeds = len(reached)
    assert line[:seeds] == [f"{x:,}" if x else "> 3,000 (25%)" for x in reached]
    assert line[seeds : seeds + 2] == [median, range]


def test_a_target_reached_after_the_limit_is_not_within_it(tmp_path):
    long = plan_of(tmp_path, iterations=9000)
    found = outcomes_of(long, plain=[2000, 4000, 8000])
    line = lines_of(plan_of(tmp_path), found)["none"]
    # 8000 / 2 = 4000 is the first evaluation of the last run, so nothing is known below 3000.
    assert line[:4] == ["2,000", "> 3,000 (12%)", "> 3,000 (0%)", "not within 3,000"]


def test_a_run_that_diverged_is_said_and_counts_as_infinite(tmp_path):
    plan = plan_of(tmp_path)
    found = outcomes_of(plan, plain=[900, 1000, 1100])
    found[PLAIN, 1] = outcome(plan, PLAIN, 1, iterations=120, diverged=True)
    line = lines_of(plan, found)["none"]
    assert line[:5] == ["900", "diverged at 120", "1,100", "**1,100**", "900 to > 3,000"]


@pytest.mark.parametrize(
    ("plain", "ema", "gain"),
    [
        ([1000, 1000, 1000], [2000, 2000, 2000], "0.50"),
        ([None, None, None], [1000, 1000, 1000], "> 3"),
        ([1500, 1500, 1500], [None, None, None], "< 0.5"),
        ([None, None, None], [None, None, None], ""),
        ([1000, 1000, 1000], [..., ..., ...], ""),
        # Only seed 1 is finished for both.
        ([..., 3000, 100], [200, 1000, ...], "3.00"),
    ],
)
def test_the_gain_compares_the_seeds_that_both_rows_have(tmp_path, plain, ema, gain):
    plan = plan_of(tmp_path)
    lines = lines_of(plan, outcomes_of(plan, plain=plain, ema=ema))
    assert lines["ema, alpha 0.98, lamb 2"][5] == gain


def test_another_weight_decay_is_another_table_without_a_common_gain(tmp_path):
    plan = plan_of(tmp_path, rows=(PLAIN, "adam-wd0.005-ema"))
    found = outcomes_of(plan, plain=[1000] * 3, ema=[500] * 3)
    text = report(plan, found, None, "")
    assert "## AdamW, weight decay 1\n" in text and "## Adam (L2), weight decay 0.005\n" in text
    assert lines_of(plan, found)["ema, alpha 0.98, lamb 2"][5] == ""


def test_seconds_are_iterations_times_the_measured_time(tmp_path):
    plan = plan_of(tmp_path, rows=(PLAIN, EMA, HIGHPASS))
    found = outcomes_of(plan, plain=[1000, 1200, 1400], ema=[None] * 3, highpass=[1000] * 3)
    timing = Timing({PLAIN: 0.05, EMA: 0.0625}, rounds=9, environment=HERE)
    lines = lines_of(plan, found, timing)
    assert lines["none"][6:] == ["50.0", "60.0"]
    assert lines["ema, alpha 0.98, lamb 2"][6:] == ["62.5", "> 187.5"]
    assert lines["highpass, alpha 0.98, lamb 0.1"][6:] == ["", ""]
    assert "median of 9 epochs" in report(plan, found, timing, "")
    assert "the time is not measured yet" in report(plan, found, None, "")


def test_the_text_says_what_is_finished(tmp_path):
    plan = plan_of(tmp_path)
    found = outcomes_of(plan, plain=[900, 900, ...], ema=[900, ..., ...])
    expected = (
        "**Not complete.** Finished: all rows of seed 0, 1 of 2 rows of seed 1, "
        "0 of 2 rows of seed 2."
    )
    assert expected in report(plan, found, None, "")
    whole = outcomes_of(plan, plain=[900] * 3, ema=[900] * 3)
    text = report(plan, whole, None, "")
    assert "Seeds: 0, 1, 2; all 6 runs are finished." in text and "Not complete" not in text


def test_the_text_says_where_runs_and_times_come_from(tmp_path):
    plan = plan_of(tmp_path)
    found = outcomes_of(plan, plain=[900] * 3)
    found[PLAIN, 2] = outcome(plan, PLAIN, 2, 900, environment={**HERE, "threads": 2})
    text = report(plan, found, Timing({}, 9, HERE), "")
    place = "torch 2.13.0, trm_fast 0.1.0"
    assert f"Runs: Abacus, 1 thread, {place}; Abacus, 2 threads, {place}." in text
    assert f"Times: Abacus, 1 thread, {place}." in text


def test_the_report_is_made_again_from_the_files(tmp_path):
    plan = plan_of(tmp_path / "runs")
    plan.out.mkdir()
    path = tmp_path / "docs" / "grokking.md"
    write_report(plan, path)
    assert "0 of 2 rows of seed 0" in path.read_text() and not path.with_suffix(".png").exists()
    for (row, seed), found in outcomes_of(plan, plain=[900, 1000, ...]).items():
        bench._write(plan.path(row, seed), found)
    write_report(plan, path)
    text = path.read_text()
    assert "| none | 900 | 1,000 |  | **950** |" in text
    assert "![validation accuracy over iterations](grokking.png)" in text
    path.unlink()
    write_report(plan, path)
    assert path.read_text() == text


@pytest.mark.parametrize("name", ["report.md", "report.png"])
def test_the_report_is_a_file_of_its_own(tmp_path, name):
    plan = plan_of(tmp_path / "runs")
    plan.out.mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "mine")
    bench._write(plan.path(PLAIN, 0), outcome(plan, PLAIN, 0, 300))
    write_report(plan, tmp_path / "report.md")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / name).is_symlink()


def test_the_figure_is_a_png_of_readable_size_with_a_panel_per_family(tmp_path):
    sizes = []
    for rows in (
        (PLAIN, EMA),
        (PLAIN, EMA, "muon-wd1-plain"),
        (PLAIN, "muon-wd1-ema", "adam-wd0-plain"),
    ):
        plan = plan_of(tmp_path / str(len(sizes)), rows=rows)
        plan.out.mkdir()
        for row in rows:
            bench._write(plan.path(row, 0), outcome(plan, row, 0, 900))
        write_report(plan, plan.out / "report.md")
        data = (plan.out / "report.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append(struct.unpack(">II", data[16:24]))
    assert sizes[0][0] >= 600 and sizes[0][1] >= 500
    assert sizes[1] == (2 * sizes[0][0], sizes[0][1])  # two panels side by side
    assert sizes[2][0] == sizes[1][0] and sizes[2][1] > sizes[1][1]  # the third one below
