"""The trainer of the classifier: epochs, checkpoints, refused input."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from trm_fast.losses import PHI
from trm_fast.recipes.classify import (
    TinyRecursiveModel,
    TRMTrainer,
)
from trm_fast.train import NonFiniteError

from .small import KEYS, small, small_data, small_model, states


class TestTRMTrainer:
    def test_trainer_initialization(self):
        trainer = TRMTrainer(small_model(), *small_data())
        found = trainer.hyperparameters
        assert found == {
            "T": 3, "n": 6, "lr": 1e-3, "alpha": 0.98, "lambda": 0.1, "weight_decay": 0.01,
            "filter": "highpass", "complexity_weight": 0.01,
        }  # fmt: skip
        assert trainer.epoch == 0
        with pytest.raises(TypeError):
            TRMTrainer(small_model(), *small_data(), 1e-3)

    def test_train_epoch(self):
        trainer = small(lr=0.0)
        metrics = trainer.train_epoch()
        assert metrics.keys() == {"loss", "accuracy"} and trainer.epoch == 1
        # Nothing moves at lr 0, so that an epoch is one look at all samples. The order of the
        # batches only changes roundings: 70 of 6e-8 of losses below 10.
        expected = trainer.validate()
        assert metrics["loss"] == pytest.approx(expected["loss"], abs=70 * 6e-7)
        assert metrics["accuracy"] == expected["accuracy"]

    def test_train_epoch_learns(self):
        trainer = small()
        before, losses = states(trainer), [trainer.train_epoch()["loss"] for _ in range(8)]
        assert not any(map(torch.equal, before, states(trainer)))
        assert losses[-1] < 0.7 * losses[0]

    def test_validate(self):
        trainer = small(class_weights=[1.0, 3.0, 0.5, 2.0])
        before, generator = states(trainer), torch.get_rng_state()
        found = trainer.validate()
        features, targets = trainer.val_loader.dataset.tensors
        logits = trainer.model(features, 2, 2).double()
        weights = torch.tensor([1.0, 3.0, 0.5, 2.0]).double()[targets]
        ce = -logits.log_softmax(1)[range(70), targets]
        share = (2 + 2 * PHI) / sum(2 * PHI**level for level in range(5))
        expected = (weights * ce).sum() / weights.sum() + 0.01 * share
        rank = (logits > logits[range(70), targets][:, None]).sum(1)
        # Roundings of float32 losses below 10.
        assert found["loss"] == pytest.approx(expected.item(), abs=70 * 6e-7)
        # Counts times 100 over 70, in float64.
        shares = {"accuracy": (rank < 1).sum(), "top3_accuracy": (rank < 3).sum()}
        for name, count in shares.items():
            assert found[name] == pytest.approx(100 * count.item() / 70, abs=1e-10)
        assert found.keys() == {"loss", "accuracy", "top3_accuracy"}
        assert all(map(torch.equal, before, states(trainer))) and trainer.model.training
        assert torch.equal(torch.get_rng_state(), generator)

    def test_fit_basic(self, tmp_path, capsys):
        summary = small().fit(num_epochs=3, checkpoint_dir=tmp_path)
        assert summary.keys() == {
            "best_val_acc", "best_epoch", "train_history", "val_history", "total_epochs",
        }  # fmt: skip
        assert summary["total_epochs"] == len(summary["train_history"]) == 3
        accuracies = [scores["accuracy"] for scores in summary["val_history"]]
        assert summary["best_val_acc"] == max(accuracies)
        assert summary["best_epoch"] == accuracies.index(max(accuracies))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4
        for epoch, (line, train, val) in enumerate(
            zip(lines, summary["train_history"], summary["val_history"], strict=False)
        ):
            assert line.startswith(
                f"epoch {epoch + 1}/3  train loss {train['loss']:.3f}, accuracy "
                f"{train['accuracy']:.1f} %  validation loss {val['loss']:.3f}, accuracy "
                f"{val['accuracy']:.1f} %, top-3 {val['top3_accuracy']:.1f} %  "
            )
        assert lines[0].endswith("(best)")
        assert lines[3] == (
            f"best validation accuracy {summary['best_val_acc']:.2f} % at epoch "
            f"{summary['best_epoch'] + 1}"
        )
        assert [path.name for path in tmp_path.iterdir()] == ["best_model.pt"]

    def test_early_stopping(self, capsys, tmp_path):
        # Nothing moves at lr 0, so the first epoch is the best.
        summary = small(lr=0.0).fit(num_epochs=50, patience=3, checkpoint_dir=tmp_path)
        assert summary["total_epochs"] == 4 and summary["best_epoch"] == 0
        assert "stopped early: accuracy has not become better" in capsys.readouterr().out
        assert torch.load(tmp_path / "best_model.pt", weights_only=True)["epoch"] == 0

    def test_only_a_better_epoch_is_saved(self, tmp_path):
        trainer = small()
        summary = trainer.fit(num_epochs=6, checkpoint_dir=tmp_path)
        found = torch.load(tmp_path / "best_model.pt", weights_only=True)
        assert found["epoch"] == found["best_epoch"] == summary["best_epoch"]
        assert found["metrics"] == summary["val_history"][summary["best_epoch"]]
        again = small(seed=5)
        again.load_checkpoint(tmp_path / "best_model.pt")
        assert again.validate() == found["metrics"]

    def test_checkpoint_save_load(self, tmp_path):
        trainer = small(filter="ema", lambda_=2.0, alpha=0.9)
        trainer.fit(num_epochs=2)
        trainer.save_checkpoint(tmp_path / "new" / "model.pt", 1, {"accuracy": 12.5})
        found = torch.load(tmp_path / "new" / "model.pt", weights_only=True)
        assert found.keys() == KEYS
        assert found["metrics"] == {"accuracy": 12.5} and len(found["train_history"]) == 2
        assert found["hyperparameters"] == {**trainer.hyperparameters, "seed": trainer.seed}
        assert {*found["hyperparameters"]} >= {
            "T", "n", "lr", "alpha", "lambda", "weight_decay", "filter", "complexity_weight",
        }  # fmt: skip
        other = small(seed=9, T=1, n=1, complexity_weight=0.5, lr=1.0)
        other.load_checkpoint(tmp_path / "new" / "model.pt")
        assert other.epoch == 2 and other.hyperparameters == trainer.hyperparameters
        assert all(map(torch.equal, states(other), states(trainer)))

    @pytest.mark.parametrize("filter", ["highpass", "ma", "projection"])
    def test_a_run_that_is_loaded_is_the_uninterrupted_one_to_the_bit(self, filter, tmp_path):
        options = {"filter": filter, "model": small_model(dropout=0.2)}
        whole = small(**options)
        wanted = whole.fit(num_epochs=5)
        first = small(**options | {"model": small_model(dropout=0.2)})
        first.fit(num_epochs=2)
        first.save_checkpoint(tmp_path / "model.pt", 1, {})
        torch.rand(7)
        second = small(model=small_model(seed=77, dropout=0.2), filter="ema")
        second.load_checkpoint(tmp_path / "model.pt")
        assert second.fit(num_epochs=5) == wanted
        assert all(map(torch.equal, states(second), states(whole)))

    def test_fit_goes_on_where_train_epoch_ended(self):
        whole, parts = small(), small()
        whole.fit(num_epochs=3)
        parts.train_epoch()
        parts.train_epoch()
        parts.fit(num_epochs=3)
        assert all(map(torch.equal, states(whole), states(parts)))

    def test_a_run_goes_on_to_the_bit_from_the_middle_of_an_epoch(self, tmp_path):
        def run(out, steps, resume=False):
            trainer = small(model=small_model(dropout=0.2)).trainer(4, out=tmp_path / out)
            trainer.config = replace(trainer.config, steps=steps)
            trainer.fit(resume)
            return [p.detach().clone() for p in trainer.model.parameters()]

        wanted = run("whole", 20)
        run("parts", 7)  # 5 batches make an epoch
        assert all(map(torch.equal, run("parts", 20, resume=True), wanted))

    def test_fit_adds_nothing_to_what_is_done(self):
        trainer = small()
        assert trainer.fit(num_epochs=2) == trainer.fit(num_epochs=2) == trainer.fit(num_epochs=1)

    def test_entries_behind_the_first_two_are_ignored(self):
        train, _ = small_data()
        more = TensorDataset(*train.dataset.tensors, torch.arange(70))
        loaders = DataLoader(more, 16, shuffle=True), DataLoader(more, 16)
        options = {"T": 2, "n": 2, "lr": 1e-2, "device": "cpu"}
        first = TRMTrainer(small_model(), *loaders, **options)
        assert first.fit(2) == small().fit(2)

    def test_the_norm_of_the_gradients_can_be_clipped(self):
        free, clipped = small(lr=1e-3), small(lr=1e-3, grad_clip=1e-12)
        before = states(free)
        free.train_epoch()
        clipped.train_epoch()
        # AdamW divides by its root plus 1e-8, so that tiny gradients make tiny steps.
        moved = [
            max((p - b).abs().max().item() for p, b in zip(states(t), before, strict=True))
            for t in (free, clipped)
        ]
        assert moved[1] < 0.2 * moved[0]

    def test_steps_that_are_not_finite_change_nothing_and_end_the_run(self):
        trainer = small()
        trainer.model.head.bias.data[0] = float("nan")
        before = states(trainer)
        with pytest.raises(NonFiniteError, match="3 steps in a row"):
            trainer.train_epoch()
        assert all(
            torch.equal(b.nan_to_num(7), s.nan_to_num(7))
            for b, s in zip(before, states(trainer), strict=True)
        )


class TestBadInput:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_feature_that_is_not_finite_names_its_sample(self, value):
        train, val = small_data()
        train.dataset.tensors[0][41, 3] = value
        trainer = TRMTrainer(small_model(), train, val, device="cpu")
        message = f"TRMTrainer: features must be finite; got {value} in sample 41 of the data set"
        for call in (trainer.train_epoch, trainer.validate):
            with pytest.raises(ValueError) as error:
                call()
            assert str(error.value) == message

    def test_without_a_data_set_it_names_batch_and_row(self):
        features = torch.zeros(3, 8)
        features[2, 0] = float("nan")
        batches = [(torch.zeros(3, 8), torch.zeros(3).long()), (features, torch.zeros(3).long())]
        trainer = TRMTrainer(small_model(), batches, batches, device="cpu")
        with pytest.raises(ValueError, match="got nan in sample 2 of batch 1"):
            trainer.validate()

    @pytest.mark.parametrize("value", [-1, 4])
    def test_a_target_that_is_no_class(self, value):
        batches = [(torch.zeros(3, 8), torch.tensor([0, value, 0]))]
        trainer = TRMTrainer(small_model(), batches, batches, device="cpu")
        with pytest.raises(ValueError) as error:
            trainer.train_epoch()
        message = f"targets must be from 0 to 3; got {value} in sample 1 of batch 0"
        assert str(error.value) == f"TRMTrainer: {message}"

    @pytest.mark.parametrize(
        "batch",
        [
            {"features": torch.zeros(2, 8)},
            (torch.zeros(2, 8),),
            (torch.zeros(2, 8), [0, 1]),
            (torch.zeros(2, 8).long(), torch.zeros(2).long()),
            (torch.zeros(2, 8), torch.zeros(2)),
            (torch.zeros(2, 8), torch.zeros(2, 4).long()),
        ],
    )
    def test_other_batches(self, batch):
        trainer = TRMTrainer(small_model(), [batch], [batch], device="cpu")
        with pytest.raises(TypeError, match=r"^TRMTrainer: (a batch|features) must"):
            trainer.validate()

    def test_loaders(self):
        good = [(torch.zeros(2, 8), torch.zeros(2).long())]
        with pytest.raises(TypeError, match="train_loader must have a length"):
            TRMTrainer(small_model(), iter(good), good)
        with pytest.raises(ValueError, match="train_loader must give at least one batch"):
            TRMTrainer(small_model(), [], good)
        with pytest.raises(ValueError, match="val_loader must give at least one batch"):
            TRMTrainer(small_model(), good, []).validate()

    def test_settings(self):
        with pytest.raises(ValueError, match="T must be a whole number from 1 to max_depth=5"):
            small(T=6)
        with pytest.raises(ValueError, match="class_weights must be 4 numbers, one for each class"):
            small(class_weights=[1.0, 2.0])
        with pytest.raises(ValueError, match="num_epochs must be a whole number >= 1; got 0"):
            small().fit(0)
        with pytest.raises(ValueError, match="patience must be"):
            small().fit(1, patience=0)

    def test_files_that_are_no_checkpoint(self, tmp_path):
        trainer, path = small(), tmp_path / "model.pt"
        before = states(trainer)
        with pytest.raises(OSError, match=r"model\.pt"):
            trainer.load_checkpoint(path)
        path.write_bytes(b"something else")
        with pytest.raises(ValueError, match=r"must be a file of save_checkpoint; got something"):
            trainer.load_checkpoint(path)
        # An object whose reading would call a function.
        torch.save({"epoch": 0, "model_state_dict": sys.exit}, path)
        with pytest.raises(ValueError, match=r"of save_checkpoint; got a 'sys.exit'"):
            trainer.load_checkpoint(path)
        torch.save({"epoch": 0}, path)
        with pytest.raises(ValueError, match=r"got one without best_epoch, best_val_acc"):
            trainer.load_checkpoint(path)
        wide = TRMTrainer(TinyRecursiveModel(8, 64, 4), *small_data(), device="cpu")
        wide.save_checkpoint(path, 0, {})
        with pytest.raises(ValueError, match=r"must be of the same model, with embed.bias \(32,\)"):
            trainer.load_checkpoint(path)
        assert all(map(torch.equal, before, states(trainer))) and trainer.epoch == 0
