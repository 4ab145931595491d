"""The trainer around a step: what it costs beside a bare loop, a checkpoint, and a resume.

The bare loop and the trainer take the same steps from the same start and must have the same weights
to the last bit before anything is timed. The trainer meters, guards, names its batches and logs.
"""

import itertools
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from trm_fast import GrokFastAdamW
from trm_fast.nn import TinyRecursiveModel, TRMConfig
from trm_fast.train import PerStepSupervision, Trainer, TrainerConfig
from trm_fast.train.checkpoints.snapshot import snapshot

from ._tables import Case, Row, rows_of

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


class Overhead:
    """A bare loop and the trainer, which have taken the same steps."""

    device = "cpu"
    baselines = (BARE,)
    floor = None
    unit = "B"

    def __init__(self, name: str) -> None:
        self.loops = {BARE: _Bare(*SIZES[name]), OURS: _Ours(*SIZES[name])}
        for _ in range(CHECKED // BLOCK):
            for loop in self.loops.values():
                loop()
        weights = (loop.model.parameters() for loop in self.loops.values())
        for one, other in zip(*weights, strict=True):
            if not torch.equal(one, other):
                raise AssertionError("the trainer must take the steps of the bare loop")

    def row(self, name: str) -> Row:
        return Row(self.loops[name], items=BLOCK)


class Checkpoints:
    """A checkpoint of a TRM of official size, in a folder that goes with the table."""

    device = "cpu"
    baselines = (TORCH_SAVE,)
    floor = None
    unit = "B"

    def __init__(self) -> None:
        self._folder = TemporaryDirectory()
        self.folder = Path(self._folder.name)
        model = TinyRecursiveModel("sudoku_mlp", num_puzzle_identifiers=1)
        ids = torch.zeros(1, dtype=torch.int64)
        tokens = torch.ones(1, 81, dtype=torch.int64)
        batch = {"inputs": tokens, "labels": tokens, "puzzle_identifiers": ids}
        self.trainer = Trainer(
            model, _optimizer, [batch], PerStepSupervision(model), TrainerConfig(steps=0),
            out=self.folder / "run", device="cpu",
        )  # fmt: skip
        self.trainer.fit()
        self.size = sum(path.stat().st_size for path in self.trainer.save().iterdir())

    def row(self, name: str) -> Row:
        if name == SAVE:
            return Row(self.trainer.save, self._forget, work=self.size)
        if name == TORCH_SAVE:
            path = self.folder / "state.pt"
            return Row(lambda: torch.save(snapshot(self.trainer), path), work=self.size)
        return Row(lambda: self.trainer.fit(resume=True), work=self.size)

    def _forget(self) -> None:
        self.trainer._saving._last = None


test_overhead = rows_of(
    Case(
        f"{name}-cpu",
        f"Trainer, update of a {name} TRM, cpu",
        partial(Overhead, name),
        (BARE, OURS),
    )
    for name in SIZES
)
test_checkpoint = rows_of(
    [Case("cpu", "Checkpoint of a TRM, cpu", Checkpoints, (SAVE, TORCH_SAVE, RESUME))]
)
