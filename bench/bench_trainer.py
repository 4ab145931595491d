"""The trainer around a step: what it costs beside a bare loop, a checkpoint, and a resume.

The bare loop and the trainer take the same steps from the same start and must have the same weights
to the last bit before anything is timed. The trainer meters, guards, names its batches and logs.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trm_fast import GrokFastAdamW
from trm_fast.nn import TinyRecursiveModel, TRMConfig
from trm_fast.train import PerStepSupervision, Trainer, TrainerConfig
from trm_fast.train.checkpoints.snapshot import snapshot

from ._report import Row, Run, Table
from ._timing import Job, interleave

# Updates per turn, after which the trainer logs: ten times as often as it does by default.
BLOCK = 5
CHECKED = 2 * BLOCK
BARE, OURS = "a bare loop", "Trainer"
SAVE, TORCH_SAVE, RESUME = "Trainer.save", "torch.save, not synced", "fit(resume=True)"
# Width, sequences and H_cycles: about 8 and 50 ms per update on one core of 2025.
SIZES = {"small": (16, 2, 1), "tiny": (64, 32, 2)}


def _model(width: int, cycles: int) -> TinyRecursiveModel:
    config = TRMConfig(
        8, 36, puzzle_emb_ndim=0, puzzle_emb_len=0, H_cycles=cycles, L_cycles=3, hidden_size=width,
        num_heads=4, expansion=3.0, mlp_t=True, pos_encodings="none", halt_max_steps=8,
        halt_exploration_prob=0.0, forward_dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    return TinyRecursiveModel(config)


def _optimizer(model: TinyRecursiveModel) -> GrokFastAdamW:
    return GrokFastAdamW(model.parameters(), lr=1e-3, filter="ema", weight_ema=0.999)


def _batches(size: int) -> list[dict[str, Tensor]]:
    tokens = torch.randint(2, 8, (8, 2, size, 36), generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(size, dtype=torch.int64)
    return [{"inputs": a, "labels": b, "puzzle_identifiers": ids} for a, b in tokens]


class _Bare:
    """The loop without a trainer."""

    def __init__(self, width: int, size: int, cycles: int) -> None:
        self.model = _model(width, cycles)
        self.optimizer = _optimizer(self.model)
        self.batches = itertools.cycle(_batches(size))
        self.carry: Any = None

    def __call__(self) -> None:
        for _ in range(BLOCK):
            batch = next(self.batches)
            carry = self.carry or self.model.initial_carry(batch)
            self.carry, outputs = self.model(carry, batch)
            self.model.loss(self.carry, outputs).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


class _Ours:
    """The same with a trainer."""

    def __init__(self, width: int, size: int, cycles: int) -> None:
        self.model = _model(width, cycles)
        self.trainer = Trainer(
            self.model,
            _optimizer,
            _batches(size),
            PerStepSupervision(self.model),
            TrainerConfig(steps=10**9, log_every=BLOCK),
            device="cpu",
        )
        self.steps = self.trainer.updates()

    def __call__(self) -> None:
        for _ in range(BLOCK):
            next(self.steps)


@pytest.mark.parametrize("name", SIZES)
def test_overhead_cpu(name: str, run: Run) -> None:
    bare, ours = _Bare(*SIZES[name]), _Ours(*SIZES[name])
    for _ in range(CHECKED // BLOCK):
        bare()
        ours()
    for one, other in zip(bare.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(one, other), "the trainer must take the steps of the bare loop"
    jobs = [Job(BARE, bare), Job(OURS, ours)]
    interleave(jobs, run.rounds, "cpu")
    rows = [Row(job.name, [s / BLOCK for s in job.seconds], None) for job in jobs]
    count = sum(param.numel() for param in bare.model.parameters())
    title = f"Trainer on cpu: an update of a TRM of {count:,} parameters"
    table = Table(title, rows, BARE, "")
    theirs, mine = (table.row(row).median for row in (BARE, OURS))
    table.notes = [
        f"the trainer adds {(mine - theirs) * 1e6:.0f} us to {theirs * 1e3:.1f} ms: "
        f"{mine / theirs - 1:.1%}"
    ]
    run.tables.append(table)


def test_checkpoint_cpu(run: Run, tmp_path: Path) -> None:
    model = TinyRecursiveModel("sudoku_mlp", num_puzzle_identifiers=1)
    ids = torch.zeros(1, dtype=torch.int64)
    tokens = torch.ones(1, 81, dtype=torch.int64)
    batch = {"inputs": tokens, "labels": tokens, "puzzle_identifiers": ids}
    trainer = Trainer(
        model, _optimizer, [batch], PerStepSupervision(model), TrainerConfig(steps=0),
        out=tmp_path / "run", device="cpu",
    )  # fmt: skip
    trainer.fit()
    size = sum(path.stat().st_size for path in trainer.save().iterdir())

    def forget() -> None:
        trainer._saved = None

    jobs = [
        Job(SAVE, trainer.save, forget),
        Job(TORCH_SAVE, lambda: torch.save(snapshot(trainer), tmp_path / "state.pt")),
        Job(RESUME, lambda: trainer.fit(resume=True)),
    ]
    interleave(jobs, min(run.rounds, 5), "cpu")
    rows = [Row(job.name, job.seconds, None) for job in jobs]
    title = f"A checkpoint of {size / 1e6:.0f} MB of a TRM on cpu, official size"
    table = Table(title, rows, TORCH_SAVE, "")
    save = table.row(SAVE).median
    table.notes = [
        f"a durable checkpoint halts the run for {save:.2f} s, {size / save / 1e6:.0f} MB/s"
    ]
    run.tables.append(table)
