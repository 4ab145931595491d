"""Between two stages: what a checkpoint of that moment holds, and what a resume makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trm_fast.train import Callback, Checkpoints, Curriculum, EpochBatches, Run, Stage, until
from trm_fast.train.reports.reading import read_run
from trm_fast.train.run_directory import read_records

from ..interruptions import Interruption, Killed
from .runs import differences, result
from .test_curriculum import counted, run
from .test_trainer import loss, split


def value(model: Any) -> dict[str, float]:
    return {"value": float(sum(loss(model, batch) for batch in split(12)))}


class At(Callback):
    """Does something at one hook of a step."""

    def __init__(self, hook: str, step: int, action: Any) -> None:
        self.step, self.action = step, action
        setattr(self, hook, self._act)

    def _act(self, run: Run, *_: Any) -> None:
        if run.step == self.step:
            self.action(run)


# Checkpoints that hooks ask for


@pytest.mark.parametrize("hook", ["on_step", "on_epoch", "on_log", "on_evaluate", "on_stage"])
def test_a_checkpoint_of_a_hook_is_of_the_whole_step(hook, tmp_path):
    def staged(out: Path, *callbacks: Callback) -> Any:
        stages = [Stage("a", split(12), evaluate=value, steps=3), Stage("b", steps=4)]
        return run(Curriculum(stages), *callbacks, out=out,
                   config={"save_every": 0, "log_every": 3})  # fmt: skip

    saved: list[Any] = []
    save = At(hook, 3, lambda run: saved.append(run.save()))
    staged(tmp_path / "whole", save).fit()
    assert saved == [None]
    with pytest.raises(Killed):
        staged(tmp_path / "parts", save, Interruption("on_gradients", 5)).fit()
    assert [info.step for info in Checkpoints(tmp_path / "parts").list()] == [3]
    again = staged(tmp_path / "parts")
    again.fit(resume=True)
    assert [record["steps"] for record in again.curriculum.history] == [3, 4]
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


def test_no_checkpoint_is_made_of_half_a_step(tmp_path):
    save = At("on_gradients", 2, lambda run: run.save())
    with pytest.raises(RuntimeError, match="save must not come between the gradients of a step"):
        run(split(6), save, out=tmp_path).fit()


def test_a_checkpoint_outside_of_the_loop_is_written_at_once(tmp_path):
    trainer = run(split(6), out=tmp_path, config={"steps": 2})
    trainer.fit()
    trainer.step = 3
    assert trainer.save() == tmp_path / "ckpt" / "step-00000003"


# Stages that are left


def test_go_to_as_a_stage_begins_is_not_lost(tmp_path):
    class Skip(Callback):
        def on_stage(self, run: Run, stage: str) -> None:
            if stage == "b":
                run.curriculum.go_to("c", "not needed")

    def staged(out: Path, *callbacks: Callback) -> Any:
        stages = [Stage("a", split(6), steps=3), Stage("b", steps=4), Stage("c", steps=2)]
        return run(Curriculum(stages), Skip(), *callbacks, out=out)

    staged(tmp_path / "whole").fit()
    with pytest.raises(Killed):
        # The checkpoint is of the beginning of b.
        staged(tmp_path / "parts", Interruption("on_gradients", 3)).fit()
    again = staged(tmp_path / "parts")
    again.fit(resume=True)
    assert [(r["stage"], r["steps"]) for r in again.curriculum.history] == [
        ("a", 3), ("b", 1), ("c", 2),
    ]  # fmt: skip
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


class _Hidden:
    """Batches that do not say how many they are."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


@pytest.mark.parametrize("hidden", [False, True])
def test_go_to_at_the_end_of_an_epoch_comes_before_the_next_step(hidden):
    back = At("on_epoch", 4, lambda run: run.curriculum.go_to("b", "an epoch is enough"))
    first = _Hidden(split(9)) if hidden else split(9)
    trainer = run(Curriculum([Stage("a", first), Stage("b", split(6), steps=1)]), back)
    trainer.fit()
    assert [record["steps"] for record in trainer.curriculum.history] == [4, 1]


