"""A step that is not finite changes nothing, is counted, and ends a run if it goes on so."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trm_fast.train import Callback, Checkpoints, NonFiniteError, Step, StepResult, Trainer
from trm_fast.train._guard import NonFiniteGuard
from trm_fast.train.checkpoints.snapshot import snapshot
from trm_fast.train.checkpoints.state import flatten
from trm_fast.train.run_directory import read_records

from .runs import MAKE, differences, function_run, puzzle_run

BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
FUSED = {"adamw_fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)}
MAKE.update(FUSED)


class Poison(Callback):
    """Puts a number into a loss or a gradient at some steps, counted from 1.

    Args:
        steps: the steps.
        value: the number.
        where: "loss", or "grad" for one element of one gradient.
    """

    def __init__(self, *steps: int, value: float = float("nan"), where: str = "grad") -> None:
        self.steps, self.value, self.where = steps, value, where

    def on_start(self, trainer: Trainer) -> None:
        weight = next(iter(trainer.model.parameters()))

        def spoil(grad: Tensor) -> Tensor:
            if trainer.step + 1 not in self.steps or self.where != "grad":
                return grad
            grad = grad.clone()
            grad.view(-1)[-1] = self.value
            return grad

        weight.register_hook(spoil)
        objective = trainer.objective
        losses = objective.losses

        def spoiled(*args: Any) -> Iterator[StepResult]:
            for found in losses(*args):
                if trainer.step + 1 in self.steps and self.where == "loss":
                    # Finite gradients: only the loss shows it.
                    found = found._replace(loss=found.loss + torch.tensor(self.value))
                yield found

        objective.losses = spoiled  # type: ignore[method-assign]


def kept(trainer: Trainer) -> dict[str, Any]:
    """Weights, averages and states of optimizers, without learning rates: a schedule counts on."""
    state = snapshot(trainer)
    parts = {"model": state["model"], "ema": state.get("ema")}
    parts |= {"optim": [part["state"] for part in state["optim"].values()]}
    tensors, tree = flatten(parts, "state")
    return {name: tensor.clone() for name, tensor in tensors.items()} | {"tree": tree}


class Watch(Callback):
    """Keeps what the run has after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Any]] = []

    def on_step(self, trainer: Trainer, step: Step) -> None:
        self.after.append(kept(trainer))


def watched(
    make: Callable[..., Trainer], poison: Poison, on_device: bool = False, **options: Any
) -> tuple[Trainer, list[dict[str, Any]]]:
    watch = Watch()
    trainer = make(None, (poison, watch), steps=6, evaluate_every=0, monitor="", **options)
    trainer._update.on_device = on_device
    trainer.fit()
    return trainer, watch.after


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["loss", "grad"])
@pytest.mark.parametrize("optimizer", MAKE)
def test_a_step_that_is_not_finite_changes_nothing(optimizer, where, value):
    poison = Poison(3, value=BAD[value], where=where)
    heeds = optimizer not in ("adamw", "sgd")
    found = {}
    for on_device in (False, True) if heeds else (False,):
        ema = 0.9 if "adamw" in optimizer else None
        trainer, after = watched(
            function_run, poison, on_device, optimizer=optimizer, ema=ema, clip_norm=0.1
        )
        assert differences(after[1], after[2]) == []
        changed = differences(after[2], after[3])
        assert [name for name in changed if name.startswith("model.")]
        assert trainer.guard.skipped == 1
        found[on_device] = after
    # The device decides as the host does, to the bit, also for the steps after it.
    if heeds:
        assert all(differences(*pair) == [] for pair in zip(*found.values(), strict=True))


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("supervision", ["per_step", "joint"])
def test_a_skipped_step_leaves_the_puzzle_table_and_restarts_the_carry(supervision, on_device):
    options = {"supervision": supervision, "table": True, "clip_norm": 1.0}
    trainer, after = watched(puzzle_run, Poison(3), on_device, **options)
    assert differences(after[1], after[2]) == []
    assert "model.puzzles.table" in differences(after[2], after[3])
    assert all(torch.isfinite(value).all() for value in after[-1].values() if _is_float(value))
    if supervision == "per_step":
        # Sequences that came in with the fourth step have taken three of their steps at most.
        assert trainer.objective.carries[0].steps.max() <= 3


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def test_after_a_skipped_step_every_sequence_starts_anew():
    steps: list[Tensor] = []

    class Look(Callback):
        def on_step(self, trainer: Trainer, step: Step) -> None:
            steps.append(trainer.objective.carries[0].steps.clone())

    for on_device in (False, True):
        steps.clear()
        watch = Look()
        trainer = puzzle_run(None, (Poison(2), watch), steps=3, evaluate_every=0, monitor="")
        trainer._update.on_device = on_device
        trainer.fit()
        assert steps[2].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("on_device", [False, True])
