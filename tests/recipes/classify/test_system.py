"""The classifier as a system: loss, optimizer, a whole training, data module, settings."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

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

from .small import KEYS, small, small_data, small_model, states


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
