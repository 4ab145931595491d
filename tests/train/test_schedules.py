"""Schedules of a trainer: those of every update, and those that an evaluation moves."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from trm_fast.train import Checkpoints, Curriculum, Stage, Trainer, TrainerConfig

from .runs import differences, result
from .test_trainer import loss, network, split

# Of eight evaluations; the rate falls after each second one that is not better.
VALUES = (3.0, 2.0, 2.5, 2.5, 2.5, 1.0, 1.5, 1.5)


def plateau(optimizers: list[Any]) -> list[Any]:
    return [lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1) for o in optimizers]


def run(out: Any = None, schedules: Any = plateau, batches: Any = None, **config: Any) -> Trainer:
    settings = {"steps": 8, "evaluate_every": 1, "monitor": "value", "mode": "min", **config}
    trainer = Trainer(
        network(), lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
        split(6) if batches is None else batches, loss, TrainerConfig(**settings),
        schedules=schedules, out=out, device="cpu",
        evaluate=lambda model: {"value": VALUES[trainer.step - 1]},
    )  # fmt: skip
    return trainer


def test_a_plateau_is_given_the_monitored_metric_of_each_evaluation():
    trainer = run()
    rates = [trainer.optimizers[0].param_groups[0]["lr"] for _ in trainer.updates()]
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("steps", [3, 4, 7])
def test_a_plateau_goes_on_after_a_resume(steps, tmp_path):
    run(tmp_path / "whole", log_every=1).fit()
    run(tmp_path / "parts", log_every=1, steps=steps).fit()
    run(tmp_path / "parts", log_every=1).fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []
    (saved,) = Checkpoints(tmp_path / "parts").load().state["trainer"]["schedules"]
    assert (saved["best"], saved["last_epoch"]) == (1.0, 8)


@pytest.mark.parametrize(
    ("config", "got"),
    [
        ({"monitor": ""}, "monitor '' and some evaluations"),
        ({"evaluate_every": 0}, "monitor 'value' and no evaluations"),
    ],
)
def test_a_plateau_without_its_metric_is_refused(config, got):
    with pytest.raises(ValueError, match=f"must not have ReduceLROnPlateau.*; got {got}"):
        run(**config)


def test_a_plateau_of_a_later_stage_is_refused_when_the_trainer_is_made():
    stages = [Stage("one", split(6), steps=4), Stage("two", schedules=plateau, steps=2)]
    refused = "schedules of stage 'two' must not have ReduceLROnPlateau"
    for lacking in ({"monitor": ""}, {"evaluate_every": 0}):
        with pytest.raises(ValueError, match=refused):
            run(schedules=(), batches=Curriculum(stages), **lacking)
    # The stage after it has no evaluation either, but this one has.
    evaluated = [stages[0], replace(stages[1], evaluate_every=1), Stage("three")]
    run(schedules=(), batches=Curriculum(evaluated), evaluate_every=0)


def test_what_a_later_stage_would_schedule_moves_nothing_before():
    def made(optimizers):
        return [lr_scheduler.LinearLR(each, 0.25) for each in optimizers]

    trainer = run(
        batches=Curriculum([Stage("one", split(6), steps=4), Stage("two", schedules=made)])
    )
    (group,) = trainer.optimizers[0].param_groups
    assert group["lr"] == 1.0 and "step" not in vars(trainer.optimizers[0])


def test_what_a_later_stage_would_schedule_leaves_a_tensor_alone():
    def made(optimizers):
        return [lr_scheduler.LinearLR(each, 0.25) for each in optimizers]

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1.0))
    stages = [Stage("one", split(6), steps=4), Stage("two", schedules=made)]
    Trainer(model, optimizer, Curriculum(stages), loss, TrainerConfig(steps=5), device="cpu")
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_schedules_that_need_their_stage_are_looked_at_when_it_begins():
    def made(optimizers):
        return plateau(optimizers) if optimizers[0].param_groups[0]["momentum"] else 1 / 0

    stages = [
        Stage("one", split(6), steps=2),
        Stage("two", settings={"momentum": 0.5}, schedules=made),
    ]
    trainer = run(schedules=(), batches=Curriculum(stages), monitor="")
    with pytest.raises(ValueError, match="must not have ReduceLROnPlateau"):
        trainer.fit()
    assert trainer.step == 2


def test_a_plateau_of_a_stage_is_given_its_metrics():
    stages = [Stage("one", split(6), steps=4), Stage("two", schedules=plateau)]
    trainer = run(schedules=(), batches=Curriculum(stages))
    trainer.fit()
    # 2.5 is the first value of the second stage, and 1.0 the best.
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda o: SWALR(o, swa_lr=0.1, anneal_epochs=3),
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)]),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_schedules_are_stepped_with_each_update(make):
    trainer = run(schedules=lambda made: [make(o) for o in made], monitor="", evaluate_every=0)
    trainer.fit()
    optimizer = torch.optim.SGD([torch.ones(1)], lr=1.0)
    alone = make(optimizer)
    for _ in range(8):
        alone.step()
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 1.0


def test_an_optimizer_that_needs_a_closure_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"Trainer: optimizers must step without a closure.*got LBFGS"
    ):
        Trainer(network(), lambda m: torch.optim.LBFGS(m.parameters()), split(6), loss)
