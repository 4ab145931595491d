"""Trackers get all metrics, and neither stop nor slow a run, whatever they do."""

import random
import sys
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from trm_fast.train import Checkpoints, Tracker
from trm_fast.train import trackers as module
from trm_fast.train.run_directory import read_records

from .runs import differences, function_run, result


class Memory:
    """Keeps what it is given; raises or hangs where it is told to."""

    def __init__(self, fails: str = "", hangs: str = "") -> None:
        self.fails, self.hangs = fails, hangs
        self.written: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self.go_on = threading.Event()

    def __call__(self, trainer: Any) -> "Memory":
        self._act("make")
        return self

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._act("write")
        self.written.append((step, numbers))

    def close(self) -> None:
        self._act("close")
        self.closed = True

    def _act(self, place: str) -> None:
        if place == self.fails:
            raise ConnectionError("the server is away\nwith details")
        if place == self.hangs:
            self.go_on.wait()


def test_a_tracker_gets_all_numbers_in_order(tmp_path):
    memory = Memory()
    trainer = function_run(tmp_path, (Tracker(memory),))
    trainer.fit()
    assert memory.closed
    assert [step for step, _ in memory.written] == [4, 5, 8, 10, 12, 12]
    _, numbers = memory.written[0]
    record = trainer.history[0]
    assert numbers == {
        f"train/{name}": record[name] for name in ("loss", "accuracy", "lr", "steps_per_second")
    }
    assert memory.written[1][1].keys() == {"evaluation/lm_loss", "evaluation/noise"}


def test_a_tracker_that_cannot_start_ends_the_run_before_its_first_step(tmp_path):
    trainer = function_run(tmp_path, (Tracker(Memory(fails="make")),))
    told = "^Tracker: Memory must be able to start; got ConnectionError: the server is away$"
    with pytest.raises(ValueError, match=told):
        trainer.fit()
    assert trainer.step == 0 and not (tmp_path / "ckpt").exists()


def test_what_a_tracker_draws_to_start_is_no_part_of_the_run(tmp_path):
    def drawing(run):
        random.random()
        torch.rand(())
        return Memory()

    function_run(tmp_path / "alone").fit()
    function_run(tmp_path / "tracked", (Tracker(drawing),)).fit()
    assert differences(result(tmp_path / "alone"), result(tmp_path / "tracked")) == []


@pytest.mark.parametrize("place", ["write", "close"])
def test_a_tracker_that_raises_is_reported_once_and_changes_nothing(place, tmp_path):
    function_run(tmp_path / "alone").fit()
    function_run(tmp_path / "tracked", (Tracker(Memory(fails=place)),)).fit()
    assert differences(result(tmp_path / "alone"), result(tmp_path / "tracked")) == []
    told = [event["message"] for event in read_records(tmp_path / "tracked" / "events.jsonl")]
    assert told == ["Memory is switched off: ConnectionError: the server is away"]


@pytest.mark.parametrize("place", ["make", "write", "close"])
def test_a_tracker_that_hangs_is_reported_once_and_nobody_waits(place, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    memory = Memory(hangs=place)
    function_run(tmp_path, (Tracker(memory),)).fit()
    memory.go_on.set()
    told = [event["message"] for event in read_records(tmp_path / "events.jsonl")]
    assert told == ["Memory is switched off: it has not finished within 0 s"]


def test_a_tracker_that_hangs_is_given_up_when_its_queue_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_QUEUE", 3)
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    memory = Memory(hangs="make")
    function_run(tmp_path, (Tracker(memory),), log_every=1).fit()
    memory.go_on.set()
    events = read_records(tmp_path / "events.jsonl")
    assert [event["message"] for event in events] == [
        "Memory is switched off: it has not taken 3 records"
    ]
    assert events[0]["step"] == 4


def test_a_tracker_that_ends_its_thread_is_reported(tmp_path):
    class Leaves(Memory):
        def write(self, step: int, numbers: dict[str, float]) -> None:
            raise SystemExit("no key")

    function_run(tmp_path, (Tracker(Leaves()),)).fit()
    told = [event["message"] for event in read_records(tmp_path / "events.jsonl")]
    assert told == ["Leaves is switched off: SystemExit: no key"]


def test_a_tracker_writes_what_it_has_when_an_error_ends_the_run(tmp_path):
    memory = Memory()
    trainer = function_run(tmp_path, (Tracker(memory),))
    trainer.evaluator = lambda model: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert memory.closed and [step for step, _ in memory.written] == [4]


def test_one_tracker_serves_two_runs(tmp_path):
    first, second = Memory(fails="write"), Memory()
    writers = iter((first, second))
    tracker = Tracker(lambda trainer: next(writers)(trainer))
    for name in ("a", "b"):
        function_run(tmp_path / name, (tracker,)).fit()
    assert [step for step, _ in second.written] == [4, 5, 8, 10, 12, 12]


def test_tensorboard_gets_the_curves(tmp_path):
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    function_run(tmp_path, (Tracker("tensorboard"),)).fit()
    found = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    records = read_records(tmp_path / "metrics.jsonl")
    wanted = [(r["step"], r["loss"]) for r in records if "loss" in r]
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [
        (step, pytest.approx(value, rel=2**-23)) for step, value in wanted
    ]
    assert not (tmp_path / "events.jsonl").exists()
    # It is no part of the run, and the run is taken up with it or without.
    assert function_run(tmp_path, steps=14).fit(resume=True).step == 14
    assert Checkpoints(tmp_path).load().step == 14


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of tensorboard, wandb; got 'paper'"):
        Tracker("paper")


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named_with_its_command(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ModuleNotFoundError, match=f"not installed: pip install {kind}$") as caught:
        Tracker(kind)
    assert caught.value.name == kind  # by which the command line knows the extra


class Wandb(ModuleType):
    """What a tracker uses of Weights & Biases."""

    def __init__(self, key: str | None) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.api = SimpleNamespace(api_key=key)
        self.steps: list[int] = []

    def init(self, **settings: Any) -> Any:
        def log(numbers: dict[str, float], step: int) -> None:
            self.steps.append(step)

        return SimpleNamespace(log=log, finish=lambda: None)


@pytest.mark.parametrize(
    ("key", "mode", "works"),
    [(None, None, False), (None, "online", False), (None, "offline", True), ("key", None, True)],
)
def test_without_a_login_there_is_no_tracker(key, mode, works, tmp_path, monkeypatch):
    wandb = Wandb(key)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    if works:
        function_run(tmp_path, (Tracker("wandb"),)).fit()
        assert wandb.steps == [4, 5, 8, 10, 12, 12]
        return
    with pytest.raises(ValueError, match="run `wandb login`, or set WANDB_API_KEY"):
        Tracker("wandb")


def test_a_package_that_is_broken_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb("key"))

    def broken(name):
        raise ImportError("no symbol\nin a library")

    monkeypatch.setattr(module, "import_module", broken)
    with pytest.raises(ValueError, match=r"must be a package that works; got .*: no symbol$"):
        Tracker("wandb")
