"""Stages: when they end, what they change, and how a run comes back into the middle of one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trm_fast.train import (
    Callback,
    Curriculum,
    EarlyStopping,
    EpochBatches,
    Record,
    Run,
    Stage,
    Trainer,
    TrainerConfig,
    until,
)
from trm_fast.train.run_directory import read_records

from ..interruptions import Interruption, Killed
from .runs import differences, result
from .test_trainer import loss, network, split


def run(curriculum: Any, *callbacks: Callback, out: Path | None = None, **options: Any) -> Trainer:
    model = network()
    config = {"steps": 100, "log_every": 5, "save_every": 3, **options.pop("config", {})}
    return Trainer(
        model,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        curriculum,
        loss,
        TrainerConfig(**config),
        callbacks=callbacks,
        out=out,
        device="cpu",
        **options,
    )


def counted(values: list[float]) -> Any:
    left = iter(values)
    return lambda model: {"value": next(left)}


class Notes(Callback):
    """Notes stages, epochs and learning rates."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.rates: list[float] = []

    def on_stage(self, run: Run, stage: str) -> None:
        self.told.append((run.step, stage))

    def on_epoch(self, run: Run, epoch: int) -> None:
        self.told.append((run.step, epoch))

    def on_gradients(self, run: Run, step: Any) -> None:
        self.rates.append(run.optimizers[0].param_groups[0]["lr"])


def test_a_stage_ends_after_its_steps_by_a_metric_or_with_its_batches(tmp_path):
    notes = Notes()
    stages = [
        Stage("steps", split(6), steps=4),
        Stage("metric", evaluate=counted([0.1, 0.7, 0.9]), done=until("value", 0.6),
              evaluate_every=2),
        Stage("batches", EpochBatches(split(9), epochs=2)),
    ]  # fmt: skip
    trainer = run(Curriculum(stages), notes, out=tmp_path)
    summary = trainer.fit()
    assert trainer.curriculum.history == [
        {"stage": "steps", "step": 4, "steps": 4, "reason": "all 4 steps of the stage are done"},
        {"stage": "metric", "step": 8, "steps": 4, "reason": "value 0.7 has reached 0.6"},
        {"stage": "batches", "step": 16, "steps": 8, "reason": "the batches have ended"},
    ]
    assert summary.reason == "stage 'batches' is over: the batches have ended"
    # The second stage goes on with the batches of the first one, of which six are an epoch.
    assert notes.told == [(0, "steps"), (4, "metric"), (6, 0), (8, "batches"), (12, 1), (16, 2)]
    assert trainer.epochs == 3
    events = [e["message"] for e in read_records(tmp_path / "events.jsonl")]
    assert events == [
        "stage 'steps' begins",
        "stage 'steps' is over: all 4 steps of the stage are done; stage 'metric' begins",
        "stage 'metric' is over: value 0.7 has reached 0.6; stage 'batches' begins",
    ]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # No record is of two stages.
    assert [(r["step"], r["kind"], r["curriculum/stage"], r["curriculum/step"]) for r in lines] == [
        (4, "train", 0, 4), (5, "train", 1, 1), (6, "evaluation", 1, 2), (8, "evaluation", 1, 4),
        (8, "train", 1, 4), (10, "train", 2, 2), (15, "train", 2, 7), (16, "train", 2, 8),
    ]  # fmt: skip


def test_the_run_ends_with_its_steps_whatever_the_stage():
    summary = run(Curriculum([Stage("a", split(6), steps=50)]), config={"steps": 7}).fit()
    assert (summary.step, summary.reason) == (7, "all 7 steps are done")


def test_a_stage_changes_settings_and_schedules():
    notes = Notes()

    def constant(factor: float) -> Any:
        return lambda made: [
            torch.optim.lr_scheduler.LambdaLR(made[0], lambda step: factor / (1 + step))
        ]

    def doubled(run: Run) -> None:
        for group in run.optimizers[0].param_groups:
            group["lr"] = 0.2

    stages = [
        Stage("plain", split(6), steps=2),
        Stage("options", settings={"lr": 0.05, "momentum": 0.0}, steps=2),
        Stage("scheduled", schedules=constant(1.0), steps=3),
        Stage("again", schedules=constant(2.0), settings=doubled, steps=2),
        Stage("as it was", schedules=constant(1.0), steps=1),
    ]
    trainer = run(Curriculum(stages), notes)
    trainer.fit()
    wanted = [0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.05 / 3, 0.4, 0.2, 0.2]
    assert notes.rates == pytest.approx(wanted, rel=1e-15)
    assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.0


def test_a_stage_is_left_for_another_one_by_name():
    class Back(Callback):
        def on_step(self, run: Run, step: Any) -> None:
            if run.step == 5:
                run.curriculum.go_to("a", "it is forgotten")

    stages = [Stage("a", split(6), steps=3), Stage("b", steps=4)]
    trainer = run(Curriculum(stages), Back())
    assert trainer.fit().step == 12
    history = trainer.curriculum.history
    assert [(record["stage"], record["steps"]) for record in history] == [
        ("a", 3), ("b", 2), ("a", 3), ("b", 4),
    ]  # fmt: skip
    assert history[1]["reason"] == "it is forgotten"


def test_a_run_can_begin_with_any_stage():
    stages = [Stage("a", split(6), steps=3), Stage("b", steps=4)]
    assert run(Curriculum(stages, first="b")).fit().step == 4


def test_batches_are_made_when_their_stage_begins():
    made: list[str] = []

    def batches() -> list[Any]:
        made.append("b")
        return split(9)

    class Look(Callback):
        def on_step(self, run: Run, step: Any) -> None:
            made.append(f"step {run.step}")

    run(Curriculum([Stage("a", split(6), steps=1), Stage("b", batches, steps=2)]), Look()).fit()
    assert made == ["step 1", "b", "step 2", "step 3"]


