"""A trainer class of a system of its own, in a few lines on ``EpochTrainer``."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from trm_fast.recipes.facade import EpochTrainer
from trm_fast.recipes.pt_file import write_pt
from trm_fast.train import (
    Callback,
    Curriculum,
    EpochBatches,
    Objective,
    Stage,
    StepResult,
    TrainerConfig,
)
from trm_fast.train.checkpoints.snapshot import VERSION


class Squares(Objective):
    def losses(self, model, batch):
        yield self.result(model, batch)

    def result(self, model, batch):
        errors = (model(batch) - 3.0 * batch).square()
        near = (errors < 1.0).sum()
        metrics = {"squares": (errors.detach().sum(), len(batch)), "near": (near, len(batch))}
        return StepResult(errors.mean(), metrics)


class LineTrainer(EpochTrainer):
    name = "line"
    monitor = "near"
    best_key = "best_near"
    only_validated = ("near",)

    def __init__(self, lr=0.05):
        torch.manual_seed(0)
        super().__init__(torch.nn.Linear(1, 1), list(torch.arange(6.0).view(3, 2, 1)), device="cpu")
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        self.scale = 1.0

    def objective(self):
        return Squares()

    def validation(self):
        for batch in torch.arange(0.5, 4.5).view(2, 2, 1):
            yield Squares().result(self.model, batch).metrics

    def scores(self, means):
        return {"loss": means["squares"], "near": means["near"]}

    def text(self, scores):
        return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())

    @property
    def hyperparameters(self):
        return {"scale": self.scale}

    def load_hyperparameters(self, values):
        self.scale = values["scale"]


def weights(trainer):
    return torch.cat([param.detach().flatten() for param in trainer.model.parameters()])


def test_it_trains_validates_and_reports(capsys):
    trainer = LineTrainer()
    summary = trainer.fit(40, patience=40)
    assert summary.keys() == {
        "best_near", "best_epoch", "train_history", "val_history", "total_epochs",
    }  # fmt: skip
    assert summary["total_epochs"] == trainer.epoch == 40
    losses = [scores["loss"] for scores in summary["val_history"]]
    assert losses[-1] < losses[0] and trainer.validate()["loss"] == losses[-1]
    assert summary["train_history"][0].keys() == {"loss"}
    assert f"best validation near {summary['best_near']:.4g}" in capsys.readouterr().out


def test_a_loaded_checkpoint_goes_on_to_the_same_bits(tmp_path):
    whole, half, again = LineTrainer(), LineTrainer(), LineTrainer(lr=1.0)
    for _ in range(4):
        whole.train_epoch()
    for _ in range(2):
        half.train_epoch()
    half.save_checkpoint(tmp_path / "half.pt", half.epoch - 1, {"near": 0.5})
    found = again.load_checkpoint(tmp_path / "half.pt")
    assert found["metrics"] == {"near": 0.5} and again.epoch == 2
    for _ in range(2):
        again.train_epoch()
    assert torch.equal(weights(again), weights(whole))


def test_what_does_not_fit_changes_nothing(tmp_path):
    trainer, other = LineTrainer(), LineTrainer()
    other.scale = 2.0
    other.optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    other.save_checkpoint(tmp_path / "other.pt", 0, {})
    before = weights(trainer).clone()
    with pytest.raises(ValueError, match="parameter group"):
        trainer.load_checkpoint(tmp_path / "other.pt")
    assert trainer.scale == 1.0 and trainer.epoch == 0 and torch.equal(weights(trainer), before)


def test_the_number_of_epochs_is_checked_in_the_name_of_the_class():
    with pytest.raises(ValueError, match="LineTrainer: num_epochs must be a whole number >= 1"):
        LineTrainer().fit(0)


class Counter(Callback):
    """Counts steps; its number is part of what it adds to the gradients."""

    name = "counter"

    def __init__(self):
        self.count = 0

    def on_gradients(self, run, step):
        self.count += 1
        for param in run.model.parameters():
            param.grad.add_(1e-3 * self.count)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class FullTrainer(LineTrainer):
    """Everything that a subclass may override."""

    monitor = "loss"
    best_key = "least_loss"
    mode = "min"

    def __init__(self, lr=0.05, **settings):
        super().__init__(lr)
        self.settings = settings
        self.made = []

    def config(self):
        return TrainerConfig(clip_norm=self.grad_clip, **self.settings)

    def schedules(self, optimizers):
        return [LambdaLR(optimizers[0], lambda step: 1.0 / (1 + step))]

    def callbacks(self):
        self.made.append(Counter())
        return self.made[-1:]


SETTINGS = [{}, {"ema": 0.5}, {"accumulate": 2}, {"precision": "fp16"}, {"precision": "bf16"}]


def state(trainer):
    """Weights, averages, learning rate, scale and the state of the last callback."""
    now = trainer._trainer_now
    return (
        weights(trainer).tolist(),
        None if now.ema is None else [v.tolist() for v in now.ema.average.values()],
        trainer.optimizer.param_groups[0]["lr"],
        None if now.scaler is None else now.scaler.state_dict(),
        trainer.made[-1].count,
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_a_subclass_asks_for_goes_on_from_call_to_call_and_through_a_file(settings, tmp_path):
    whole, parts, again = (FullTrainer(lr, **settings) for lr in (0.05, 0.05, 1.0))
    whole.fit(4, patience=9)
    parts.train_epoch()
    parts.fit(2, patience=9)
    parts.save_checkpoint(tmp_path / "half.pt", 1, {})
    parts.fit(4, patience=9)
    again.load_checkpoint(tmp_path / "half.pt")
    again.fit(3, patience=9)
    again.train_epoch()
    updates = 4 * (2 if settings.get("accumulate") == 2 else 3)
    assert whole.made[-1].count == updates
    # As the schedule says after so many updates.
    assert whole.optimizer.param_groups[0]["lr"] == 0.05 / (1 + updates)
    assert state(parts) == state(whole)
    assert state(again) == state(whole)


def test_an_epoch_of_accumulated_batches_ends_with_its_last_update():
    trainer = FullTrainer(accumulate=2)
    summary = trainer.fit(3, patience=9)
    assert trainer.steps_per_epoch == 2 and trainer._trainer_now.step == 6
    assert summary["total_epochs"] == len(summary["val_history"]) == 3


def test_the_best_of_a_falling_score_is_the_least(tmp_path, capsys):
    trainer = FullTrainer()
    summary = trainer.fit(6, patience=9, checkpoint_dir=tmp_path)
    losses = [scores["loss"] for scores in summary["val_history"]]
    assert losses[-1] < losses[0] and summary["least_loss"] == min(losses)
    assert summary["best_epoch"] == losses.index(min(losses)) > 0
    assert f"best validation loss {min(losses):.4g}" in capsys.readouterr().out
    found = torch.load(tmp_path / "best_model.pt", weights_only=True)
    assert found["epoch"] == summary["best_epoch"]


def test_a_falling_score_that_rises_stops_early():
    trainer = FullTrainer(lr=0.0)
    trainer.callbacks = lambda: []
    # Nothing moves, so the first epoch is the best.
    assert trainer.fit(50, patience=3)["total_epochs"] == 4


def test_the_averaged_weights_are_validated():
    trainer = FullTrainer(ema=0.9)
    summary = trainer.fit(2, patience=9)
    assert trainer.validate() == summary["val_history"][-1]
    with trainer._trainer_now.ema.swapped():
        averaged = trainer._validated()
    assert averaged == summary["val_history"][-1] != trainer._validated()


class StagedTrainer(LineTrainer):
    """Two stages, of which the first one ends within an epoch."""

    def __init__(self, tmp_path=None):
        torch.manual_seed(0)
        EpochTrainer.__init__(self, torch.nn.Linear(1, 1), None, per_epoch=4, device="cpu")
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.scale = 1.0

    def curriculum(self):
        near, far = torch.arange(4.0).view(2, 2, 1), torch.arange(6.0).view(3, 2, 1) + 9.0
        second = {"betas": (0.5, 0.9)}
        stages = [Stage("near", EpochBatches(near), steps=6)]
        return Curriculum([*stages, Stage("far", EpochBatches(far), settings=second)])


def test_stages_go_on_from_call_to_call(tmp_path):
    whole, parts = StagedTrainer(), StagedTrainer()
    summary = whole.fit(4, patience=9)
    assert len(summary["val_history"]) == summary["total_epochs"] == whole.epoch == 4
    curriculum = whole._trainer_now.curriculum
    assert (curriculum.index, curriculum.step) == (1, 10)
    parts.train_epoch()
    parts.fit(2, patience=9)
    parts.save_checkpoint(tmp_path / "half.pt", 1, {})
    parts = StagedTrainer()
    parts.load_checkpoint(tmp_path / "half.pt")
    assert parts.epoch == 2 and parts._trainer_now.curriculum.index == 1
    parts.fit(4, patience=9)
    assert parts.optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    # Nothing random is in it, so that it is the same run.
    assert torch.equal(weights(parts), weights(whole))


def test_batches_or_stages_but_not_both():
    class Neither(LineTrainer):
        def curriculum(self):
            return StagedTrainer.curriculum(self)

    with pytest.raises(ValueError, match="Neither: curriculum must return stages if batches is"):
        Neither().fit(1)
    with pytest.raises(ValueError, match="either batches, or per_epoch and a curriculum"):
        EpochTrainer.__init__(LineTrainer(), torch.nn.Linear(1, 1), None)
    with pytest.raises(ValueError, match="batches of an epoch must be at least one; got 0"):
        EpochTrainer.__init__(LineTrainer(), torch.nn.Linear(1, 1), [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": "first"}, "got epoch of type str"),
        ({"epoch": -1}, "a seed and an epoch >= 0; got 0 and -1"),
        ({"model_state_dict": 3}, "got model_state_dict of type int"),
        ({"model_state_dict": {"weight": 3, "bias": 4}}, r"with bias \(1,\); got int"),
        ({"optimizer_state_dict": {"state": {}}}, r"cannot be loaded \(KeyError: 'param_groups'\)"),
        ({"metrics": None}, "got metrics of type NoneType"),
        ({"hyperparameters": {}}, "a seed and an epoch >= 0; got None and 1"),
        ({"hyperparameters": {"seed": 0}}, r"cannot be loaded \(KeyError: 'scale'\)"),
        ({"best_near": "x"}, "got best_near of type str"),
        ({"best_near": True}, "got best_near of type bool"),
        ({"best_epoch": 1.5}, "got best_epoch of type float"),
        ({"train_history": {}}, "got train_history of type dict"),
        (
            {"further_state": {"trainer": {"version": VERSION}}},
            r"cannot be loaded \(Trainer: trainer.step of the checkpoint must be of type int",
        ),
    ],
)
def test_a_file_with_something_else_in_it_loads_nothing(change, message, tmp_path):
    path, trainer = tmp_path / "model.pt", LineTrainer()
    trainer.train_epoch()
    trainer.train_epoch()
    trainer.save_checkpoint(path, 1, {})
    values = torch.load(path, weights_only=True) | change
    write_pt("test", path, values)
    other, untouched = LineTrainer(lr=0.1), LineTrainer(lr=0.1)
    for each in (other, untouched):
        each.scale = 5.0
        each.train_epoch()
    with pytest.raises(ValueError, match=f"LineTrainer: .*{message}"):
        other.load_checkpoint(path)
    assert (other.scale, other.epoch) == (5.0, 1) and other.history == untouched.history
    for each in (other, untouched):
        each.train_epoch()
    assert torch.equal(weights(other), weights(untouched)) and math.isfinite(weights(other).sum())
