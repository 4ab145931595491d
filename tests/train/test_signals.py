"""The first signal ends a run politely, the second one at once."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trm_fast.train import (
    Callback,
    Checkpoints,
    Curriculum,
    EarlyStopping,
    Stage,
    Step,
    Trainer,
    TrainerConfig,
    generators,
)
from trm_fast.train._signals import graceful_stop

from .runs import STEPS, differences, function_run, result

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Second(BaseException):
    """What the handler from before does, as that of Ctrl-C."""


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    def raises(number: int, frame: FrameType | None) -> None:
        raise Second(number)

    before = {number: signal.signal(number, raises) for number in CAUGHT}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Send(Callback):
    """Sends signals to this process after a step."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers

    def on_step(self, trainer: Trainer, step: Step) -> None:
        if trainer.step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", CAUGHT)
def test_the_first_signal_ends_the_run_after_its_step_with_a_checkpoint(number, tmp_path, capfd):
    summary = function_run(tmp_path, (Send(7, number),)).fit()
    assert (summary.step, summary.signal) == (7, number)
    assert summary.reason == f"interrupted by {number.name}"
    assert Checkpoints(tmp_path).load().step == 7
    said = f"{number.name}: stopping after this step and saving; once more stops at once\n"
    assert capfd.readouterr().err == said


@pytest.mark.parametrize("numbers", [(signal.SIGINT,) * 2, (signal.SIGTERM, signal.SIGINT)])
def test_the_second_signal_does_what_it_always_did(numbers, tmp_path):
    with pytest.raises(Second):
        function_run(tmp_path, (Send(7, *numbers),)).fit()
    assert Checkpoints(tmp_path).load().step == 6
    # The directory is free again, and the run goes on.
    assert function_run(tmp_path).fit(resume=True).step == STEPS


def test_a_terminal_that_is_closed_says_so_more_than_once(tmp_path):
    summary = function_run(tmp_path, (Send(7, *(signal.SIGHUP,) * 3),)).fit()
    assert (summary.step, summary.signal) == (7, signal.SIGHUP)
    assert Checkpoints(tmp_path).load().step == 7
    with pytest.raises(Second):
        function_run(None, (Send(7, signal.SIGHUP, signal.SIGTERM),)).fit()


def test_the_handlers_from_before_come_back():
    before = [signal.getsignal(number) for number in CAUGHT]
    function_run(None).fit()
    assert [signal.getsignal(number) for number in CAUGHT] == before
    function_run(None, (Send(3, signal.SIGTERM),)).fit()
    assert [signal.getsignal(number) for number in CAUGHT] == before


def test_a_signal_that_the_process_ignores_stays_ignored():
    # As nohup does with SIGHUP, and a shell with SIGINT of what it starts in the background.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    summary = function_run(None, (Send(3, signal.SIGHUP),)).fit()
    assert (summary.step, summary.signal) == (STEPS, None)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_outside_the_main_thread_a_run_works_and_catches_nothing():
    found = []
    before = signal.getsignal(signal.SIGINT)

    def run() -> None:
        with graceful_stop(print) as request:
            found.append((request.signal, signal.getsignal(signal.SIGINT) is before))
        found.append(function_run(None).fit().step)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(None, True), STEPS]


def test_a_signal_while_a_run_is_taken_up_is_caught(tmp_path, monkeypatch):
    function_run(tmp_path, steps=4).fit()
    load = Checkpoints.load

    def interrupted(*args: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "load", interrupted)
        summary = function_run(tmp_path).fit(resume=True)
    assert (summary.step, summary.signal) == (4, signal.SIGTERM)
    assert Checkpoints(tmp_path).load().step == 4


