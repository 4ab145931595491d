"""Callbacks that stop a run, and what a person sees of it."""

import math
from typing import Any

import pytest

from trm_fast.train import Callback, EarlyStopping, Progress, Run, Step, StopAtTarget
from trm_fast.train.callbacks import is_better

from .runs import function_run, puzzle_run

INF, NAN = math.inf, math.nan


def stopped_after(callback: Callback, values: list[float]) -> int:
    """How many evaluations a run takes, one per step."""
    left = iter(values)
    trainer = function_run(
        None, (callback,), steps=len(values), evaluate_every=1, monitor="", log_every=100
    )
    trainer.evaluator = lambda model: {"value": next(left), "noise": 0.0}
    return trainer.fit().step


@pytest.mark.parametrize(
    ("mode", "patience", "min_delta", "values", "expected"),
    [
        ("max", 1, 0.0, [1, 2, 3, 3, 4], 4),  # an equal value is not better
        ("min", 1, 0.0, [3, 2, 1, 1, 0], 4),
        ("max", 2, 0.0, [1, 0, 2, 1, 2, 9], 5),  # a better one starts the count anew
        ("max", 2, 1.0, [0, 1, 0.5, 9], 3),  # 1 is not better than 0 by more than 1
        ("max", 2, 1.0, [0, 1.5, 2, 2.6, 3], 5),
        ("min", 2, 0.0, [NAN, NAN, NAN, 3, 2], 3),  # NaN is never better
        ("min", 2, 0.0, [NAN, NAN, 3, 2, 1], 5),  # and any number is better than NaN
        ("max", 3, 0.0, [-INF, INF, 1, 2, 3, 4], 5),
    ],
)
def test_early_stopping(mode, patience, min_delta, values, expected):
    assert stopped_after(EarlyStopping("value", patience, mode, min_delta), values) == expected


@pytest.mark.parametrize(
    ("mode", "target", "values", "expected"),
    [
        ("max", 2.0, [1, 1.9, 2, 3], 3),
        ("min", 2.0, [3, 2.1, 2, 1], 3),
        ("max", 2.0, [NAN, NAN, INF, 0], 3),
        ("max", 9.0, [1, 2, 3], 3),  # never
    ],
)
def test_stop_at_target(mode, target, values, expected):
    assert stopped_after(StopAtTarget("value", target, mode), values) == expected


