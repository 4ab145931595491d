"""What two processes do for test_distributed.py; one process does the same for comparison."""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trm_fast.data.puzzles import PuzzleBatches, PuzzleSet, evaluation_batches
from trm_fast.nn import TinyRecursiveModel
from trm_fast.optim import GrokFastAdamW, SparseSignSGD
from trm_fast.train import (
    Callback,
    DeepSupervision,
    FunctionObjective,
    JointSupervision,
    PerStepSupervision,
    Run,
    Step,
    StepResult,
    Trainer,
    TrainerConfig,
)
from trm_fast.train.checkpoints.snapshot import snapshot
from trm_fast.train.distributed import World

from .runs import _DATA, _MODEL

ROWS = 8  # of a batch, over all processes
IDS = 5


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> StepResult:
    value = nn.functional.cross_entropy(model(batch[0]), batch[1])
    count = len(batch[1])
    return StepResult(value, {"double": (2 * count * value, count)})


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4 * ROWS, 5, generator=generator, dtype=torch.float64)
    return features, torch.randint(3, (4 * ROWS,), generator=generator)


def parts(world: World) -> list[tuple[Tensor, Tensor]]:
    """The rows of this process in each batch."""
    own = ROWS // world.size
    rows = slice(world.rank * own, (world.rank + 1) * own)
    features, targets = examples()
    pairs = zip(features.split(ROWS), targets.split(ROWS), strict=True)
    return [(one[rows], other[rows]) for one, other in pairs]


def small(strategy: str = "ddp", seed: int = 0, out: Path | None = None, **config: Any) -> Trainer:
    world = World("cpu")
    own = parts(world)

    def evaluate(model: nn.Module) -> dict[str, float]:
        # The first of two processes has nothing to evaluate, and does not even call the model.
        rows = own[: 2 * world.rank] if world.size > 1 else [(a[4:], b[4:]) for a, b in own[:2]]
        if not rows:
            return {"count": 0.0}
        return {"count": 8.0, "value": sum(float(loss(model, pair).loss) for pair in rows) / 2}

    options = {"lr": 0.01, "foreach": False}
    settings = {"steps": 8, "log_every": 3, "evaluate_every": 3, "clip_norm": 0.2, "ema": 0.8}
    return Trainer(
        network(seed),
        lambda model: torch.optim.AdamW(model.parameters(), **options),
        own,
        loss,
        TrainerConfig(strategy=strategy, **{**settings, **config}),
        evaluate=evaluate,
        out=out,
        device=world,
    )


def puzzles(split: PuzzleSet) -> PuzzleSet:
    ids = np.arange(len(split.puzzle_identifiers), dtype=np.int32) % IDS
    metadata = replace(split.metadata, num_puzzle_identifiers=IDS)
    return replace(split, puzzle_identifiers=ids, metadata=metadata)


def trm(supervision: str, strategy: str = "ddp", **config: Any) -> Trainer:
    world = World("cpu")
    data = _DATA.load()
    torch.manual_seed(0)
    fitted = replace(
        _MODEL, num_puzzle_identifiers=IDS, puzzle_emb_ndim=8, puzzle_emb_len=1,
        halt_exploration_prob=0.0, forward_dtype="float64",
    )  # fmt: skip
    model = TinyRecursiveModel(fitted).double()
    train = puzzles(data.train)
    objective: Any = PerStepSupervision(model)
    if supervision == "joint":
        objective = JointSupervision(model, 3)
    rows = evaluation_batches(puzzles(data.test), 5, world.rank, world.size)
    return Trainer(
        model,
        lambda model: [
            GrokFastAdamW(model.parameters(), lr=0.01, weight_ema=0.9, filter="ema"),
            SparseSignSGD([model.puzzles.table], lr=0.01),
        ],
        PuzzleBatches(train, ROWS, rank=world.rank, world_size=world.size),
        objective,
        TrainerConfig(**{"steps": 5, "evaluate_every": 2, "strategy": strategy, **config}),
        evaluate=lambda model: model.evaluate(rows),
        device=world,
    )


def shuffled(out: Path, *callbacks: Callback) -> Trainer:
    """Each process shuffles rows of its own; dropout draws besides."""
    world = World("cpu")
    features, targets = examples()
    own = slice(world.rank, None, world.size)
    loader = DataLoader(TensorDataset(features[own], targets[own]), 4, shuffle=True)
    model = nn.Sequential(network(), nn.Dropout(0.5))
    return Trainer(
        model,
        lambda model: GrokFastAdamW(model.parameters(), lr=0.01, weight_ema=0.9),
        loader,
        loss,
        TrainerConfig(steps=9, log_every=4, save_every=4),
        callbacks=callbacks,
        out=out,
        device=world,
    )