@pytest.mark.parametrize(
    ("stages", "first", "message"),
    [
        ([], "", "stages must be at least one; got none"),
        ([Stage("a", [1]), Stage("a")], "", "stages must have names of their own; got 'a' twice"),
        ([Stage("a"), Stage("b", [1])], "b",
         "the first of the stages must have batches; got None in 'a'"),
        ([Stage("easy", [1]), Stage("hard")], "hardest",
         "a stage must be one of easy, hard; got 'hardest'; did you mean 'hard'?"),
    ],
)  # fmt: skip
def test_wrong_curricula_are_refused(stages, first, message):
    with pytest.raises(ValueError) as error:
        Curriculum(stages, first)
    assert str(error.value) == f"Curriculum: {message}"


def test_wrong_stages_are_refused():
    for options, message in (
        ({"steps": 0}, "steps must be >= 1, or None; got 0"),
        ({"evaluate_every": -1}, "evaluate_every must be >= 0, or None; got -1"),
    ):
        with pytest.raises(ValueError, match=f"^Stage: {message}$"):
            Stage("a", **options)
    stage = Stage("a", split(6), settings={"lamb": 1.0})
    with pytest.raises(ValueError, match=r"options of an optimizer, such as .*lr.*; got 'lamb'"):
        run(Curriculum([stage])).fit()
    with pytest.raises(ValueError, match="until: monitor must be a metric of the evaluation"):
        stage = Stage("a", split(6), evaluate=counted([1.0]), done=until("nothing", 1.0),
                      evaluate_every=1)  # fmt: skip
        run(Curriculum([stage])).fit()


def test_batches_of_a_run_are_not_assigned():
    trainer = run(split(6))
    with pytest.raises(AttributeError, match="must be changed by a Stage of a Curriculum"):
        trainer.batches = split(9)


def test_early_stopping_does_not_compare_stages():
    stages = [Stage("a", split(6), evaluate=counted([0.9]), steps=1),
              Stage("b", evaluate=counted([0.1, 0.2, 0.2]), steps=3)]  # fmt: skip
    stopping = EarlyStopping("value", patience=1)
    assert run(Curriculum(stages), stopping, config={"evaluate_every": 1}).fit().step == 4


# Resumes


def staged(out: Path, *callbacks: Callback) -> Trainer:
    """Four stages that differ in everything; the last but one goes back once."""

    class Back(Callback):
        def on_step(self, run: Run, step: Any) -> None:
            if run.step == 14:
                run.curriculum.go_to("few", "once more")

    def evaluate(model: nn.Module) -> dict[str, float]:
        value = float(sum(loss(model, batch) for batch in split(12)))
        return {"value": value, "noise": float(torch.rand(()))}

    def decay(made: list[Any]) -> list[Any]:
        return [torch.optim.lr_scheduler.StepLR(made[0], 2, 0.5)]

    def limited(run: Run) -> None:
        run.model.limit = 3
        run.optimizers[0].param_groups[0]["lr"] *= 0.5

    def shuffled() -> EpochBatches:
        generator = torch.Generator().manual_seed(4)
        data = torch.utils.data.TensorDataset(
            *(torch.cat(part) for part in zip(*split(6), strict=True))
        )
        return EpochBatches(torch.utils.data.DataLoader(data, 5, shuffle=True, generator=generator))

    def done(record: Record) -> str | None:
        return "it is late" if record["step"] >= 12 else None

    stages = [
        Stage("few", split(6), steps=5, settings=limited),
        Stage("many", shuffled, evaluate=evaluate, done=done, evaluate_every=2, schedules=decay),
        Stage("ended", EpochBatches(split(12), epochs=2), settings={"momentum": 0.5}),
        Stage("last", split(6), steps=4),
    ]
    return run(Curriculum(stages), Back(), *callbacks, out=out, evaluate=evaluate,
               config={"accumulate": 2, "ema": 0.9, "steps": 60, "save_every": 4})  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "first"), [("on_gradients", 0), ("on_evaluate", 1), ("signal", 2)]
)
def test_a_run_comes_back_into_the_middle_of_any_stage(place, first, tmp_path):
    trainer = staged(tmp_path / "whole")
    steps = trainer.fit().step
    names = [record["stage"] for record in trainer.curriculum.history]
    assert names == ["few", "many", "ended", "few", "many", "ended", "last"]
    for step in range(first, steps, 3):
        out = tmp_path / f"{place}{step}"
        stop = Interruption(place, step)
        try:
            staged(out, stop).fit()
        except Killed:
            pass
        again = staged(out)
        again.fit(resume=True)
        assert differences(result(tmp_path / "whole"), result(out)) == [], step
        assert again.model.limit == 3


def test_further_stages_go_on_with_a_run_that_has_ended(tmp_path):
    first, second = Stage("a", split(6), steps=3), Stage("b", steps=4)
    run(Curriculum([first]), out=tmp_path).fit()
    assert run(Curriculum([first]), out=tmp_path).fit(resume=True).step == 3
    trainer = run(Curriculum([first, second]), out=tmp_path)
    assert trainer.fit(resume=True).step == 7
    assert [record["stage"] for record in trainer.curriculum.history] == ["a", "b"]


def test_a_checkpoint_of_a_stage_that_is_gone_is_refused(tmp_path):
    run(Curriculum([Stage("a", split(6), steps=3)]), out=tmp_path).fit()
    with pytest.raises(ValueError, match="a stage must be one of b; got 'a'"):
        run(Curriculum([Stage("b", split(6), steps=3)]), out=tmp_path).fit(resume=True)
