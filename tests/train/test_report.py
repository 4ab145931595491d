"""What a report says of a run: read from files written here by hand, and drawn."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from trm_fast._dispatch import OPS, Op
from trm_fast.train import Checkpoints, RunDirectory, Summary
from trm_fast.train._summary import summary_values
from trm_fast.train.backends import used
from trm_fast.train.reports import tables
from trm_fast.train.reports.curves import _figure, png, svg
from trm_fast.train.reports.page import page
from trm_fast.train.reports.reading import metrics_of, read_run

SETTINGS = {"batch": 8, "train": {"steps": 40, "monitor": "exact_accuracy", "mode": "max"}}
MACHINE = {"name": "sudoku", "torch": "2.13.0", "device": "a CPU (cpu)"}
# Evaluations at 10, 20, 30 and 40; the second and the fourth are equally good.
EXACT = (0.25, 0.75, math.nan, 0.75)


def record(kind, step, **metrics):
    return {"kind": kind, "step": step, "seconds": step / 10, **metrics}


def records():
    for step in range(5, 45, 5):
        pace = 2.0 if step % 10 else 4.0
        train = {"loss": 2.0 / step, "lm_loss": 1.0 / step, "accuracy": step / 80, "lr": 1e-3}
        yield record("train", step, **train, steps_per_second=pace)
        if step % 10 == 0:
            exact = EXACT[step // 10 - 1]
            yield record("evaluation", step, count=50.0, lm_loss=1.5 / step, exact_accuracy=exact)


def shown(settings):
    """How the trainer of these settings says that the run is to be shown."""
    return {**settings.get("train", {}), "examples": settings.get("batch")}


def write(path, settings=SETTINGS, lines=None, events=(), summary=None, checkpoints=()):
    """A run directory as a trainer leaves it."""
    with RunDirectory(path) as run:
        run.write_json("config.json", settings)
        run.write_json("run.json", {**MACHINE, "report": shown(settings)})
        for line in records() if lines is None else lines:
            run.append("metrics.jsonl", line)
        for name, step in events:
            run.append("events.jsonl", {"event": name, "step": step, "message": f"{name}!"})
        if summary is not None:
            run.write_json("summary.json", summary)
        for step, score in checkpoints:
            state = {"model": {"weight": torch.ones(3)}}
            Checkpoints(path).save(step, state, score=score, summary={"exact_accuracy": score})
    return path


@pytest.fixture
def tmp_path(memory):
    """Every file of a run is synced, which a disk that others use may take seconds for."""
    return memory


@pytest.fixture
def run(tmp_path):
    return write(tmp_path / "run", checkpoints=[(20, 0.75), (30, 0.5), (40, 0.7)])


def test_a_report_has_what_the_run_has_written(run):
    report = read_run(run)
    assert (report.name, report.step, report.steps, report.seconds) == ("sudoku", 40, 40, 4.0)
    assert report.settings["train.monitor"] == "exact_accuracy" and report.settings["batch"] == 8
    assert report.environment == MACHINE
    assert [r["step"] for r in report.train] == list(range(5, 45, 5))
    assert [r["step"] for r in report.evaluations] == [10, 20, 30, 40]
    assert report.pace == 3.0  # the median of four times 2 and four times 4
    assert report.notes == []


def test_the_best_evaluation_is_the_first_of_equal_ones_and_never_nan(run):
    report = read_run(run)
    assert (report.monitor, report.mode) == ("exact_accuracy", "max")
    assert report.best["step"] == 20 and report.last["step"] == 40
    assert math.isnan(report.evaluations[2]["exact_accuracy"])


def test_mode_min_takes_the_least(tmp_path):
    settings = {"train": {"monitor": "lm_loss", "mode": "min", "steps": 40}}
    report = read_run(write(tmp_path / "run", settings))
    assert report.best["step"] == 40 and report.best["lm_loss"] == 1.5 / 40


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"lm_loss": 1.0, "accuracy": 0.5, "exact_accuracy": 0.25}, ("exact_accuracy", "max")),
        ({"validation_loss": 1.0, "validation_accuracy": 0.5}, ("validation_accuracy", "max")),
        ({"mse": 1.0, "lm_loss": 1.0}, ("lm_loss", "min")),
        ({"mse": 1.0}, ("mse", "min")),
        ({}, ("", "min")),
    ],
)
def test_without_a_monitor_the_metric_says_what_is_best(tmp_path, metrics, expected):
    report = read_run(write(tmp_path / "run", {}, [record("evaluation", 1, **metrics)]))
    assert (report.monitor, report.mode) == expected


def test_checkpoints_are_told_without_their_tensors(run):
    report = read_run(run)
    assert [info.step for info in report.checkpoints] == [20, 30, 40]
    assert (report.latest, report.best_checkpoint) == ("step-00000040", "step-00000020")
    row = tables.checkpoints(report).rows[0]
    size = sum(file.stat().st_size for file in report.checkpoints[0].path.iterdir())
    assert row == ("step-00000020", tables.size_text(size), "0.75", "best", "75.00 %")


def test_a_damaged_checkpoint_is_told_with_its_reason(run):
    state = run / "ckpt" / "step-00000030" / "state.json"
    state.write_bytes(state.read_bytes()[:-1])
    told = tables.checkpoints(read_run(run)).rows
    assert [row[0] for row in told if "state.json must have" in row[-1]] == ["step-00000030"]


@pytest.mark.parametrize(
    ("events", "summary", "lines", "expected"),
    [
        ([], None, None, "finished"),
        ([], {}, None, "finished"),
        ([], {"reason": "target", "signal": None, "step": 40}, None, "finished"),
        ([], {"reason": "interrupted by SIGTERM", "signal": 15, "step": 40}, None, "interrupted"),
        ([("interrupted", 20)], None, [record("train", 20)], "interrupted"),
        ([("interrupted", 20), ("resumed", 20)], None, [record("train", 30)], "unfinished"),
        ([("skipped", 20), ("stopped", 20)], {}, [record("train", 20)], "stopped"),
        ([], {}, [record("train", 20)], "unfinished"),
        ([], {}, [], "empty"),
        ([], None, [], "empty"),
    ],
)
def test_the_state_is_what_the_run_has_said(tmp_path, events, summary, lines, expected):
    report = read_run(write(tmp_path / "run", events=events, summary=summary, lines=lines))
    assert report.state == expected and report.reason


def test_a_run_whose_trainer_is_at_work_is_running(run):
    with RunDirectory(run):
        assert read_run(run).state == "running"
    assert read_run(run).state == "finished"


def test_an_empty_run_has_no_numbers_and_is_drawn(tmp_path):
    report = read_run(write(tmp_path / "run", lines=[]))
    assert (report.step, report.best, report.last, report.evaluations) == (0, None, None, [])
    assert math.isnan(report.pace)
    assert tables.sentence(report) == "empty at step 0 of 40: there is no evaluation"
    assert png([report])[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_torn_last_line_is_left_out_and_noted(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind":"train","st')
    report = read_run(run)
    assert report.train[-1]["step"] == 40
    assert "metrics.jsonl: its last line is torn and left out" in report.notes


def test_missing_files_are_noted(run):
    (run / "run.json").unlink()
    assert read_run(run).notes == ["run.json is missing"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "config.json: must be JSON; got "),
        ("config.json", "[1]", "config.json: must be a JSON object; got list"),
        ("run.json", "[" * 100_000, "run.json: must be nested at most 64 deep; got 100000"),
        (
            "summary.json",
            '{"backends": [1]}',
            "summary.json: backends must be an object",
        ),
        (
            "summary.json",
            '{"backends": {"a": {"calls": 1}}}',
            "calls of each op must be an object",
        ),
        ("metrics.jsonl", 'x\n{"kind":"train","step":1}\n', "metrics.jsonl:1: must be JSON"),
        ("metrics.jsonl", '{"kind":"train"}\n', "record 1 must have a kind and a step >= 0"),
        ("metrics.jsonl", '{"kind":"train","step":-1}\n', "record 1 must have a kind and a step"),
        ("metrics.jsonl", '{"kind":"train","step":true}\n', "record 1 must have a kind and a step"),
        ("events.jsonl", '{"step":1}\n', "record 1 must have an event and a step >= 0"),
    ],
)
def test_damaged_files_are_named_in_one_line(run, name, text, message):
    (run / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_run(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_link_is_none_of_the_run(run, tmp_path, name):
    target = (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(target)
    with pytest.raises(ValueError, match="must be a regular file; got a link"):
        read_run(run)


@pytest.mark.parametrize("name", [".lock", "config.json", "run.json", "events.jsonl"])
def test_a_pipe_in_a_run_is_refused_at_once(run, name):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(ValueError, match=re.escape(name) + ".*; got a pipe") as caught:
        read_run(run)
    assert "\n" not in str(caught.value)


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    empty, file, nothing = tmp_path, tmp_path / "file", tmp_path / "nothing"
    wrong = {empty: "without config.json", file: "a file", nothing: "where there is nothing"}
    for path, found in wrong.items():
        text = f"RUN must be the directory of a run; got {path}, {found}"
        with pytest.raises(ValueError, match=re.escape(text)):
            read_run(path)


def test_reading_a_run_without_checkpoints_loads_no_torch(tmp_path):
    write(tmp_path / "run")
    code = (
        "import sys; from trm_fast.train.reports.reading import read_run; read_run(sys.argv[1]); "
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def panels(*reports):
    return {axes.get_ylabel(): axes for axes in _figure(reports, "black", "grey").axes}


def drawn(axes):
    return {
        line.get_label(): dict(zip(*(data.tolist() for data in line.get_data()), strict=True))
        for line in axes.get_lines()
    }


def test_the_curves_are_the_records(run):
    axes = panels(read_run(run))
    losses = drawn(axes["lm_loss"])
    assert losses["lm_loss, training"] == {step: 1.0 / step for step in range(5, 45, 5)}
    assert losses["lm_loss, evaluation"] == {step: 1.5 / step for step in range(10, 50, 10)}
    shares = drawn(axes["share, %"])
    assert shares["accuracy, training"] == {step: 100 * step / 80 for step in range(5, 45, 5)}
    exact = shares["exact_accuracy, evaluation"]
    assert [exact[10], exact[20], exact[40]] == [25.0, 75.0, 75.0] and math.isnan(exact[30])
    (pace,) = drawn(axes["steps/s"]).values()
    assert set(pace.values()) == {2.0, 4.0}


def test_training_and_evaluation_of_one_loss_are_drawn_whatever_their_prefix(tmp_path):
    lines = [record("train", 1, loss=3.0, train_loss=2.0, train_accuracy=0.5),
             record("evaluation", 1, validation_loss=1.0, validation_accuracy=0.25)]  # fmt: skip
    axes = panels(read_run(write(tmp_path / "run", {}, lines)))
    assert [label for label in drawn(axes["loss"])] == ["loss, training", "loss, evaluation"]
    assert drawn(axes["accuracy, %"])["accuracy, evaluation"] == {1: 25.0}


def test_a_resume_is_marked_where_it_was(tmp_path):
    run = write(tmp_path / "run", events=[("resumed", 20), ("resumed", 30), ("skipped", 35)])
    marks = [line for line in panels(read_run(run))["steps/s"].get_lines() if line.is_dashed()]
    assert [list(line.get_xdata()) for line in marks] == [[20, 20], [30, 30]]


def test_several_runs_are_drawn_in_colours_of_their_own(run, tmp_path):
    other = write(tmp_path / "_other $x_{", lines=[record("evaluation", 7, exact_accuracy=0.5)])
    axes = panels(read_run(run), read_run(other))["exact_accuracy, %"]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert {"run", r" _other \$x_{"} <= {*lines}
    assert len({lines["run"].get_color(), lines[r" _other \$x_{"].get_color()}) == 2
    assert png([read_run(run), read_run(other)])[:4] == b"\x89PNG"


def test_the_drawing_of_a_page_is_xml_in_its_colours_and_the_same_each_time(run):
    text = svg([read_run(run)])
    ElementTree.fromstring(text)
    assert "currentColor" in text and "var(--line)" in text
    assert "#010203" not in text and "#040506" not in text
    assert text == svg([read_run(run)])


class Page(HTMLParser):
    """Collects elements and texts, and checks that each element is closed in its place."""

    VOID = ("meta", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


HOSTILE = "<script>alert(1)</script><img src=http://x/y>&\x1b[31m"


def test_the_page_is_whole_and_asks_for_nothing(run):
    with RunDirectory(run) as directory:
        directory.write_json("run.json", {**MACHINE, "device": HOSTILE})
        directory.append("events.jsonl", {"event": "skipped", "step": 3, "message": HOSTILE})
    report = read_run(run)
    text = page([report], svg([report]))
    found = Page(text)
    tags = {tag for tag, _ in found.found}
    assert not tags & {"script", "img", "link", "iframe", "object", "base"}
    targets = [
        value
        for _, attributes in found.found
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "data")
    ]
    assert all(target.startswith("#") for target in targets)
    assert "\x1b" not in text
    policy = [a["content"] for tag, a in found.found if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme: dark" in text


def test_the_page_tells_everything(run):
    calls = {"calls": {"cpu float32": "reference"}, "fallbacks": {}, "chosen": "cpp"}
    told = {"cpu float32 ran on reference": "cpp: _cpu.so is not built"}
    with RunDirectory(run) as directory:
        summary = {"reason": "the target is met", "signal": None, "step": 40}
        backends = {"adaptive_step": {**calls, "fallbacks": told}}
        directory.write_json("summary.json", {**summary, "backends": backends})
        directory.append("events.jsonl", {"event": "resumed", "step": 20, "message": "from here"})
    report = read_run(run)
    text = "\n".join(Page(page([report], svg([report]))).texts)
    for part in (
        "finished at step 40 of 40: best exact_accuracy 75.00 % at step 20, last 75.00 %.",
        "the target is met", "3 steps/s (median of the intervals)",
        "at most 24 per second, 8 per step",
        "a CPU (cpu)", "step-00000020", "adaptive_step", "cpp: _cpu.so is not built", "from here",
        "train.monitor", "lm_loss, evaluation",
    ):  # fmt: skip
        assert part in text


def test_a_long_run_has_a_page_of_the_last_evaluations_and_the_best(tmp_path):
    lines = [record("evaluation", step, accuracy=1 / step) for step in range(1, 301)]
    report = read_run(write(tmp_path / "run", lines=lines))
    texts = Page(page([report], svg([report]))).texts
    assert "evaluations (99 more are not shown)" in texts and "best" in texts
    rows = [row[0] for row in tables.evaluations(report, 200).rows]
    assert rows == ["1", *map(str, range(101, 301))]


def test_a_page_of_several_runs_has_them_all(run, tmp_path):
    reports = [read_run(run), read_run(write(tmp_path / "other", lines=[]))]
    texts = Page(page(reports, svg(reports))).texts
    assert "sudoku: run" in texts and "sudoku: other" in texts and "2 runs" in texts


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (8.24, "8.2 s"),
        (99.94, "99.9 s"),
        (100, "1:40 min"),
        (3599.6, "1:00:00 h"),
        (math.inf, "-"),
        (math.nan, "-"),
    ],
)
def test_times_are_told_as_one_reads_them(seconds, text):
    assert tables.time_text(seconds) == text


def test_metrics_are_numbers_without_place_and_pace():
    found = {**record("train", 1, loss=1.0, lr=0.1, steps_per_second=3.0), "word": "x"}
    assert metrics_of(found) == {"loss": 1.0}


@pytest.fixture
def made_up():
    """An op that has been called once: there is no C++ form of it, so it fell back."""
    op = Op("made_up", {"reference": max}, lambda backend, dtypes: None, lambda *call: {})
    op.choose("cpu", frozenset({torch.float32}))
    yield "made_up"
    del OPS["made_up"]


def test_the_backends_that_ran_are_named_with_the_reasons_against_others(made_up):
    assert used("cpu")[made_up] == {
        "chosen": "reference",
        "calls": {"cpu float32": "reference"},
        "fallbacks": {"cpu float32 ran on reference": "cpp: made_up has no cpp implementation"},
    }


def test_an_op_that_was_not_called_has_no_calls(made_up):
    OPS[made_up].choices.clear()
    assert used("cpu")[made_up]["calls"] == {}


def test_the_end_of_a_run_is_plain_json_and_is_read_back(run, made_up):
    summary = Summary(40, "the target is met", None, 4.0, 0, {"loss": math.nan}, {}, run / "x")
    with RunDirectory(run) as directory:
        directory.write_json("summary.json", summary_values(summary, torch.device("cpu")))
    found = json.loads((run / "summary.json").read_text())
    assert (found["checkpoint"], found["metrics"]) == ("x", {"loss": "NaN"})
    report = read_run(run)
    assert (report.state, report.reason) == ("finished", "the target is met")
    row = ("made_up", "cpu float32", "reference", "cpp: made_up has no cpp implementation")
    assert row in tables.backends(report).rows
