"""Small runs of every kind, and what is equal when two of them are.

A run is made anew for each part of it, as a new process would make it.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trm_fast.nn import TRMConfig
from trm_fast.optim import AdamATan2, GrokFastAdamW, MuGrokfast
from trm_fast.recipes.grokking import trainer as grokking
from trm_fast.recipes.puzzle import trainer as puzzle
from trm_fast.recipes.puzzle.data import SudokuData
from trm_fast.recipes.puzzle.optimizer import PuzzleOptimizerConfig
from trm_fast.train import (
    Callback,
    Checkpoints,
    EarlyStopping,
    StepResult,
    Trainer,
    TrainerConfig,
)
from trm_fast.train._run_files import RunFiles
from trm_fast.train.checkpoints.state import flatten

STEPS = 12
Make = Callable[..., Trainer]

_MODEL = TRMConfig(
    6, 16, puzzle_emb_ndim=0, puzzle_emb_len=0, H_cycles=1, L_cycles=1, L_layers=1, hidden_size=8,
    num_heads=2, expansion=1.0, mlp_t=True, pos_encodings="none", halt_max_steps=3,
    halt_exploration_prob=0.5, forward_dtype="float32",
)  # fmt: skip
_DATA = SudokuData(size=4, clues=(6, 9), train=13, test=6)
_TRAIN = TrainerConfig(
    steps=STEPS, ema=0.9, log_every=4, evaluate_every=5, save_every=3, monitor="lm_loss", mode="min"
)


def function_run(
    out: Path | str | None,
    callbacks: Sequence[Callback] = (),
    optimizer: str = "adamw",
    dtype: torch.dtype = torch.float32,
    batches: Any = None,
    evaluate: bool = True,
    **config: Any,
) -> Trainer:
    """A network with dropout on shuffled batches, four per epoch, with a schedule."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(26, 6, generator=generator, dtype=dtype)
    targets = torch.randint(3, (26,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Linear(8, 3)
        ).to(dtype)

    def loss(model: nn.Module, batch: list[Tensor]) -> StepResult:
        logits = model(batch[0])
        right = (logits.argmax(-1) == batch[1]).sum()
        value = nn.functional.cross_entropy(logits, batch[1])
        return StepResult(value, {"accuracy": (right, len(right.new_empty(len(logits))))})

    def evaluator(model: nn.Module) -> dict[str, float]:
        value = nn.functional.cross_entropy(model(features), targets)
        return {"lm_loss": float(value), "noise": float(torch.rand(()))}

    data = TensorDataset(features, targets)
    return Trainer(
        model,
        lambda model: MAKE[optimizer](model),
        batches if batches is not None else DataLoader(data, 7, shuffle=True),
        loss,
        dataclasses.replace(_TRAIN, **{"ema": None, **config}),
        schedules=lambda made: [torch.optim.lr_scheduler.CosineAnnealingLR(o, 20) for o in made],
        evaluate=evaluator if evaluate else None,
        callbacks=(EarlyStopping("noise", patience=1000), *callbacks),
        out=out,
        device="cpu",
    )


def _muon(model: nn.Module) -> MuGrokfast:
    named = dict(model.named_parameters())
    matrices = [param for param in named.values() if param.shape == (8, 8)]
    rest = [param for param in named.values() if param.shape != (8, 8)]
    groups = [
        {"params": matrices, "algorithm": "muon"},
        {"params": rest, "algorithm": "adamw"},
    ]
    return MuGrokfast(groups, lr=0.01, muon_lr=0.01, filter="ema", weight_ema=0.9)


MAKE: dict[str, Callable[[nn.Module], Any]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "grokfast": lambda model: GrokFastAdamW(
        model.parameters(), lr=0.01, filter="ema", weight_ema=0.9
    ),
    "window": lambda model: GrokFastAdamW(model.parameters(), lr=0.01, filter="ma", window=3),
    "atan2": lambda model: AdamATan2(model.parameters(), lr=0.01, weight_ema=0.9),
    "muon": _muon,
}


@cache
def _splits(augment: bool) -> Any:
    return dataclasses.replace(_DATA, augment=augment).load()


def puzzle_run(
    out: Path | str | None,
    callbacks: Sequence[Callback] = (),
    supervision: str = "per_step",
    optimizer: str = "grokfast_adamw",
    table: bool = False,
    forward_dtype: str = "float32",
    augment: bool = True,
    **config: Any,
) -> Trainer:
    """Puzzles of the smallest size, with one puzzle vector if there is a table."""
    model = dataclasses.replace(_MODEL, forward_dtype=forward_dtype)
    if table:
        model = dataclasses.replace(model, puzzle_emb_ndim=8, puzzle_emb_len=1)
    settings = puzzle.SudokuConfig(
        model=model,
        data=dataclasses.replace(_DATA, augment=augment),
        optimizer=PuzzleOptimizerConfig(name=optimizer, lr=0.01, warmup=4, puzzle_lr=0.01),
        train=dataclasses.replace(_TRAIN, **config),
        batch=4,
        supervision=supervision,
        weights="halving",
        device="cpu",
        out=str(out or "unused"),
    )
    trainer = puzzle.build(settings, callbacks=tuple(callbacks))
    trainer.callbacks.pop()  # progress
    return trainer if out is not None else _unwritten(trainer)


def grokking_run(
    out: Path | str | None, callbacks: Sequence[Callback] = (), steps: int = STEPS, **config: Any
) -> Trainer:
    """The decoder of the recipe on 49 equations; three batches are an epoch."""
    settings = grokking.GrokkingConfig(
        prime=7, batch=10, iterations=steps, save_every=1, plot=False, device="cpu",
        out=str(out or "unused"), **config,
    )  # fmt: skip
    trainer = grokking.build(settings)
    trainer.callbacks = [*trainer.callbacks[:-1], *callbacks]
    return trainer if out is not None else _unwritten(trainer)


def _unwritten(trainer: Trainer) -> Trainer:
    """A recipe always writes; here it does not."""
    trainer.out, trainer.files = None, RunFiles(None, trainer.world, (), 2)
    return trainer


def _case(make: Make, **options: Any) -> Make:
    return lambda out, callbacks=(), **more: make(out, callbacks, **options, **more)


CASES: dict[str, Make] = {
    "per step": _case(puzzle_run),
    "per step, table": _case(puzzle_run, table=True, accumulate=2),
    "per step, bf16 activations": _case(puzzle_run, forward_dtype="bfloat16"),
    "per step, bf16 autocast": _case(puzzle_run, precision="bf16", optimizer="adam_atan2"),
    "per step, adamw": _case(puzzle_run, optimizer="adamw", clip_norm=0.5),
    "per step, muon": _case(puzzle_run, optimizer="mugrokfast", clip_norm=0.5),
    "joint": _case(puzzle_run, supervision="joint"),
    "joint, table": _case(puzzle_run, supervision="joint", table=True),
    "joint, fp64": _case(puzzle_run, supervision="joint", forward_dtype="float64", accumulate=3),
    "function, adamw": _case(function_run, ema=0.9, clip_norm=0.1),
    "function, sgd, three batches": _case(function_run, optimizer="sgd", accumulate=3),
    "function, grokfast": _case(function_run, optimizer="grokfast", clip_norm=0.1),
    "function, window": _case(function_run, optimizer="window", ema=0.9),
    "function, atan2, bf16": _case(function_run, optimizer="atan2", precision="bf16"),
    "function, fp16": _case(function_run, optimizer="grokfast", precision="fp16", accumulate=2),
    "function, muon": _case(function_run, optimizer="muon", accumulate=2),
    "function, fp64": _case(function_run, optimizer="grokfast", dtype=torch.float64),
    "grokking": _case(grokking_run),
    "grokking, muon": _case(grokking_run, optimizer="muon"),
}


def result(out: Path) -> dict[str, Any]:
    """All that a run has left that must be equal: its last checkpoint, and its metrics."""
    state = Checkpoints(out).load().state
    state["trainer"].pop("seconds")
    found: dict[str, Any] = {}
    for name, part in state.items():
        tensors, tree = flatten(part, name)
        found |= {f"{name}.{key}": tensor for key, tensor in tensors.items()} | {name: tree}
    lines = (out / "metrics.jsonl").read_text().splitlines()
    found["metrics"] = [_timeless(json.loads(line)) for line in lines]
    return found


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ("seconds", "steps_per_second")}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what is not equal to the bit."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if not equal(one.get(name), other.get(name))]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        one, other = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
        return torch.equal(one, other)
    return type(one) is type(other) and one == other
