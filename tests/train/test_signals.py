"""The first signal ends a run politely, the second one at once."""

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from trm_fast.train import Callback, Checkpoints, Step, Trainer
from trm_fast.train._signals import graceful_stop

from .runs import STEPS, function_run

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Second(Exception):
    """What the handler from before does."""


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

    monkeypatch.setattr(Checkpoints, "load", interrupted)
    summary = function_run(tmp_path).fit(resume=True)
    assert (summary.step, summary.signal) == (5, signal.SIGTERM)