@pytest.mark.parametrize("hook", ["on_start", "on_stage", "on_log", "on_evaluate", "on_save"])
def test_a_signal_in_a_hook_loses_nothing(hook, tmp_path):
    class Interrupt(Callback):
        def once(self, *args: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            del self.__dict__[hook]

    interrupt = Interrupt()
    interrupt.__dict__[hook] = interrupt.once
    function_run(tmp_path / "whole").fit()
    trainer = function_run(tmp_path / "parts", (interrupt,))
    summary = trainer.fit()
    # A run without stages enters none.
    assert summary.signal == (None if hook == "on_stage" else signal.SIGTERM)
    assert Checkpoints(tmp_path / "parts").load().step == summary.step == trainer.step
    assert hook != "on_start" or summary.step == 0
    function_run(tmp_path / "parts").fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


def interrupted_evaluation(out, step, failure, callbacks=(), **config) -> Trainer:
    """Evaluations after a step end by ``failure``, with what follows it left undone."""
    trainer = function_run(out, callbacks, **config)
    evaluate = trainer.evaluator

    def evaluator(model):
        if trainer.step == step:
            torch.rand(())
            model.train()
            failure()
            raise AssertionError("the evaluation was not left")
        return evaluate(model)

    trainer.evaluator = evaluator
    return trainer


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# The first evaluation, the second one, and the one after the last step.
@pytest.mark.parametrize("step", [5, 10, STEPS])
def test_a_signal_ends_an_evaluation_and_a_resume_makes_it(step, tmp_path):
    function_run(tmp_path / "whole", ema=0.9).fit()
    trainer = interrupted_evaluation(tmp_path / "parts", step, terminated, ema=0.9)
    summary = trainer.fit()
    assert (summary.step, summary.signal) == (step, signal.SIGTERM)
    assert trainer.model.training
    loaded = Checkpoints(tmp_path / "parts").load()
    assert (loaded.step, loaded.state["trainer"]["evaluated_at"] < step) == (step, True)
    events = (tmp_path / "parts" / "events.jsonl").read_text()
    assert "left by a signal: it is made when the run is resumed" in events
    resumed = function_run(tmp_path / "parts", ema=0.9)
    resumed.fit(resume=True)
    assert [r["step"] for r in resumed.history if r["kind"] == "evaluation"] == [5, 10, STEPS]
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


def test_a_signal_in_a_step_leaves_its_evaluation_out(tmp_path):
    function_run(tmp_path / "whole").fit()
    evaluated = []
    trainer = function_run(tmp_path / "parts", (Send(5, signal.SIGTERM),))
    trainer.evaluator = evaluated.append
    assert trainer.fit().step == 5 and not evaluated
    function_run(tmp_path / "parts").fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


def failed() -> None:
    raise KeyError("accuracy")


@pytest.mark.parametrize("step", [5, STEPS])
def test_an_evaluation_that_fails_leaves_a_checkpoint_of_its_step(step, tmp_path):
    function_run(tmp_path / "whole").fit()
    with pytest.raises(KeyError, match="accuracy"):
        interrupted_evaluation(tmp_path / "parts", step, failed).fit()
    assert Checkpoints(tmp_path / "parts").load().step == step
    function_run(tmp_path / "parts").fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


def test_a_callback_that_fails_at_an_evaluation_leaves_a_checkpoint_of_its_step(tmp_path):
    with pytest.raises(ValueError, match="EarlyStopping: monitor must be a metric"):
        function_run(tmp_path, (EarlyStopping("nothing"),)).fit()
    assert Checkpoints(tmp_path).load().step == 5


def test_the_record_before_the_end_of_a_stage_is_written_after_a_resume(tmp_path):
    def run(out) -> Trainer:
        stages = [Stage("one", [torch.ones(2, 6)], steps=7), Stage("two", [torch.zeros(2, 6)])]
        return Trainer(
            model := torch.nn.Linear(6, 1), torch.optim.SGD(model.parameters(), lr=0.1),
            Curriculum(stages), lambda model, batch: model(batch).square().mean(),
            TrainerConfig(steps=STEPS, log_every=5),
            evaluate=lambda model: {"weight": float(model.weight.sum())}, out=out, device="cpu",
        )  # fmt: skip

    torch.manual_seed(0)
    run(tmp_path / "whole").fit()
    torch.manual_seed(0)
    trainer = run(tmp_path / "parts")
    trainer.evaluator = lambda model: terminated()
    assert trainer.fit().step == 7
    run(tmp_path / "parts").fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


def test_a_signal_while_an_evaluation_gives_back_the_generators_changes_no_bit(
    tmp_path, monkeypatch
):
    function_run(tmp_path / "whole").fit()
    give_back, sent = generators.set_generators, []

    def interrupted(*args: object) -> None:
        if not sent and Path(tmp_path / "parts" / "run.json").exists():
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        give_back(*args)

    monkeypatch.setattr(generators, "set_generators", interrupted)
    summary = function_run(tmp_path / "parts").fit()
    assert sent and summary.signal == signal.SIGTERM
    function_run(tmp_path / "parts").fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


class Doomed(Dataset):
    """Its process sends SIGTERM to the run, once, and ends of it too, or at once."""

    def __init__(self, sent: Path, at_once: bool = False) -> None:
        self.sent, self.at_once = sent, at_once

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        # The run is sure to wait for the first batch.
        if index == (0 if self.at_once else 11) and not self.sent.exists():
            self.sent.touch()
            os.kill(os.getppid(), signal.SIGTERM)
            if self.at_once:
                os._exit(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.full((6,), float(index)), index % 3


def test_a_signal_ends_an_evaluation_and_the_workers_of_its_loader(tmp_path):
    sent = tmp_path / "sent"

    def run(out: Path) -> Trainer:
        trainer = function_run(out)
        evaluate = trainer.evaluator
        loader = DataLoader(Doomed(sent), 4, num_workers=1)
        trainer.evaluator = lambda model: evaluate(model) | {"sum": sum(len(b) for b in loader)}
        return trainer

    sent.touch()
    run(tmp_path / "whole").fit()
    sent.unlink()
    summary = run(tmp_path / "parts").fit()
    assert (summary.step, summary.signal) == (5, signal.SIGTERM)
    run(tmp_path / "parts").fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


# Torch looks for workers that have ended after five seconds only.
@pytest.mark.parametrize("at_once", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_signal_that_ends_a_worker_too_loses_no_step(at_once, tmp_path):
    sent = tmp_path / "sent"

    def run(out: Path) -> Trainer:
        loader = DataLoader(Doomed(sent, at_once), 4, num_workers=1, prefetch_factor=1)
        return function_run(out, batches=loader, steps=7)

    sent.touch()
    run(tmp_path / "whole").fit()
    sent.unlink()
    summary = run(tmp_path / "parts").fit()
    assert summary.signal == signal.SIGTERM
    assert Checkpoints(tmp_path / "parts").load().step == summary.step
    assert summary.step > 0 or at_once
    told = "left by a signal: DataLoader" in (tmp_path / "parts" / "events.jsonl").read_text()
    assert told == at_once
    run(tmp_path / "parts").fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []
