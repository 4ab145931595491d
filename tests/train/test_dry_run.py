"""A dry run takes one step, tells what it found, and leaves nothing behind."""

import pytest
import torch

from trm_fast.cli import main
from trm_fast.train.dry_run import dry_run

from .runs import function_run, puzzle_run


@pytest.mark.parametrize(
    ("optimizer", "ema", "states"),
    [
        # Bytes per parameter, in float32.
        ("adamw", None, 2 * 4),  # two moments
        ("adamw", 0.9, 3 * 4),  # and the average
        ("grokfast", None, 4 * 4),  # two moments, the filter's mean and the average
        ("sgd", None, 1 * 4),
    ],
)
def test_sizes_are_those_of_the_tensors(optimizer, ema, states, tmp_path):
    found = dry_run(function_run(tmp_path / "run", optimizer=optimizer, ema=ema))
    count = (6 * 8 + 8) + (8 * 8 + 8) + (8 * 3 + 3)
    assert found.parameters == count
    assert found.weights == found.gradients == 4 * count
    # Besides, a counter for each of six parameters, of four or eight bytes.
    assert 0 <= found.optimizers - states * count <= 6 * 8
    assert found.checkpoint > found.weights + found.optimizers
    assert found.peak > found.checkpoint and found.seconds > 0
    assert 0.5 < found.loss < 2
    assert list(tmp_path.iterdir()) == []


def test_the_loss_is_that_of_the_first_step():
    trainer = puzzle_run(None, steps=1, log_every=1, evaluate_every=0)
    trainer.fit()
    assert dry_run(puzzle_run(None)).loss == trainer.history[0]["loss"]


def test_generators_are_given_back():
    before = torch.get_rng_state()
    dry_run(function_run(None))
    assert torch.equal(before, torch.get_rng_state())


def test_without_batches_there_is_one_line():
    with pytest.raises(ValueError, match="batches must give at least one"):
        dry_run(function_run(None, batches=[]))


def test_the_command_shows_settings_and_sizes_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    words = "--data.size 4 --data.clues [6,8] --data.train 9 --data.test 3 --batch 3 --device cpu"
    assert main(["train", "sudoku", *words.split(), "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "data.clues" in said and "one step     loss" in said and "checkpoint" in said
    assert not out.exists()