class Embedded(nn.Module):
    """A model whose first pass is a method of its own, with weights that every step uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.net, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("memory", torch.zeros(7))

    def start(self, batch: Any) -> Any:
        return torch.tanh(self.embedding(batch[0])), torch.zeros(7, dtype=torch.float64)

    def forward(self, state: Any, batch: Any) -> Any:
        x, y = state
        y = torch.tanh(self.net(x + y))
        # The embedding is reached here and by the backward pass at the end.
        logits = self.head(y) + self.embedding(batch[0])[:, :3]
        return (x, y), logits


def entropy(logits: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(logits, batch[1])


def supervised(strategy: str = "ddp", declared: bool = True, **config: Any) -> Trainer:
    """Three losses for each batch, and a backward pass through the embedding at its end."""
    world = World("cpu")
    torch.manual_seed(0)
    objective = DeepSupervision(entropy, 3, "halving")
    if not declared:
        objective.backwards = None
    settings = {"steps": 8, "log_every": 3, "clip_norm": 0.5, "ema": 0.8, **config}
    return Trainer(
        Embedded().double(),
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False),
        parts(world),
        objective,
        TrainerConfig(strategy=strategy, **settings),
        device=world,
    )


def missing() -> dict[str, Any]:
    """Only the second process has a gradient of one weight, and no process one of another."""
    trainer = supervised()

    def uneven(model: nn.Module, batch: Any) -> Tensor:
        used = model.embedding(batch[0])[:, :3]
        return entropy(used + (model.head(torch.ones(7).double()) if trainer.world.rank else 0),
                       batch)  # fmt: skip

    trainer.objective = FunctionObjective(uneven)
    seen: list[Tensor] = []

    class Look(Callback):
        def on_gradients(self, run: Run, step: Step) -> None:
            grad = run.model.head.weight.grad
            assert run.model.unused.grad is None and run.model.net.weight.grad is None
            seen.append(grad.clone())

    trainer.callbacks.append(Look())
    trainer.fit()
    return {"grads": seen, "head": trainer.model.head.weight.detach()}


class Remembers(Callback):
    """Writes what the process has seen into a buffer of the model, which differs by process."""

    def on_step(self, run: Run, step: Step) -> None:
        run.model.memory.add_(step.batches[0][0].mean())


def remembering(out: Path, *callbacks: Callback) -> Trainer:
    trainer = supervised(save_every=3, steps=7)
    return Trainer(
        trainer.model, trainer.optimizers[0], parts(trainer.world), trainer.objective,
        trainer.config, callbacks=(Remembers(), *callbacks), out=out, device=trainer.world,
    )  # fmt: skip


def remembered(out: Path) -> dict[str, Any]:
    trainer = remembering(out / "memory")
    trainer.fit()
    wanted = trainer.model.memory.clone()
    remembering(out / "memory-parts", AtStep(4, lambda run: run.stop("for now"), None)).fit()
    again = remembering(out / "memory-parts")
    again.fit(resume=True)
    return {"wanted": wanted, "found": again.model.memory.clone(), "step": again.step}


def overflowing() -> dict[str, Any]:
    """float16 overflows in the second process alone."""
    trainer = small(precision="fp16", evaluate_every=0, ema=None, max_nonfinite=1, steps=6)
    trainer.model.float()
    rows = [(one.float(), other) for one, other in parts(trainer.world)]

    def too_large(model: nn.Module, batch: Any) -> Tensor:
        scale = trainer.scaler.get_scale()
        value = loss(model, batch).loss
        if trainer.world.rank == 1 and scale > 2.0**14:
            value = value + _spoil(value)
        return value

    finite: list[bool] = []

    class Look(Callback):
        def on_step(self, run: Run, step: Step) -> None:
            finite.append(bool(step.finite))

    again = Trainer(
        trainer.model, torch.optim.SGD(trainer.model.parameters(), lr=0.1), rows,
        FunctionObjective(too_large), trainer.config, callbacks=[Look()], device=trainer.world,
    )  # fmt: skip
    trainer = again
    again.fit()
    model = torch.cat([param.detach().flatten() for param in again.model.parameters()])
    return {"finite": finite, "scale": again.scaler.get_scale(), "model": model}


def _spoil(value: Tensor) -> Tensor:
    """Zero, with a gradient that is infinite."""
    copy = value * 1.0
    copy.register_hook(lambda grad: grad * math.inf)
    return copy - copy.detach()


def finished(trainer: Trainer) -> dict[str, Any]:
    """What is compared: the state, whole, and the records."""
    summary = trainer.fit()
    state = snapshot(trainer)
    average = trainer.ema.average if trainer.ema else {}
    from trm_fast.train.distributed import whole

    return {
        "model": state["model"],
        "average": whole(average),
        "history": [
            {k: v for k, v in r.items() if k not in ("seconds", "steps_per_second")}
            for r in trainer.history
        ],
        "step": summary.step,
        "skipped": summary.skipped,
    }


class AtStep(Callback):
    """Does something after a step, in one process or, with None, in all."""

    def __init__(self, step: int, action: Callable[[Run], None], rank: int | None = 1) -> None:
        self.step, self.action, self.rank = step, action, rank

    def on_step(self, run: Run, step: Step) -> None:
        if run.step == self.step and self.rank in (None, run.world.rank):
            self.action(run)


def stopped(out: Path) -> int:
    stop = AtStep(3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    summary = shuffled(out, stop).fit()
    assert summary.signal == signal.SIGTERM
    return summary.step


def spoilt(strategy: str) -> dict[str, Any]:
    """The second process has a loss that is not finite, in the third step."""
    trainer = small(strategy, evaluate_every=0)

    def spoilt_loss(model: nn.Module, batch: Any) -> StepResult:
        found = loss(model, batch)
        # The gradients are finite, so the other process sees nothing of it.
        bad = trainer.step == 2 and trainer.world.rank == 1
        return found._replace(loss=found.loss + math.nan) if bad else found

    trainer.objective = FunctionObjective(spoilt_loss)
    weights: list[Tensor] = []

    class Keep(Callback):
        def on_step(self, run: Run, step: Step) -> None:
            state = snapshot(trainer)["model"]
            weights.append(torch.cat([value.flatten() for value in state.values()]))

    trainer.callbacks.append(Keep())
    return finished(trainer) | {"weights": weights}


def gathered() -> dict[str, Any]:
    world = World("cpu")
    state = {"own": [torch.arange(world.rank + 1), world.rank, None, "x"]}
    rank = float(world.rank)
    return {
        "states": world.collect(state),
        "ranks": world.gather(world.rank),
        "mean": world.mean({"count": 1 + 2 * rank, "a": rank, "b": 1.0}),
        "missing": world.mean({"count": 2.0, "a": 7.0} if rank else {"count": 0.0}),
        "nothing": world.mean({"count": 0.0}),
        "plain": world.mean({"a": rank}),
        "large": world.mean({"count": 2.0**24 + 1, "a": 1.0})["count"],
        "agree": bool(world.all_agree(torch.tensor(world.rank == 0))),
    }


def crossed(directory: Path, strategy: str) -> dict[str, Any]:
    """Takes up the checkpoint of one process, and saves it again without a step."""
    trainer = small(strategy, out=directory / f"from-one-{strategy}", steps=4, evaluate_every=0)
    summary = trainer.fit(resume=True)
    state = snapshot(trainer)
    return {
        "model": state["model"],
        "optim": state["optim"],
        "ema": state["ema"],
        "step": summary.step,
    }


SCENES: dict[str, Callable[[Path], Any]] = {
    "gathered": lambda out: gathered(),
    # The seeds differ: all processes must start from the weights of the first.
    "ddp": lambda out: finished(small(seed=World("cpu").rank)),
    "ddp, accumulated": lambda out: finished(small(accumulate=2)),
    "fsdp2": lambda out: finished(small("fsdp2", seed=World("cpu").rank)),
    "fsdp2, accumulated": lambda out: finished(small("fsdp2", accumulate=2)),
    "per step": lambda out: finished(trm("per step")),
    "per step, accumulated": lambda out: finished(trm("per step", accumulate=2, clip_norm=1.0)),
    "joint": lambda out: finished(trm("joint")),
    "per step, fsdp2": lambda out: finished(trm("per step", "fsdp2")),
    "joint, fsdp2": lambda out: finished(trm("joint", "fsdp2")),
    "whole": lambda out: shuffled(out / "whole").fit().step,
    "stopped": lambda out: stopped(out / "parts"),
    "resumed": lambda out: shuffled(out / "parts").fit(resume=True).step,
    "supervised": lambda out: finished(supervised()),
    "supervised, accumulated": lambda out: finished(supervised(accumulate=2)),
    "supervised, fsdp2": lambda out: finished(supervised("fsdp2")),
    "supervised, fsdp2, accumulated": lambda out: finished(supervised("fsdp2", accumulate=2)),
    "supervised, fsdp2, undeclared": lambda out: finished(supervised("fsdp2", False)),
    "missing": lambda out: missing(),
    "remembered": remembered,
    "overflowing": lambda out: overflowing(),
    "spoilt": lambda out: spoilt("ddp"),
    "spoilt, fsdp2": lambda out: spoilt("fsdp2"),
    "from one": lambda out: crossed(out, "ddp"),
    "from one, fsdp2": lambda out: crossed(out, "fsdp2"),
    "to one": lambda out: finished(small(out=out / "to-one-ddp")),
    "to one, fsdp2": lambda out: finished(small("fsdp2", out=out / "to-one-fsdp2")),
}


def play(rank: int, directory: Path) -> dict[str, Any]:
    """Returns what came out of every scene."""
    return {name: scene(directory) for name, scene in SCENES.items()}
