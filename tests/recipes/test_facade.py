"""A trainer class of a system of its own, in a few lines on ``EpochTrainer``."""

import pytest
import torch

from trm_fast.recipes.facade import EpochTrainer
from trm_fast.train import Objective, StepResult


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
        return {"scale": self.scale, "seed": self.seed}

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