@pytest.mark.parametrize("kind", [EarlyStopping, lambda name: StopAtTarget(name, 1.0)])
def test_an_unknown_metric_is_named(kind):
    with pytest.raises(
        ValueError, match=r"monitor must be a metric of .*; got 'nothing', not among"
    ):
        function_run(None, (kind("nothing"),)).fit()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience must be >= 1; got 0"),
        ({"mode": "best"}, "mode must be 'max' or 'min'; got 'best'"),
        ({"min_delta": -1.0}, "min_delta must be >= 0; got -1.0"),
        ({"min_delta": NAN}, "min_delta must be >= 0; got nan"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^EarlyStopping: {message}$"):
        EarlyStopping("value", **options)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_what_is_better(mode):
    up = 1.0 if mode == "max" else -1.0
    assert is_better(up, 0.0, mode) and not is_better(-up, 0.0, mode)
    assert not is_better(0.0, 0.0, mode)
    assert not is_better(NAN, 0.0, mode) and not is_better(NAN, NAN, mode)
    assert is_better(0.0, NAN, mode)


class Recorder(Callback):
    """Notes what it is told."""

    def __init__(self, fails: bool = False) -> None:
        self.told: list[str] = []
        self.fails = fails

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_") and name != "close":
            return super().__getattribute__(name)

        def note(*args: Any) -> None:
            self.told.append(name)
            if name == "on_step" and self.fails:
                raise RuntimeError("a callback has a fault")

        return note


def test_callbacks_are_told_everything_in_order(tmp_path):
    recorder = Recorder()
    function_run(tmp_path, (recorder,), steps=5, monitor="").fit()
    step = ["on_gradients", "on_step"]
    assert recorder.told == [
        "on_start", *step, *step, *step, "on_save", *step, "on_epoch", "on_log", *step, "on_log",
        "on_evaluate", "on_save", "on_end", "close",
    ]  # fmt: skip


def test_callbacks_are_closed_if_an_error_ends_the_run():
    recorder = Recorder(fails=True)
    with pytest.raises(RuntimeError, match="has a fault"):
        function_run(None, (recorder,)).fit()
    assert recorder.told == ["on_start", "on_gradients", "on_step", "on_event", "close"]


def test_lines_of_progress_are_short(tmp_path, capsys):
    trainer = function_run(tmp_path, (Progress(("loss", "accuracy", "lm_loss"), bar=False),))
    trainer.fit()
    lines = capsys.readouterr().out.splitlines(keepends=True)
    assert [line.split("  ")[0] for line in lines] == [
        "step 4/12", "step 5: evaluation", "step 8/12", "step 10: evaluation", "step 12/12",
        "step 12: evaluation",
    ]  # fmt: skip
    assert max(len(line.encode()) for line in lines) <= 100
    assert "loss 1." in lines[0] and "accuracy 0." in lines[0] and "steps/s" in lines[0]


def test_a_metric_of_nothing_is_a_dash_and_a_loss_that_is_none_is_told():
    shown = Progress(("loss", "accuracy"), bar=False)._shown({"loss": NAN, "accuracy": NAN})
    assert shown == "loss nan  accuracy -"


def test_a_long_line_is_cut_to_200_bytes(tmp_path, capsys):
    class Tells(Callback):
        def on_step(self, run: Run, step: Step) -> None:
            run.event("told", "ä\n" * 500)

    function_run(tmp_path, (Tells(), Progress(bar=False)), steps=1).fit()
    line = next(line for line in capsys.readouterr().out.splitlines() if "ä" in line)
    assert 190 < len(line.encode()) < 200 and line.endswith("...")
    assert (
        "ä" in (tmp_path / "events.jsonl").read_text()
        or r"\u00e4" in (tmp_path / "events.jsonl").read_text()
    )


def test_lines_can_be_rarer_than_records(capsys):
    function_run(None, (Progress(every=5, bar=False),), log_every=1, evaluate_every=0).fit()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 5/12", "step 10/12"]


def test_the_bar_shows_steps_and_metrics_and_gives_the_terminal_back(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    progress = Progress(("loss",), bar=True)
    function_run(None, (progress,), steps=6).fit()
    shown = capsys.readouterr().out
    assert "6/6" in shown and "loss 1." in shown and "step 5: evaluation" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is visible again
    recorder = Recorder(fails=True)
    with pytest.raises(RuntimeError):
        function_run(None, (progress, recorder)).fit()
    shown = capsys.readouterr().out
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_callbacks_are_called_for_the_epochs_of_puzzles():
    class Epochs(Callback):
        def __init__(self):
            self.seen = []

        def on_epoch(self, run, epoch):
            self.seen.append((run.step, epoch))

    epochs = Epochs()
    # 13 puzzles in batches of 4: the last one of an epoch is in the 4th, 7th, 10th, 13th batch.
    trainer = puzzle_run(None, (epochs,), augment=False, steps=13)
    trainer.fit()
    assert epochs.seen == [(4, 0), (7, 1), (10, 2), (13, 3)] and trainer.epochs == 4


class Brief(Callback):
    """Hooks that take the run alone, a part of it in each base class."""

    def __init__(self):
        self.called = []

    def on_step(self, run):
        self.called.append(("on_step", run.step))

    def on_evaluate(self, run: Run) -> None:
        self.called.append(("on_evaluate", run.step))

    def on_end(self, run, *rest):
        self.called.append(("on_end", len(rest)))


class BriefToo(Brief):
    def on_log(self, run, record=None):
        self.called.append(("on_log", record is not None))

    def on_step(self, run: Run, step: Step) -> None:
        super().on_step(run, step)


def test_a_hook_may_leave_out_what_comes_after_the_run():
    callback = BriefToo()
    function_run(None, (callback,), steps=2, log_every=2, evaluate_every=2).fit()
    assert callback.called == [
        ("on_step", 1), ("on_step", 2), ("on_log", True), ("on_evaluate", 2), ("on_end", 1),
    ]  # fmt: skip


def test_a_hook_that_is_misspelled_is_refused_when_its_class_is_made():
    with pytest.raises(TypeError, match=r"Odd: on_stpe must be a hook .* did you mean on_step\?"):

        class Odd(Callback):
            def on_stpe(self, run):
                pass

    class Own(Callback):
        def on_button(self, run):
            pass

    assert Own().on_button(None) is None


@pytest.mark.parametrize(("given", "got"), [(Brief, "Brief"), (print, "print"), (None, "NoneType")])
def test_what_is_no_callback_is_refused_by_name(given, got):
    with pytest.raises(TypeError, match=f"callbacks must be objects of class Callback; got {got}"):
        function_run(None, (given,))