@pytest.mark.parametrize("hidden", [False, True])
def test_no_record_is_of_two_stages_however_the_batches_end(hidden, tmp_path):
    source = _Hidden(split(9)) if hidden else split(9)
    stages = [Stage("a", EpochBatches(source, epochs=1)), Stage("b", split(6), steps=3)]
    run(Curriculum(stages), out=tmp_path).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["curriculum/stage"]) for r in lines] == [(4, 0), (5, 1), (7, 1)]


# What a resume makes of a stage that is another one now


def test_a_last_stage_that_is_longer_now_goes_on(tmp_path):
    run(Curriculum([Stage("a", split(6), steps=3)]), out=tmp_path / "parts").fit()
    trainer = run(Curriculum([Stage("a", split(6), steps=9)]), out=tmp_path / "parts")
    assert trainer.fit(resume=True).step == 9
    assert trainer.curriculum.history == [
        {"stage": "a", "step": 9, "steps": 9, "reason": "all 9 steps of the stage are done"}
    ]
    again = run(Curriculum([Stage("a", split(6), steps=9)]), out=tmp_path / "parts")
    summary = again.fit(resume=True)
    assert summary.reason == "stage 'a' is over: all 9 steps of the stage are done"
    assert again.curriculum.history == trainer.curriculum.history


@pytest.mark.parametrize("options", [{"done": None}, {"done": until("value", 0.9)}])
def test_a_last_stage_with_another_aim_goes_on(options, tmp_path):
    def staged(**changed: Any) -> Any:
        given = {"done": until("value", 0.5), "evaluate_every": 1, **changed}
        values = counted([0.1, 0.6] if not changed else [0.7, 0.95, 0.96])
        return run(Curriculum([Stage("a", split(6), evaluate=values, **given)]), out=tmp_path,
                   config={"steps": 5})  # fmt: skip

    assert staged().fit().step == 2
    assert staged(**options).fit(resume=True).step == (5 if options["done"] is None else 4)


def test_batches_that_go_further_now_go_on(tmp_path):
    def staged(epochs: int) -> Any:
        return run(Curriculum([Stage("a", EpochBatches(split(9), epochs))]), out=tmp_path)

    assert staged(1).fit().step == 4
    assert staged(2).fit(resume=True).step == 8


# One object in two stages


