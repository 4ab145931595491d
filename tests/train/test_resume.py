"""A run that was interrupted and taken up again ends with the bits of one that was left alone."""

import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trm_fast.cli import main
from trm_fast.train import Callback, Checkpoints, EarlyStopping, StopAtTarget, files
from trm_fast.train.checkpoints.loading import load_run
from trm_fast.train.reports.reading import read_run
from trm_fast.train.run_directory import read_records

from ..interruptions import Interruption, Killed, interrupted
from ..support.processes import start
from .runs import CASES, STEPS, differences, function_run, puzzle_run, result


@pytest.mark.parametrize("case", CASES)
def test_a_run_interrupted_anywhere_ends_with_the_same_bits(case, tmp_path):
    CASES[case](tmp_path / "whole").fit()
    interrupted(case, tmp_path / "parts", random.Random(case))
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


@pytest.mark.parametrize("place", ["forward", "on_step", "on_evaluate", "on_save", "signal"])
@pytest.mark.parametrize("step", [1, 5, 6])
def test_a_run_interrupted_at_one_place_ends_with_the_same_bits(place, step, tmp_path):
    # Log, evaluation and checkpoint are due every 4, 5 and 3 steps; an epoch has 4 batches, and an
    # update 3, so no step but the last of all is at the end of anything else.
    make = CASES["function, sgd, three batches"]
    make(tmp_path / "whole").fit()
    stop = Interruption(place, step, passes=1)
    try:
        make(tmp_path / "parts", (stop,)).fit()
    except Killed:
        pass
    assert stop.happened
    make(tmp_path / "parts").fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


def test_the_comparison_sees_one_bit_of_any_part(tmp_path):
    function_run(tmp_path, ema=0.9, precision="bf16").fit()
    whole = result(tmp_path)
    parts = {name.partition(".")[0] for name in whole}
    assert parts == {"model", "ema", "optim", "process", "trainer", "metrics"}
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            other = value.clone()
            if value.numel():
                other.view(-1)[:1].view(torch.uint8)[0] ^= 1
                assert differences(whole, {**whole, name: other}) == [name]


class Augmented(Dataset):
    """Draws from Python's and NumPy's generators for each example, as augmentations do."""

    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = random.random() + np.random.rand()
        return torch.full((6,), index / 26 + noise), index % 3


@pytest.mark.parametrize("own", [False, True])
def test_a_loader_is_taken_up_whatever_it_draws_from(own, tmp_path):
    def make(out: Path, *callbacks: Callback) -> Any:
        generator = torch.Generator().manual_seed(3) if own else None
        loader = DataLoader(Augmented(), 4, shuffle=True, generator=generator)
        return function_run(out, callbacks, batches=loader)

    make(tmp_path / "whole").fit()
    for step in (2, 9):  # in the first epoch of seven batches, and in the second
        make(tmp_path / "parts", Interruption("signal", step)).fit(resume=True)
    make(tmp_path / "parts").fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


def test_a_loader_with_processes_of_its_own(tmp_path):
    def make(out: Path, *callbacks: Callback) -> Any:
        loader = DataLoader(Augmented(), 4, shuffle=True, num_workers=1)
        return function_run(out, callbacks, batches=loader, steps=9)

    make(tmp_path / "whole").fit()
    make(tmp_path / "parts", Interruption("signal", 5)).fit()
    make(tmp_path / "parts").fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


