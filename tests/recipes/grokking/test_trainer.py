"""The grokking recipe: the published model and numbers, its files and the rules it ends by."""

import dataclasses
import json
import struct
import sys

import pytest
import torch

from trm_fast.data.synthetic.modular import modular_equations
from trm_fast.recipes.grokking import GrokkingConfig, build, evaluations, finish, grokking_epochs
from trm_fast.recipes.grokking.model import Decoder

# ironjr/grokfast at commit 93b2248, main.py with --filter ema --alpha 0.98 --lamb 2.0
# --weight_decay 0.005, seed 0, run on a CPU with torch 2.13: the first three epochs.
PUBLISHED = [
    {
        "iteration": 10,
        "train_accuracy": 0.010738831615120275,
        "train_loss": 4.692559355313016,
        "validation_accuracy": 0.010309278350515464,
        "validation_loss": 4.7153786220091725,
    },
    {
        "iteration": 20,
        "train_accuracy": 0.010309278350515464,
        "train_loss": 4.6898070414041735,
        "validation_accuracy": 0.015034364261168385,
        "validation_loss": 4.664738456817837,
    },
    {
        "iteration": 30,
        "train_accuracy": 0.01632302405498282,
        "train_loss": 4.621631669834307,
        "validation_accuracy": 0.011812714776632302,
        "validation_loss": 4.616108450283299,
    },
]


def small(out, **fields):
    """42 equations modulo 7, 21 to train on: one or two iterations per epoch, milliseconds each."""
    fields = {"prime": 7, "iterations": 4, "device": "cpu", "plot": False, **fields}
    return GrokkingConfig(out=str(out), **fields)


def train(config, **options):
    """Runs a config and returns its evaluations and the lines that are shown at the end."""
    trainer = build(config)
    summary = trainer.fit(**options)
    return evaluations(trainer.history), finish(trainer, summary)


def metrics_of(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return evaluations([json.loads(line) for line in lines])


def loss_of_first_epoch(out, **fields):
    return train(small(out, **fields))[0][-1].train_loss


def test_model_has_the_published_422784_parameters():
    assert sum(parameter.numel() for parameter in Decoder(99).parameters()) == 422_784


def test_seed_0_gives_the_published_initial_weights():
    torch.manual_seed(0)
    model = Decoder(99)
    # Sums of about 12,672 float32 numbers of size 1 and 0.1; the normal numbers of the embedding
    # may differ by an ulp (6e-8) between vector units, so their sum by 12,672 * 6e-8 < 1e-3.
    embedding = model.token_embedding.weight.double().sum().item()
    assert embedding == pytest.approx(-169.4973242431879, abs=1e-3)
    head = model.head.weight.double().sum().item()
    assert head == pytest.approx(-0.3856072848088843, abs=1e-3)


def test_the_answer_depends_on_every_token_before_it():
    torch.manual_seed(0)
    model = Decoder(9, width=16)
    tokens = modular_equations(7)[:4, :1]
    for position in range(4):
        changed = tokens.clone()
        changed[position] = (changed[position] + 1) % 9
        assert not torch.equal(model(tokens), model(changed))


def test_only_reading_the_last_position_changes_nothing():
    torch.manual_seed(0)
    model = Decoder(9, width=16).double()
    tokens = modular_equations(7)[:4]
    mask = torch.nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    x = model.token_embedding(tokens) + model.position_embedding.weight[:4, None]
    for layer in model.layers:
        x = layer(x, mask)
    full = model.head(model.norm(x))[-1]
    # About 100 float64 roundings of numbers below 10: 100 * 1.1e-16 * 10.
    torch.testing.assert_close(model(tokens), full, rtol=0, atol=1.1e-13)


@pytest.mark.slow
def test_the_first_epochs_are_those_of_the_published_code(tmp_path):
    train(GrokkingConfig(iterations=30, device="cpu", plot=False, out=str(tmp_path)))
    lines = [dataclasses.asdict(found) for found in metrics_of(tmp_path)]
    assert [line["iteration"] for line in lines] == [10, 20, 30]
    for line, published in zip(lines, PUBLISHED, strict=True):
        for name in ("train_loss", "validation_loss"):
            # 20 float32 roundings of 4.7; one was seen between threads and backends, and the
            # smallest change of a setting that was tried, weight decay 0.006, makes 7e-4.
            assert line[name] == pytest.approx(published[name], abs=1e-5)
        for name in ("train_accuracy", "validation_accuracy"):
            # Such a rounding may flip the answer to one of 4,656 equations.
            assert line[name] == pytest.approx(published[name], abs=1.5 / 4656)


def test_one_evaluation_per_epoch(tmp_path):
    found, _ = train(small(tmp_path, batch=8, iterations=7))
    # 21 equations make 3 batches of at most 8; the third epoch is cut at the seventh update.
    assert [evaluation.iteration for evaluation in found] == [3, 6, 7]
    assert metrics_of(tmp_path) == found
    assert all(0 < evaluation.seconds for evaluation in found)


def test_config_json_holds_every_setting(tmp_path):
    config = small(tmp_path, betas=(0.5, 0.75))
    train(config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {**dataclasses.asdict(config), "betas": [0.5, 0.75]}


def test_the_run_stops_at_the_target(tmp_path):
    found, lines = train(small(tmp_path, target=0.0))
    assert [evaluation.iteration for evaluation in found] == [1]
    assert lines[0].startswith("validation accuracy passed 0 % at iteration 1 after")


def test_the_run_goes_on_past_the_target_when_told_to(tmp_path):
    found, lines = train(small(tmp_path, target=0.0, stop_at_target=False))
    assert found[-1].iteration == 4
    assert lines[0].startswith("validation accuracy passed 0 % at iteration 1 after")


def test_a_target_that_is_not_reached_is_said(tmp_path):
    _, lines = train(small(tmp_path, target=1.0))
    assert lines[0].startswith("validation accuracy did not pass 100 % within 4 iterations")


def test_the_picture_is_a_png_of_readable_size(tmp_path):
    _, lines = train(small(tmp_path, plot=True, target=0.0, stop_at_target=False))
    data = (tmp_path / "accuracy.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 1000 and height >= 600
    assert f"picture: {tmp_path / 'accuracy.png'}" in lines


def test_without_plot_there_is_no_picture(tmp_path):
    _, lines = train(small(tmp_path))
    assert not (tmp_path / "accuracy.png").exists()
    assert not any(line.startswith("picture") for line in lines)


def test_a_missing_matplotlib_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib\.figure"):
        train(small(tmp_path / "run", plot=True))
    assert not (tmp_path / "run").exists()


def test_lines_are_short_and_as_many_as_asked_for(tmp_path, capsys):
    train(small(tmp_path, iterations=25, log_every=10))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    steps = {line.split()[1].rstrip(":").partition("/")[0] for line in lines}
    assert steps == {"10", "20"}
    assert all(len(line.encode()) <= 200 for line in lines)


def test_overwrite_replaces_the_run_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    train(small(tmp_path, plot=True))
    with pytest.raises(FileExistsError, match="out must be a directory without a run"):
        train(small(tmp_path))
    train(small(tmp_path, iterations=2), overwrite=True)
    assert [evaluation.iteration for evaluation in metrics_of(tmp_path)] == [1, 2]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "accuracy.png").exists()


def test_a_run_is_repeatable_and_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, _ = train(small(tmp_path / "a"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, _ = train(small(tmp_path / "b"))
    assert first[-1].validation_loss == second[-1].validation_loss


@pytest.mark.parametrize("batch", [512, 8])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, batch):
    whole, _ = train(small(tmp_path / "whole", iterations=11, batch=batch))
    train(small(tmp_path / "parts", iterations=4, batch=batch))
    parts, _ = train(small(tmp_path / "parts", iterations=11, batch=batch), resume=True)
    # The first part ends with an evaluation of its own, in the middle of an epoch if there are 3.
    same = {found.iteration: dataclasses.replace(found, seconds=0) for found in parts}
    for found in whole:
        if found.iteration > 6:
            assert same[found.iteration] == dataclasses.replace(found, seconds=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"operation": "x/y"},
        {"seed": 1},
        {"optimizer": "adamw", "weight_decay": 1.0},
        {"optimizer": "muon"},
        {"filter": "ma", "window": 2},
        {"filter": "highpass"},
        {"filter": "projection"},
        {"filter": "cosine_gate"},
        {"filter": "none"},
        {"alpha": 0.5},
        {"lamb": 5.0},
        {"lr": 1e-2},
        {"betas": (0.5, 0.5)},
        {"weight_decay": 1.0},
        {"warmup": 0},
        {"batch": 5},
    ],
    ids=lambda fields: "-".join(map(str, next(iter(fields.items())))),
)
def test_every_setting_of_the_training_changes_it(tmp_path, fields):
    plain = loss_of_first_epoch(tmp_path / "plain", iterations=6)
    assert loss_of_first_epoch(tmp_path / "changed", iterations=6, **fields) != plain


def test_without_a_filter_lamb_does_nothing(tmp_path):
    first = loss_of_first_epoch(tmp_path / "a", filter="none", lamb=2.0)
    assert loss_of_first_epoch(tmp_path / "b", filter="none", lamb=50.0) == first


@pytest.mark.parametrize(
    ("fixed", "changed"),
    [
        ({"filter": "ma", "window": 2}, {"window": 3}),
        ({"optimizer": "muon"}, {"muon_lr": 1e-2}),
        ({"optimizer": "muon"}, {"lr": 1e-2}),
        ({"optimizer": "muon"}, {"weight_decay": 1.0}),
        ({"optimizer": "muon"}, {"filter": "none"}),
    ],
)
def test_a_setting_of_one_filter_or_optimizer_changes_it(tmp_path, fixed, changed):
    plain = loss_of_first_epoch(tmp_path / "plain", iterations=6, **fixed)
    fields = {"iterations": 6, **fixed, **changed}
    assert loss_of_first_epoch(tmp_path / "changed", **fields) != plain


@pytest.mark.parametrize("fields", [{"window": 2}, {"muon_lr": 1e-2}])
def test_and_changes_nothing_without_it(tmp_path, fields):
    plain = loss_of_first_epoch(tmp_path / "plain", iterations=6)
    assert loss_of_first_epoch(tmp_path / "changed", iterations=6, **fields) == plain


def test_a_moving_average_that_is_not_full_filters_nothing(tmp_path):
    plain = loss_of_first_epoch(tmp_path / "plain", iterations=6, filter="none")
    assert loss_of_first_epoch(tmp_path / "ma", iterations=6, filter="ma") == plain


def test_epochs_are_those_of_the_run_without_its_files_and_lines(tmp_path, capsys):
    config = small(tmp_path / "run", iterations=5)
    found = list(grokking_epochs(config))
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""
    train(config)
    for evaluation, written in zip(found, metrics_of(tmp_path / "run"), strict=True):
        assert dataclasses.replace(evaluation, seconds=written.seconds) == written


def test_the_first_update_of_the_warmup_has_lr_0(tmp_path):
    (first, second), _ = train(small(tmp_path, iterations=2))
    # One batch is one epoch here: the second one meets the same weights in another order. Its mean
    # over 21 losses near 2.3 differs by at most 21 roundings of 6e-8 * 2.3.
    assert second.train_loss == pytest.approx(first.train_loss, abs=3e-6)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="the loss and gradients must be finite"):
        train(small(tmp_path, iterations=20, lr=1e20, warmup=0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": 0}, "iterations must be >= 1; got 0"),
        ({"batch": 0}, "batch must be >= 1; got 0"),
        ({"seed": -1}, "seed must be >= 0; got -1"),
        ({"warmup": -1}, "warmup must be >= 0; got -1"),
        ({"log_every": 0}, "log_every must be >= 1; got 0"),
        ({"target": 95}, r"target must be in \[0, 1\]; got 95"),
        ({"window": 0}, "window must be >= 1; got 0"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, adamw, muon; got 'sgd'"),
        ({"filter": "median"}, "filter must be one of ema, .*, none; got 'median'"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GrokkingConfig(**fields)


def test_a_device_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        ValueError, match="device must be auto or one that torch can use; got 'abacus'"
    ):
        train(small(tmp_path / "run", device="abacus"))
    assert not (tmp_path / "run").exists()