@pytest.mark.parametrize("kind", ["batches", "loader"])
def test_one_source_in_two_stages_has_one_place(kind, tmp_path):
    class Log(Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_step(self, run: Run, step: Any) -> None:
            self.seen.append(int(step.batches[0][1][0]))
            if run.step in (6, 9):
                run.curriculum.go_to("a", "once more")

    def staged(out: Path, *callbacks: Callback) -> Any:
        numbers = torch.arange(40)
        data = torch.utils.data.TensorDataset(torch.ones(40, 6, dtype=torch.float64), numbers)
        generator = torch.Generator().manual_seed(4)
        loader = torch.utils.data.DataLoader(data, 1, shuffle=True, generator=generator)
        source: Any = loader if kind == "loader" else EpochBatches(loader)
        stages = [Stage("a", source, steps=3), Stage("b", split(6), steps=1),
                  Stage("c", source, steps=5)]  # fmt: skip
        trainer = run(Curriculum(stages), *callbacks, out=out, config={"steps": 14})
        trainer.objective.function = lambda model, batch: model(batch[0]).sum()
        return trainer

    whole, first, second = Log(), Log(), Log()
    staged(tmp_path / "whole", whole).fit()
    # All but those of stage b, after steps 3, 9 and 12, are different rows of one epoch.
    own = [number for step, number in enumerate(whole.seen) if step not in (3, 9)]
    assert len({*own}) == len(own)
    with pytest.raises(Killed):
        staged(tmp_path / "parts", first, Interruption("on_gradients", 5)).fit()
    staged(tmp_path / "parts", second).fit(resume=True)
    assert first.seen[:3] + second.seen == whole.seen
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


def test_functions_that_give_two_stages_one_object_are_refused():
    shared = EpochBatches(split(6))
    stages = [Stage("a", lambda: shared, steps=1), Stage("b", lambda: shared, steps=1)]
    with pytest.raises(ValueError, match="a function for batches must return new ones"):
        run(Curriculum(stages)).fit()


def test_a_curriculum_is_for_one_trainer():
    curriculum = Curriculum([Stage("a", split(6), steps=1)])
    run(curriculum).fit()
    with pytest.raises(ValueError, match="a curriculum must be given to one trainer"):
        run(curriculum)


# What would pass in silence


def test_done_without_evaluations_is_refused():
    stage = Stage("a", split(6), done=until("value", 0.5))
    with pytest.raises(ValueError, match=r"done needs the argument evaluate .* in stage 'a'"):
        run(Curriculum([stage]), config={"evaluate_every": 1})
    with pytest.raises(ValueError, match=r"done needs evaluations .* got 0 in stage 'a'"):
        run(Curriculum([stage]), evaluate=value)


def test_an_option_that_a_schedule_would_set_back_is_refused():
    def schedules(made: list[Any]) -> list[Any]:
        return [torch.optim.lr_scheduler.LambdaLR(made[0], lambda step: 1.0)]

    slow = Stage("slow", settings={"lr": 0.01}, steps=3)
    with pytest.raises(ValueError, match=r"that a schedule moves.* got 'lr' in stage 'slow'"):
        run(Curriculum([Stage("a", split(6), steps=1), slow]), schedules=schedules)
    scheduled = Stage("a", split(6), steps=1, schedules=schedules)
    with pytest.raises(ValueError, match=r"that a schedule moves.* got 'lr' in stage 'slow'"):
        run(Curriculum([scheduled, slow])).fit()
    other = Stage("slow", settings={"momentum": 0.5}, steps=3)
    run(Curriculum([Stage("a", split(6), steps=1), other]), schedules=schedules).fit()


# The best


def test_the_best_is_that_of_the_present_stage(tmp_path):
    def staged(out: Path, *callbacks: Callback) -> Any:
        stages = [Stage("a", split(6), evaluate=counted([0.5, 0.9]), steps=4, evaluate_every=2),
                  Stage("b", evaluate=counted([0.4, 0.3]), steps=4, evaluate_every=2)]  # fmt: skip
        return run(Curriculum(stages), *callbacks, out=out,
                   config={"monitor": "value", "save_every": 0})  # fmt: skip

    seen: list[Any] = []
    look = At("on_gradients", 4, lambda run: seen.append(Checkpoints(tmp_path / "a").load("best")))
    summary = staged(tmp_path / "a", look).fit()
    # Until stage b has an evaluation the best is that of stage a, as it was before its end.
    saved = seen[0].state["trainer"]["curriculum"]
    assert (seen[0].step, seen[0].score, saved["index"], saved["history"]) == (4, 0.9, 0, [])
    assert summary.best == {"step": 6, "value": 0.4}
    best = Checkpoints(tmp_path / "a").load("best")
    assert (best.step, best.score) == (6, 0.4)
    report = read_run(tmp_path / "a")
    assert report.best["step"] == 6 and report.best_checkpoint == best.path.name
    events = [record["message"] for record in read_records(tmp_path / "a" / "events.jsonl")]
    assert events[-1].endswith("stage 'b' begins")


def test_a_checkpoint_before_the_end_of_a_stage_goes_on_with_the_next_one(tmp_path):
    def staged(out: Path, *callbacks: Callback) -> Any:
        stages = [Stage("a", split(6), steps=4, evaluate_every=4), Stage("b", steps=3)]
        return run(Curriculum(stages), *callbacks, out=out, evaluate=value,
                   config={"monitor": "value", "mode": "min", "save_every": 0})  # fmt: skip

    staged(tmp_path / "whole").fit()
    with pytest.raises(Killed):
        staged(tmp_path / "parts", Interruption("on_gradients", 5)).fit()
    again = staged(tmp_path / "parts")
    again.fit(resume=True)
    assert [record["steps"] for record in again.curriculum.history] == [4, 3]
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []
