"""The classifier as a system: loss, optimizer, trainer, checkpoints, data module, settings."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trm_fast
from trm_fast.losses import PHI
from trm_fast.recipes.classify import (
    PRESETS,
    ClassifyConfig,
    GrokFastOptimizer,
    SyntheticRecursiveDataset,
    TinyRecursiveModel,
    TRMDataModule,
    TRMLoss,
    TRMTrainer,
    build,
    finish,
)
from trm_fast.train import NonFiniteError

KEYS = {
    "epoch", "model_state_dict", "optimizer_state_dict", "metrics", "best_val_acc", "best_epoch",
    "train_history", "val_history", "hyperparameters",
}  # fmt: skip


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    return TinyRecursiveModel(8, 32, 4, **options)


def small_data(count=70, batch=16):
    """A last batch of 6, and a class that a linear map can tell."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(count, 8, generator=generator)
    data = TensorDataset(features, features[:, :4].argmax(1))
    return DataLoader(data, batch, shuffle=True), DataLoader(data, batch)


def small(seed=0, model=None, **options):
    train, val = small_data()
    options = {"T": 2, "n": 2, "lr": 1e-2, "device": "cpu", **options}
    return TRMTrainer(model or small_model(seed), train, val, **options)


def states(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


class TestTRMLoss:
    def test_basic_loss(self):
        logits = torch.randn(6, 3, dtype=torch.float64)
        targets = torch.tensor([0, 1, 2, 2, 1, 0])
        expected = -logits.log_softmax(1)[range(6), targets].mean()
        # Means of six logarithms: below 30 roundings of 2^-53 of numbers below 10.
        torch.testing.assert_close(TRMLoss()(logits, targets), expected, rtol=0, atol=4e-14)
        weights = torch.tensor([1.0, 2.0, 0.5])
        per_sample = -logits.log_softmax(1)[range(6), targets] * weights[targets]
        expected = per_sample.sum() / weights[targets].sum()
        loss = TRMLoss(class_weights=[1.0, 2.0, 0.5]).double()(logits, targets)
        torch.testing.assert_close(loss, expected, rtol=0, atol=4e-14)

    def test_complexity_penalty(self):
        model = small_model().double()
        logits, targets = torch.randn(6, 4, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
        loss = TRMLoss()
        at = {T: loss(logits, targets, model, T).item() for T in (1, 3, 5)}
        levels = [6 * PHI**level for level in range(5)]
        # Sums of losses below 10, some 10 roundings of 2^-53 of which.
        rounding = 10 * 10 * 2.0**-53
        expected = 0.01 * (sum(levels[:3]) - levels[0]) / sum(levels)
        assert at[3] - at[1] == pytest.approx(expected, abs=rounding)
        # The table has three decimals, so the difference six digits.
        assert expected == pytest.approx(0.01 * (31.416 - 6) / 97.957, rel=1e-4)
        plain = loss(logits, targets).item()
        assert at[5] - plain == pytest.approx(0.01, abs=rounding)
        assert loss(logits, targets, model).item() == loss(logits, targets, T=3).item() == plain

    def test_the_expected_complexity_of_a_model_that_halts_has_a_gradient(self):
        model = small_model(halt=True)
        features, targets = torch.randn(6, 8), torch.zeros(6, dtype=torch.int64)
        logits, (_, _, probs) = model(features, 3, 2, return_state=True)
        loss = TRMLoss(complexity_weight=0.5)
        penalty = loss(logits, targets, model, 3, 2, probs) - loss(logits, targets)
        p = probs.double()
        reached = [torch.ones(6), 1 - p[:, 0], (1 - p[:, 0]) * (1 - p[:, 1])]
        cost = sum((r * 2 * PHI**level).mean() for level, r in enumerate(reached))
        largest = sum(2 * PHI**level for level in range(5))
        # A difference of float32 losses below 4.
        assert penalty.item() == pytest.approx(0.5 * (cost / largest).item(), abs=20 * 4 * 6e-8)
        penalty.backward()
        assert all(p.grad.any() for p in model.halt_head.parameters())

    def test_what_is_refused(self):
        model, logits, targets = small_model(halt=True), torch.zeros(2, 4), torch.zeros(2).long()
        with pytest.raises(ValueError, match=r"halt_probs must be \[batch, 3\] for a model with"):
            TRMLoss()(logits, targets, model, 3)
        with pytest.raises(ValueError, match=r"complexity_weight must be finite and >= 0; got -1"):
            TRMLoss(-1)
        with pytest.raises(ValueError, match="class_weights must be numbers >= 0, one for each"):
            TRMLoss(class_weights=[1.0, -1.0])


class TestGrokFastOptimizer:
    """More of it in test_classify_optimizer.py."""

    def test_initialization(self):
        model = small_model()
        optimizer = GrokFastOptimizer(model.parameters())
        found = {k: optimizer.param_groups[0][k] for k in ("lr", "weight_decay", "filter")}
        assert found == {"lr": 1e-3, "weight_decay": 0.01, "filter": "highpass"}
        assert (optimizer.alpha, optimizer.lambda_, optimizer.filter) == (0.98, 0.1, "highpass")
        assert isinstance(optimizer, torch.optim.Optimizer)

    def test_gradient_filtering(self):
        param = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = GrokFastOptimizer([param], lr=0.1, weight_decay=0.0)
        m = v = mean = torch.zeros(3, dtype=torch.float64)
        weight = torch.zeros(3, dtype=torch.float64)
        for step in range(1, 6):
            grad = torch.tensor([1.0, (-1.0) ** step, 0.5 * step], dtype=torch.float64)
            param.grad = grad.clone()
            optimizer.step()
            assert torch.equal(param.grad, grad)
            mean = grad if step == 1 else 0.98 * mean + 0.02 * grad
            g = grad + 0.1 * (grad - mean)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            weight = weight - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        # Below 40 roundings of 2^-53 a step, of numbers below 10.
        torch.testing.assert_close(param.data, weight, rtol=0, atol=5 * 40 * 10 * 2.0**-53)

    def test_state_dict(self):
        model = small_model()
        optimizer = GrokFastOptimizer(model.parameters())
        model(torch.randn(2, 8)).sum().backward()
        optimizer.step()
        state = optimizer.state_dict()
        assert state.keys() == {"optimizer", "grad_ema", "alpha", "lambda", "filter"}
        grads = [p.grad for p in model.parameters()]
        means = [state["grad_ema"][i]["grok_exp_avg"] for i in range(18)]
        assert all(map(torch.equal, means, grads))
        other = GrokFastOptimizer(model.parameters(), alpha=0.5)
        other.load_state_dict(state)
        assert other.alpha == 0.98
        loaded = [other.state_dict()["grad_ema"][i]["grok_exp_avg"] for i in range(18)]
        assert all(map(torch.equal, loaded, grads))


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


class TestIntegration:
    def test_full_pipeline(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        model = TinyRecursiveModel(input_dim=128, hidden_dim=64, output_dim=10, max_depth=5)
        data = TRMDataModule(num_train=160, num_val=40, batch_size=32)
        trainer = TRMTrainer(
            model=model, train_loader=data.train_dataloader(), val_loader=data.val_dataloader(),
            lr=1e-3, alpha=0.98, lambda_=0.1, T=3, n=6,
        )  # fmt: skip
        summary = trainer.fit(num_epochs=4, patience=10, checkpoint_dir="checkpoints")
        assert summary["train_history"][-1]["loss"] < summary["train_history"][0]["loss"]
        assert (tmp_path / "checkpoints" / "best_model.pt").is_file()

    @pytest.mark.parametrize("device", ["cpu", None, "cuda"])
    def test_device_handling(self, device):
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        trainer = small(device=device)
        best = "cuda" if torch.cuda.is_available() else "cpu"
        assert trainer.device.type == (device or best)
        trainer.fit(1)
        assert {p.device.type for p in trainer.model.parameters()} == {trainer.device.type}

    def test_a_device_that_is_not_there(self):
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
        with pytest.raises(ValueError, match="device must be auto or one that torch can use"):
            small(device="cuda")

    @pytest.mark.parametrize("T", [1, 3, 5])
    def test_different_recursion_depths(self, T):
        trainer = small(T=T, n=2)
        losses = [trainer.train_epoch()["loss"] for _ in range(8)]
        assert losses[-1] < 0.9 * losses[0]

    @pytest.mark.parametrize("halt", [False, True])
    def test_every_parameter_moves(self, halt):
        trainer = small(model=small_model(halt=halt))
        before = states(trainer)
        trainer.train_epoch()
        assert not any(map(torch.equal, before, states(trainer)))

    def test_cpp_and_reference_train_alike(self):
        if trm_fast.backends()["vector_latent_update"]["cpu"]["cpp"] not in ("usable", "chosen"):
            pytest.skip("the C++ form of vector_latent_update is not usable")
        found = {}
        for backend in ("cpp", "reference"):
            with trm_fast.use_backend(backend):
                found[backend] = small().train_epoch()
        # Five AdamW steps of 1e-2, whose direction a rounding of 6e-8 of a gradient can turn only
        # where the gradient is as small; such weights change the loss by far less than this.
        assert found["cpp"]["loss"] == pytest.approx(found["reference"]["loss"], rel=1e-3)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "seed", [7, *(pytest.param(seed, marks=pytest.mark.long) for seed in (0, 8))]
    )
    def test_the_synthetic_task_is_learned(self, seed):
        """Three seeds that get there soon; of ten seeds, five do within 25 epochs."""
        torch.manual_seed(seed)
        data = TRMDataModule(seed=seed)
        loaders = data.train_dataloader(), data.val_dataloader()
        trainer = TRMTrainer(TinyRecursiveModel(), *loaders, device="cpu")
        best = 0.0
        while trainer.epoch < 25 and best < 75.0:
            trainer.train_epoch()
            best = max(best, trainer.validate()["accuracy"])
        assert best >= 75.0


class TestTRMDataModule:
    def test_25_training_batches_and_another_set_of_the_same_task(self):
        data = TRMDataModule(num_train=800, num_val=200, batch_size=32)
        train, val = data.train_dataloader(), data.val_dataloader()
        assert (len(train), len(val)) == (25, 7)
        features, targets = next(iter(train))
        assert features.shape == (32, 128) and targets.shape == (32,)
        assert torch.equal(data.train.features, SyntheticRecursiveDataset(800).features)
        assert not torch.equal(data.train.features[:200], data.val.features)

    def test_training_batches_are_shuffled_and_validation_is_not(self):
        data = TRMDataModule(40, 40, 40)
        train, val = data.train_dataloader(), data.val_dataloader()
        orders = [next(iter(train))[0] for _ in range(2)]
        assert not torch.equal(orders[0], orders[1])
        assert torch.equal(next(iter(val))[0], data.val.features)

    def test_counts_out_of_range(self):
        with pytest.raises(ValueError, match="TRMDataModule: batch_size must be a whole number"):
            TRMDataModule(batch_size=0)


class TestRecipe:
    def test_a_run_writes_its_files_and_resumes(self, tmp_path, capsys):
        config = ClassifyConfig(
            epochs=2, hidden=32, num_train=64, num_val=32, n=2, out=str(tmp_path / "run")
        )
        trainer = build(config)
        summary = trainer.fit()
        assert summary.step == 4 and summary.best["accuracy"] >= 0
        out = tmp_path / "run"
        assert json.loads((out / "config.json").read_text())["filter"] == "highpass"
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records if r["kind"] == "evaluation"] == [2, 4]
        assert torch.load(out / "best_model.pt", weights_only=True).keys() == KEYS
        lines = finish(trainer, summary)
        assert lines[-1] == f"best model: {out / 'best_model.pt'}"
        longer = replace(config, epochs=3)
        again = build(longer)
        assert again.fit(resume=True).step == 6
        whole = build(replace(longer, out=str(tmp_path / "whole")))
        whole.fit()
        assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
        assert whole.callbacks[0].history == again.callbacks[0].history

    def test_the_line_about_the_best_model_names_the_file_of_the_trainer_class(self, tmp_path):
        class Other(TRMTrainer):
            best_file = "other.pt"

        facade = Other(small_model(), *small_data(), device="cpu")
        trainer = facade.trainer(1, checkpoint_dir=tmp_path / "kept", out=tmp_path / "run")
        lines = finish(trainer, trainer.fit())
        assert lines[-1] == f"best model: {tmp_path / 'kept' / 'other.pt'}"
        assert (tmp_path / "kept" / "other.pt").is_file()

    def test_the_defaults_are_those_of_the_system(self):
        config = PRESETS["classify"]["default"]
        expected = {
            "epochs": 50, "patience": 10, "lr": 1e-3, "alpha": 0.98, "lam": 0.1, "T": 3, "n": 6,
            "filter": "highpass", "weight_decay": 0.01, "complexity_weight": 0.01, "hidden": 256,
            "max_depth": 5, "num_train": 800, "num_val": 200, "batch_size": 32,
        }  # fmt: skip
        assert expected.items() <= vars(config).items()

    @pytest.mark.parametrize(
        ("field", "value"), [("epochs", 0), ("patience", 0), ("seed", -1), ("filter", "fast")]
    )
    def test_settings_out_of_range(self, field, value):
        with pytest.raises(ValueError, match=f"classify: {field} must be"):
            ClassifyConfig(**{field: value})
