"""No error loses a finished step: what came before it is saved, and a resume goes on to the same
bits."""

import errno
import os
import random
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trm_fast.train import (
    Callback,
    Checkpoints,
    Curriculum,
    Objective,
    Stage,
    StepResult,
    Trainer,
    TrainerConfig,
    files,
)
from trm_fast.train.reports.reading import read_run
from trm_fast.train.run_directory import read_records

from .runs import MAKE, differences, function_run, puzzle_run, result
from .test_trainer import loss, network, split


class Broken(Exception):
    """What goes wrong once."""


class Breaks(Callback):
    """Raises in one hook, after one step."""

    def __init__(self, hook: str, step: int) -> None:
        self.hook, self.step, self.run = hook, step, None

    def on_start(self, run: Any) -> None:
        self.run = run

    def _break(self, hook: str) -> None:
        if self.run is not None and (hook, self.run.step) == (self.hook, self.step):
            raise Broken(hook)

    def on_gradients(self, run: Any, step: Any) -> None:
        self._break("on_gradients")

    def on_step(self, run: Any, step: Any) -> None:
        self._break("on_step")

    def on_log(self, run: Any, record: Any) -> None:
        self._break("on_log")

    def on_epoch(self, run: Any, epoch: int) -> None:
        self._break("on_epoch")

    def on_stage(self, run: Any, stage: str) -> None:
        self._break("on_stage")

    def on_evaluate(self, run: Any, record: Any) -> None:
        self._break("on_evaluate")

    def on_event(self, run: Any, event: Any) -> None:
        self._break("on_event")

    def metrics(self) -> dict[str, float]:
        self._break("metrics")
        return {}


def resumed(make: Any, tmp_path: Any) -> list[str]:
    """What differs of a run that was resumed, and of one that was left alone."""
    make(tmp_path / "parts").fit(resume=True)
    make(tmp_path / "whole").fit()
    return differences(result(tmp_path / "whole"), result(tmp_path / "parts"))


@pytest.mark.parametrize(
    ("hook", "step"),
    [("on_step", 7), ("on_log", 8), ("metrics", 8), ("on_epoch", 8), ("on_evaluate", 5)],
)
def test_an_error_in_a_hook_loses_no_step(hook, step, tmp_path):
    def make(out, *more):
        return function_run(out, [*more, Breaks("none", 0)][:1], save_every=0)

    with pytest.raises(Broken, match=hook):
        make(tmp_path / "parts", Breaks(hook, step)).fit()
    assert Checkpoints(tmp_path / "parts").load().step == step
    assert resumed(make, tmp_path) == []


@pytest.mark.parametrize("step", [1, 4, 7])
def test_an_error_before_the_weights_move_gives_back_what_was_drawn(step, tmp_path):
    def make(out, *more):
        return function_run(out, more, save_every=0, accumulate=2)

    with pytest.raises(Broken):
        make(tmp_path / "parts", Breaks("on_gradients", step)).fit()
    assert Checkpoints(tmp_path / "parts").load().step == step
    assert resumed(make, tmp_path) == []


@pytest.mark.parametrize("step", [4, 7])
def test_an_error_in_the_forward_or_backward_pass_loses_no_step(step, tmp_path):
    class Sometimes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise Broken("backward")

    for place in ("forward", "backward"):
        out = tmp_path / place

        def breaks(model, inputs, output, place=place):
            if model.training and trainer.step == step:  # noqa: B023
                if place == "forward":
                    raise Broken("forward")
                return Sometimes.apply(output)

        trainer = function_run(out / "parts", save_every=0)
        trainer.model.register_forward_hook(breaks)
        with pytest.raises(Broken, match=place):
            trainer.fit()
        assert Checkpoints(out / "parts").load().step == step
        assert resumed(lambda out: function_run(out, save_every=0), out) == []


@pytest.mark.parametrize("supervision", ["per_step", "joint"])
def test_a_carry_goes_back_to_the_finished_step(supervision, tmp_path):
    def make(out, *more):
        return puzzle_run(out, more, supervision, save_every=0, accumulate=2)

    with pytest.raises(Broken):
        make(tmp_path / "parts", Breaks("on_gradients", 5)).fit()
    assert Checkpoints(tmp_path / "parts").load().step == 5
    assert resumed(make, tmp_path) == []