@pytest.mark.parametrize("place", ["signal", "on_step", None])
def test_the_processes_of_a_loader_end_with_the_run(place, tmp_path):
    loader = DataLoader(Augmented(), 4, shuffle=True, num_workers=1)
    callbacks = (Interruption(place, 5),) if place else ()
    run = function_run(tmp_path, callbacks, batches=loader, steps=9)
    with suppress(Killed):
        run.fit()
    assert multiprocessing.active_children() == []


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    # Without what depends on the last step: the evaluation and the checkpoint there.
    never = {"evaluate_every": 0, "monitor": "", "save_every": 0, "log_every": 4}
    function_run(tmp_path / "whole", steps=16, **never).fit()
    first = function_run(tmp_path / "parts", steps=12, **never).fit()
    assert first.reason == "all 12 steps are done"
    again = function_run(tmp_path / "parts", steps=12, **never).fit(resume=True)
    assert (again.step, again.metrics, again.checkpoint) == (12, first.metrics, first.checkpoint)
    assert function_run(tmp_path / "parts", steps=16, **never).fit(resume=True).step == 16
    whole, parts = (Checkpoints(tmp_path / name).load().state for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    config = (tmp_path / "parts" / "config.json").read_text()
    assert '"steps": 16' in config  # the settings with which the run would be taken up next


def test_a_run_that_stopped_early_stays_stopped_unless_it_is_asked_for_more(tmp_path):
    def make(patience: int) -> Any:
        # No evaluation is better than the first by 100.
        stopping = EarlyStopping("lm_loss", patience, mode="min", min_delta=100)
        return function_run(tmp_path, (stopping,))

    first = make(1).fit()
    assert first.step == 10 and first.reason.startswith("lm_loss has not become better than")
    again = make(1).fit(resume=True)
    assert (again.step, again.reason) == (first.step, first.reason)
    assert make(9).fit(resume=True).step == STEPS
    told = [event["message"] for event in read_records(tmp_path / "events.jsonl")]
    assert "EarlyStopping lm_loss: patience 1 is now 9" in told


def test_a_stopping_with_another_mode_begins_anew_and_says_so(tmp_path):
    first = EarlyStopping("lm_loss", 5, mode="max", min_delta=100)
    function_run(tmp_path, (first,), steps=10).fit()
    assert first.waited == 1
    again = EarlyStopping("lm_loss", 5, mode="min", min_delta=100)
    function_run(tmp_path, (again,), steps=11, evaluate_every=0).fit(resume=True)
    assert again.waited == 0 and 0 < again.best < 99
    told = [event["message"] for event in read_records(tmp_path / "events.jsonl")]
    assert "EarlyStopping lm_loss: mode max is now min" in told


def test_a_run_that_reached_its_target_goes_on_to_another_one(tmp_path):
    def make(target: float) -> Any:
        return function_run(tmp_path, (StopAtTarget("lm_loss", target, mode="min"),))

    first = make(99.0).fit()
    assert first.step == 5 and "has reached 99" in first.reason
    assert make(99.0).fit(resume=True).step == 5
    assert make(-1.0).fit(resume=True).step == STEPS


def test_callbacks_without_a_state_may_come_and_go(tmp_path):
    function_run(tmp_path, steps=4).fit()
    function_run(tmp_path, (Callback(), StopAtTarget("lm_loss", -1.0, "min"))).fit(resume=True)


def damage(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path):
    puzzle_run(tmp_path / "whole").fit()
    puzzle_run(tmp_path / "parts", (Interruption("signal", 8),)).fit()
    damage(tmp_path / "parts" / "ckpt" / "step-00000008")
    puzzle_run(tmp_path / "parts").fit(resume=True)
    # BEST is where it was, but the directories are others: the damaged one has its name.
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []
    events = read_records(tmp_path / "parts" / "events.jsonl")
    told = [event["message"] for event in events if event["event"] in ("checkpoint", "resumed")]
    assert "step-00000008: model.safetensors must have the sha256" in told[0]
    assert told[1].startswith("resumed at step 6") or told[1].startswith("resumed at step 5")


def test_if_all_checkpoints_are_damaged_the_run_says_so_and_stays_as_it_is(tmp_path):
    function_run(tmp_path).fit()
    for info in Checkpoints(tmp_path).list():
        damage(info.path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"latest of .* must be whole"):
        function_run(tmp_path).fit(resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": "sgd"}, r"same optimizers, \['SGD'\]; got \['AdamW'\]"),
        ({"ema": 0.5}, "same averages of weights, 1; got 0"),
        ({"dtype": torch.float64}, "must be .*float64 as in the model; got .*float32"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_before_anything_changes(changed, message, tmp_path):
    function_run(tmp_path, steps=3).fit()
    other = function_run(tmp_path, **changed)
    before = [param.clone() for param in other.model.parameters()]
    with pytest.raises(ValueError, match=f"Trainer: .*{message}"):
        other.fit(resume=True)
    assert all(map(torch.equal, before, other.model.parameters()))


def test_numbers_that_json_has_not_come_back_as_numbers(tmp_path):
    trainer = function_run(tmp_path, on_nonfinite="skip", steps=4)
    trainer.model[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="must be finite"):
        trainer.fit()  # no checkpoint of such a model is written
    trainer = function_run(tmp_path, steps=4)
    trainer.fit(resume=True)
    assert all(isinstance(record["loss"], float) for record in trainer.history if "loss" in record)


SETTINGS = (
    "--data.size 4 --data.clues [6,8] --data.train 30 --data.test 8 --batch 6 --device cpu "
    "--model.hidden_size 8 --model.num_heads 2 --model.L_layers 1 --model.halt_max_steps 3 "
    "--optimizer.warmup 3 --train.steps 100 --train.log_every 10 --train.evaluate_every 35 "
    "--train.save_every 10"
).split()


def weights(out: Path) -> bytes:
    latest = (out / "ckpt" / "LATEST").read_text().strip()
    return (out / "ckpt" / latest / "model.safetensors").read_bytes()


@pytest.mark.long
def test_processes_that_are_interrupted_and_killed_end_with_the_same_bytes(tmp_path):
    whole, out, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"

    def train(out: Path, more: list[str], number: int = 0, wait: float = 0.0) -> int | None:
        log.unlink(missing_ok=True)
        process = start(log, main, ["train", "sudoku", "--out", str(out), *more])
        if number:
            # Something was logged: there is a checkpoint, and signals are caught.
            while process.is_alive() and not (log.exists() and b"\n" in log.read_bytes()):
                time.sleep(0.01)
            time.sleep(wait)
            os.kill(process.pid, number)
        process.join()
        return process.exitcode

    assert train(whole, SETTINGS) == 0
    chance, more = random.Random(0), SETTINGS
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        # On a fast machine the run may have ended before the signal.
        assert train(out, more, number, 0.1 * chance.random()) in (code, 0), log.read_text()
        more = ["--resume"]  # with the settings in config.json
    assert train(out, more) == 0
    assert weights(out) == weights(whole)
    steps = [[r["step"] for r in read_records(run / "metrics.jsonl")] for run in (out, whole)]
    assert steps[0] == steps[1]


def test_an_evaluation_after_the_last_checkpoint_is_recorded_once(tmp_path):
    never = {"evaluate_every": 0, "monitor": "", "save_every": 4}
    function_run(tmp_path / "whole", **never).fit()
    try:
        function_run(tmp_path / "parts", (Interruption("on_evaluate", STEPS),), **never).fit()
    except Killed:
        pass
    assert Checkpoints(tmp_path / "parts").load().step == STEPS
    function_run(tmp_path / "parts", **never).fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


@pytest.mark.parametrize("version", [None, 2, 4])
def test_a_checkpoint_of_another_version_is_refused_in_one_sentence(version, tmp_path):
    trainer = function_run(tmp_path)
    trainer.fit()
    state = Checkpoints(tmp_path).load().state
    del state["trainer"]["version"]
    if version is not None:
        state["trainer"]["version"] = version
    Checkpoints(tmp_path).save(STEPS + 1, state)
    message = f"must be of version 3 of the state of a trainer; got {version or 1}. Go on with the"
    with pytest.raises(ValueError, match=message):
        function_run(tmp_path, steps=20).fit(resume=True)
    with pytest.raises(ValueError, match=message):
        load_run(function_run(None), tmp_path)


def taken_away(run: Path, *names: str) -> None:
    for name in names:
        files.remove(run / name)


@pytest.mark.parametrize(
    "names", [["ckpt"], ["ckpt", "run.json"], ["ckpt", "metrics.jsonl"], [".lock", "ckpt"]]
)
@pytest.mark.parametrize("empty", [False, True])
def test_a_run_without_its_checkpoints_is_not_begun_anew(names, empty, tmp_path):
    function_run(tmp_path).fit()
    taken_away(tmp_path, *names)
    if empty:
        (tmp_path / "ckpt").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    message = (
        r"ckpt must have a checkpoint to resume the run; got none beside .*, which goes to step"
    )
    with pytest.raises(ValueError, match=message):
        function_run(tmp_path).fit(resume=True)
    before.pop(tmp_path / ".lock", None)
    assert all(path.read_bytes() == data for path, data in before.items())
    function_run(tmp_path).fit(overwrite=True)
    assert Checkpoints(tmp_path).load().step == STEPS


def test_a_run_that_has_saved_nothing_yet_begins_again_and_says_what_is_dropped(tmp_path):
    function_run(tmp_path / "whole", save_every=0, evaluate_every=0).fit()
    stop = Interruption("on_step", 9)
    with pytest.raises(Killed):
        function_run(tmp_path / "parts", (stop,), save_every=0, evaluate_every=0).fit()
    function_run(tmp_path / "parts", save_every=0, evaluate_every=0).fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []
    told = [event["message"] for event in read_records(tmp_path / "parts" / "events.jsonl")]
    assert told == [
        "there is no checkpoint yet: starting at the beginning",
        "lines dropped that came after step 0: 2",
    ]


def test_to_resume_where_there_is_no_run_is_said(tmp_path):
    function_run(tmp_path).fit(resume=True)
    told = [event["message"] for event in read_records(tmp_path / "events.jsonl")]
    assert told == [f"there is no run in {tmp_path} yet: this is a new one"]


def test_records_that_a_resume_drops_or_misses_are_counted(tmp_path):
    with pytest.raises(Killed):
        function_run(tmp_path, (Interruption("on_evaluate", 10),)).fit()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[1:]))
    function_run(tmp_path).fit(resume=True)
    told = [event["message"] for event in read_records(tmp_path / "events.jsonl")]
    assert told[1:] == [
        "lines dropped that came after step 9: 1",
        "lines that metrics.jsonl had before and lacks now: 1",
    ]


def test_fewer_steps_than_were_taken_are_told_of(tmp_path):
    function_run(tmp_path, steps=8).fit()
    summary = function_run(tmp_path, steps=5).fit(resume=True)
    assert (summary.step, summary.reason) == (
        8, "nothing is left to do: 8 steps were taken, more than the 5 that are asked for"
    )  # fmt: skip
    assert read_run(tmp_path).steps == 8


def told_of(run: Path, event: str) -> list[str]:
    return [e["message"] for e in read_records(run / "events.jsonl") if e["event"] == event]


@pytest.mark.parametrize("more", [{"monitor": "noise"}, {"mode": "max"}])
def test_another_monitor_begins_the_best_checkpoint_anew(more, tmp_path):
    function_run(tmp_path, steps=6).fit()
    run = function_run(tmp_path, steps=STEPS, **more)
    run.fit(resume=True)
    name, mode = more.get("monitor", "lm_loss"), more.get("mode", "min")
    assert told_of(tmp_path, "changed")[0] == (
        f"the monitor lm_loss (min) is now {name} ({mode}): the best checkpoint is looked for anew "
        "after step 6"
    )
    found = [r for r in run.history if r["kind"] == "evaluation" and r["step"] > 6]
    best = (min if mode == "min" else max)(found, key=lambda record: record[name])
    assert Checkpoints(tmp_path).load("best").step == best["step"] == run.best["step"]
    function_run(tmp_path, steps=STEPS + 1, **more).fit(resume=True)  # is none once more
    assert sum("monitor" in line for line in told_of(tmp_path, "changed")) == len({name, "lm_loss"})


def test_what_the_bits_depend_on_is_told_of_where_it_has_changed(tmp_path, monkeypatch):
    function_run(tmp_path, steps=3).fit()
    function_run(tmp_path, steps=3).fit(resume=True)
    assert told_of(tmp_path, "changed") == []
    monkeypatch.setattr(torch, "__version__", "1.0")
    torch.set_num_threads(2)
    function_run(tmp_path, steps=4, clip_norm=2.0).fit(resume=True)
    bits, settings = told_of(tmp_path, "changed")
    assert bits.startswith("what the bits depend on has changed: torch ")
    assert bits.endswith(" is now 1.0; threads 1 is now 2")
    assert settings == "settings have changed: steps 3 is now 4; clip_norm None is now 2.0"


def test_other_data_of_the_same_size_are_told_of(tmp_path):
    data = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))

    def run(data: Any, steps: int) -> None:
        loader = DataLoader(TensorDataset(data, torch.zeros(8, dtype=torch.long)), 4)
        function_run(tmp_path, batches=loader, steps=steps).fit(resume=True)

    run(data, 3)
    run(data.clone(), 3)
    assert told_of(tmp_path, "changed") == []
    run(data.flip(0), 3)
    assert told_of(tmp_path, "changed") == [
        "what the bits depend on has changed: the data of 'train' are others"
    ]