def test_too_many_in_a_row_end_the_run_with_a_checkpoint(on_device, tmp_path):
    def make(*callbacks: Callback) -> Trainer:
        trainer = function_run(tmp_path, callbacks, optimizer="grokfast", log_every=6)
        trainer._update.on_device = on_device
        return trainer

    watch = Watch()
    # Two, then one that is finite, then three.
    with pytest.raises(NonFiniteError, match="3 steps in a row") as error:
        make(Poison(2, 3, 5, 6, 7), watch).fit()
    # On a device the host looks with each checkpoint and log only, here every 3 and 6 steps.
    seen = 9 if on_device else 7
    names = [f"step {n}, epoch {(n - 1) // 4}, batch {(n - 1) % 4}" for n in (5, 6, 7)]
    assert str(error.value).endswith("; ".join(names))
    events = read_records(tmp_path / "events.jsonl")
    assert [event["event"] for event in events] == ["skipped"] * 5 + ["stopped"]
    loaded = Checkpoints(tmp_path).load()
    assert loaded.step == seen and loaded.state["trainer"]["guard"]["skipped"] == 5
    trainer = make()
    assert differences(kept(trainer), watch.after[-1])
    summary = trainer.fit(resume=True)
    assert summary.reason.startswith("all") and summary.skipped == 5


def test_skip_goes_on(tmp_path):
    poison = Poison(*range(2, 9))
    summary = function_run(tmp_path, (poison,), on_nonfinite="skip").fit()
    assert (summary.step, summary.skipped) == (12, 7)
    events = read_records(tmp_path / "events.jsonl")
    assert [event["step"] for event in events] == [*range(2, 9)]


def test_batches_are_named_by_the_lines_they_come_from(tmp_path):
    trainer = puzzle_run(tmp_path, (Poison(1, 2, 3),))
    data = trainer.batches.data
    object.__setattr__(data, "sources", tuple(f"puzzles.csv:{n + 2}" for n in range(len(data))))
    with pytest.raises(NonFiniteError, match=r"step 1, epoch 0, examples \d+, .*puzzles\.csv:\d+"):
        trainer.fit()


def test_weights_that_are_not_finite_end_the_run_without_a_checkpoint(tmp_path):
    class Spoil(Callback):
        def on_gradients(self, run, step):
            if run.step == 1:
                nn.init.constant_(run.model[0].weight, float("nan"))

    trainer = function_run(tmp_path, (Spoil(),), save_every=0)
    with pytest.raises(NonFiniteError):
        trainer.fit()
    assert Checkpoints(tmp_path).list() == []
    last = read_records(tmp_path / "events.jsonl")[-1]
    assert last["message"].startswith("not written: checkpoint: model.0.weight must be finite")


def test_the_count_is_exact_whenever_the_host_looks():
    guard = NonFiniteGuard(torch.device("cpu"), "stop", 2)
    for index, finite in enumerate([True, False, False, True, False]):
        guard.note(torch.tensor(finite), str(index))
    lines: list[str] = []
    with pytest.raises(NonFiniteError, match=r"batches: 1; 2$"):
        guard.check(lines.append)
    assert guard.skipped == len(lines) == 3
    guard.note(torch.tensor(False), "5")
    with pytest.raises(NonFiniteError, match=r"batches: 4; 5$"):
        guard.check(lines.append)


def test_optimizers_are_left_as_they_were_after_a_skipped_step():
    trainer, _ = watched(function_run, Poison(6), optimizer="grokfast", clip_norm=0.1)
    left = {name for o in trainer.optimizers for name in vars(o)}
    assert not left & {"grad_scale", "found_inf"}


def test_nothing_infinite_is_written_even_where_the_step_was_finite(tmp_path: Path):
    class Overflow(Callback):
        def on_step(self, trainer: Trainer, step: Step) -> None:
            if trainer.step == 3:
                trainer.model[0].weight.data[0, 0] = float("inf")

    with pytest.raises(ValueError, match=r"model.0.weight must be finite"):
        function_run(tmp_path, (Overflow(),)).fit()
    assert Checkpoints(tmp_path).list() == []