class Flaky(Dataset):
    """A data set of files that cannot be read once."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.read = error, 0

    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read += 1
        if self.error is not None and self.read == 40:
            raise self.error
        return torch.full((6,), index / 26), index % 3


@pytest.mark.parametrize("error", [OSError(errno.EIO, "gone"), RuntimeError("torn")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_error_of_the_loader_loses_no_step(error, accumulate, tmp_path):
    def make(out, error=None):
        loader = DataLoader(Flaky(error), 4, shuffle=True)
        return function_run(out, batches=loader, save_every=0, accumulate=accumulate)

    with pytest.raises(type(error), match=str(error.args[-1])):
        make(tmp_path / "parts", error).fit()
    # 7 batches are an epoch of 26 examples; the eleventh batch is torn.
    assert Checkpoints(tmp_path / "parts").load().step == {1: 10, 2: 5}[accumulate]
    # But for the number of reads, which counts those that have failed.
    assert set(resumed(make, tmp_path)) <= {"process"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(("kind", "step"), [("train", 4), ("evaluation", 5)])
def test_metrics_that_cannot_be_written_lose_no_step(code, kind, step, tmp_path, monkeypatch):
    write = files.write_all

    def full(handle, data):
        if b'"kind":"' + kind.encode() in data:
            raise OSError(code, os.strerror(code))
        write(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_all", full)
        with pytest.raises(OSError, match=os.strerror(code)):
            function_run(tmp_path, save_every=0).fit()
    assert Checkpoints(tmp_path).load().step == step
    again = function_run(tmp_path, save_every=0)
    again.fit(resume=True)
    records = [(record["kind"], record["step"]) for record in again.history]
    both = ("train", "evaluation")
    assert records == [*zip(both * 3, (4, 5, 8, 10, 12, 12), strict=True)]


def test_events_that_cannot_be_written_lose_no_step(tmp_path, monkeypatch):
    def nonfinite(model, batch):
        return loss(model, batch) * (float("nan") if trainer.step == 5 else 1)

    model = network()
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), split(6), nonfinite,
        TrainerConfig(steps=9), out=tmp_path, device="cpu", callbacks=[Breaks("on_event", 6)],
    )  # fmt: skip
    with pytest.raises(Broken, match="on_event"):
        trainer.fit()
    loaded = Checkpoints(tmp_path).load()
    assert loaded.step == 6 and loaded.state["trainer"]["guard"]["skipped"] == 1


def test_an_error_in_a_hook_of_a_stage_loses_no_step(tmp_path):
    def make(out, *more):
        model = network()
        stages = [Stage("one", split(6), steps=3), Stage("two", split(4), steps=3)]
        return Trainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), Curriculum(stages), loss,
            TrainerConfig(steps=6), out=out, device="cpu", callbacks=more,
        )  # fmt: skip

    with pytest.raises(Broken, match="on_stage"):
        make(tmp_path / "parts", Breaks("on_stage", 3)).fit()
    assert Checkpoints(tmp_path / "parts").load().step == 3
    assert resumed(lambda out: make(out, Breaks("none", 0)), tmp_path) == []


def test_a_stage_that_cannot_be_entered_is_entered_by_the_resume(tmp_path):
    def make(out, fails):
        def schedules(optimizers):
            if fails:
                raise Broken("schedules")
            return [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]

        model = network()
        stages = [Stage("one", split(6), steps=3), Stage("two", steps=3, schedules=schedules)]
        return Trainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), Curriculum(stages), loss,
            TrainerConfig(steps=6), out=out, device="cpu",
        )  # fmt: skip

    with pytest.raises(Broken, match="schedules"):
        make(tmp_path / "parts", True).fit()
    assert Checkpoints(tmp_path / "parts").load().step == 3
    assert resumed(lambda out: make(out, False), tmp_path) == []


def test_an_error_in_a_schedule_loses_no_step(tmp_path):
    def shape(step):
        if step == 5:
            raise Broken("schedule")
        return 1.0

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model, optimizer, split(6), loss, TrainerConfig(steps=9), out=tmp_path, device="cpu",
        schedules=[torch.optim.lr_scheduler.LambdaLR(optimizer, shape)],
    )  # fmt: skip
    with pytest.raises(Broken, match="schedule"):
        trainer.fit()
    loaded = Checkpoints(tmp_path).load()
    assert loaded.step == 5
    assert all(map(torch.equal, loaded.state["model"].values(), model.state_dict().values()))


class Half(torch.optim.SGD):
    """Fails after it has moved a part of the weights."""

    def step(self, closure=None):
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1)
        raise Broken("optimizer")


class Forgets(Objective):
    """Cannot end an update."""

    def losses(self, model, batch):
        yield StepResult(loss(model, batch))

    def commit(self, finite):
        raise Broken("commit")


@pytest.mark.parametrize("place", ["optimizer", "commit"])
def test_half_an_update_is_not_saved(place, tmp_path, capfd):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Later(Callback):
        def on_step(self, run: Any, step: Any) -> None:
            if run.step == 3 and place == "optimizer":
                run.optimizers[0].__class__ = Half
            elif run.step == 3:
                run.objective = Forgets()

    trainer = Trainer(
        model, optimizer, split(6), loss, TrainerConfig(steps=9, save_every=2), out=tmp_path,
        device="cpu", callbacks=[Later()],
    )  # fmt: skip
    with pytest.raises(Broken, match=place):
        trainer.fit()
    assert Checkpoints(tmp_path).load().step == 2
    assert (
        "step 3 is not saved: the error came in the middle of an update" in capfd.readouterr().err
    )
    with pytest.raises(RuntimeError, match="save must not come between"):
        trainer.save()


def test_the_first_error_is_raised_where_saving_fails_too(tmp_path, monkeypatch, capfd):
    config = {"save_every": 0, "evaluate": False, "monitor": ""}
    trainer = function_run(tmp_path, [Breaks("on_step", 7)], **config)

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on\ndevice")

    monkeypatch.setattr(trainer.files, "save", full)
    with pytest.raises(Broken, match="on_step"):
        trainer.fit()
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["Trainer: step 7 is not saved: [Errno 28] No space left on device"]


def test_an_interrupt_saves_nothing(tmp_path):
    class Twice(Callback):
        def on_step(self, run: Any, step: Any) -> None:
            if run.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        function_run(tmp_path, [Twice()], save_every=2).fit()
    assert Checkpoints(tmp_path).load().step == 2


def test_an_error_in_the_first_step_leaves_no_checkpoint(tmp_path):
    with pytest.raises(Broken):
        function_run(tmp_path, [Breaks("on_gradients", 0)]).fit()
    assert not Checkpoints(tmp_path).list()


def test_a_loop_of_ones_own_saves_too(tmp_path):
    trainer = function_run(tmp_path, [breaks := Breaks("on_step", 7)], save_every=0)
    breaks.on_start(trainer)
    with pytest.raises(Broken):
        for _ in trainer.updates():
            pass
    assert Checkpoints(tmp_path).load().step == 7


class Marks(torch.optim.SGD):
    """Keeps something in its state that no checkpoint can hold."""

    def step(self, closure=None):
        self.state[self.param_groups[0]["params"][0]]["seen"] = {1}
        return super().step(closure)


def test_a_state_that_the_first_step_makes_unsavable_is_refused_after_it(tmp_path, monkeypatch):
    monkeypatch.setitem(MAKE, "marks", lambda model: Marks(model.parameters(), lr=0.1))
    trainer = function_run(tmp_path, optimizer="marks", save_every=0)
    with pytest.raises(TypeError, match=r"optim.0.state.0.seen must .*; got builtins.set"):
        trainer.fit()
    assert trainer.step == 1


def test_the_rehearsal_is_made_once(tmp_path):
    class Counts(Callback):
        asked = 0

        def state_dict(self) -> dict[str, Any]:
            Counts.asked += 1
            return {}

    function_run(tmp_path, [Counts()], save_every=0, evaluate=False, monitor="").fit()
    # Before and after the hooks of the start, after the first step, and at the end.
    assert Counts.asked == 4


def test_numbers_drawn_in_a_failed_pass_are_drawn_again(tmp_path):
    random.seed(0)
    trainer = function_run(tmp_path, [Breaks("on_gradients", 3)], save_every=0)
    with pytest.raises(Broken):
        trainer.fit()
    own = Checkpoints(tmp_path).load().state["process"]["0"]
    whole = function_run(tmp_path / "whole", steps=3, save_every=0, evaluate=False, monitor="")
    whole.fit()
    expected = Checkpoints(tmp_path / "whole").load().state["process"]["0"]
    assert torch.equal(own["generators"]["torch"], expected["generators"]["torch"])
    assert own["batches"]["train"]["position"] == 3


def test_an_error_is_an_event_and_the_report_says_how_the_run_ended(tmp_path):
    class Fails(Callback):
        def on_step(self, run):
            if run.step == 3:
                raise ValueError("boom\nin two lines")

    with pytest.raises(ValueError, match="boom"):
        function_run(tmp_path, (Fails(),)).fit()
    failed = [e for e in read_records(tmp_path / "events.jsonl") if e["event"] == "failed"]
    assert [(e["step"], e["message"]) for e in failed] == [(3, "ValueError: boom in two lines")]
    report = read_run(tmp_path)
    assert (report.state, report.reason) == ("stopped", "ValueError: boom in two lines")
