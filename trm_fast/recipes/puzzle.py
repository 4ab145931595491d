"""Official TRM on puzzles: Sudoku, mazes and ARC-AGI, with the official settings and small ones.

Source: Jolicoeur-Martineau 2025, arXiv:2510.04871; SamsungSAILMontreal/TinyRecursiveModels at
e7b6871 (model, loss, optimizer, schedule, data layout, evaluation). Declared differences: every
random draw is seeded; evaluation takes the averaged weights and the table of puzzle vectors as it
is; runs resume to the same bits.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trm_fast.data.arc_voting import ArcVoting
from trm_fast.data.puzzles import PuzzleBatches, evaluation_batches
from trm_fast.nn import CONFIGS, TinyRecursiveModel, TRMConfig
from trm_fast.recipes._config import to_json
from trm_fast.recipes._optimizers import (
    OptimizerConfig,
    keeps_average,
    make_optimizers,
    make_schedules,
)
from trm_fast.recipes._puzzle_data import ArcTasks, MazeData, Splits, SudokuData
from trm_fast.recipes._puzzle_show import Draw, draw_maze, draw_sudoku, solve_aloud
from trm_fast.recipes._sudoku_baselines import elimination, most_common
from trm_fast.train import (
    Callback,
    JointSupervision,
    Objective,
    PerStepSupervision,
    Progress,
    Summary,
    Tracker,
    Trainer,
    TrainerConfig,
)
from trm_fast.train.batches import to_device
from trm_fast.train.distributed import World
from trm_fast.train.meter import Meter
from trm_fast.train.report import FILES as REPORT_FILES

_FIELDS = ("inputs", "puzzle_identifiers", "labels")
_SHOWN = ("loss", "accuracy", "exact_accuracy", "pass@1", "pass@2", "steps")
OFFICIAL = OptimizerConfig(
    name="adam_atan2", lr=1e-4, betas=(0.9, 0.95), weight_decay=1.0, filter="none", warmup=2000,
    puzzle_lr=1e-4, puzzle_weight_decay=1.0,
)  # fmt: skip
_OFFICIAL_RUN = TrainerConfig(
    steps=65_104, ema=0.999, log_every=100, evaluate_every=6510, save_every=2000,
    monitor="exact_accuracy",
)  # fmt: skip
# Small models: no puzzle vectors, as every puzzle is of the same kind.
_TINY = TRMConfig(
    8, 36, puzzle_emb_ndim=0, puzzle_emb_len=0, H_cycles=2, L_cycles=3, hidden_size=64, num_heads=4,
    expansion=3.0, mlp_t=True, pos_encodings="none", halt_max_steps=8,
)  # fmt: skip


@dataclass(frozen=True)
class _Shared:
    """What the recipes for puzzles have in common.

    Args:
        batch: puzzles per update, over all processes.
        evaluation_batch: puzzles per batch of the evaluation.
        supervision: per_step updates the weights after every supervision step (official), joint
            once after all steps of a batch.
        weights: of the steps with joint supervision: uniform or halving.
        halt_weight: weight of the loss of halting, >= 0; the paper has 1, the official code 0.5.
        device: where to train: auto (cuda if there is one, else cpu) or a torch device.
        tracker: where metrics go beside metrics.jsonl: none, tensorboard or wandb.
        out: directory of the run; empty means runs/ and the name of the recipe.
    """

    batch: int = 64
    evaluation_batch: int = 256
    supervision: Literal["per_step", "joint"] = "per_step"
    weights: Literal["uniform", "halving"] = "uniform"
    halt_weight: float = 0.5
    device: str = "auto"
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    out: str = ""


@dataclass(frozen=True)
class SudokuConfig(_Shared):
    """Trains a tiny recursive model on Sudoku; the defaults solve 6x6 on a laptop.

    Args:
        model: the model; vocab_size, seq_len and num_puzzle_identifiers are those of the data.
        data: the puzzles.
        optimizer: optimizer, filter and learning rates.
        train: steps, average of the weights, evaluation and checkpoints.
    """

    model: TRMConfig = _TINY
    data: SudokuData = field(default_factory=SudokuData)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(frozen=True)
class MazeConfig(_Shared):
    """Trains a tiny recursive model to find the shortest path through a maze.

    Args:
        model: the model; vocab_size, seq_len and num_puzzle_identifiers are those of the data.
        data: the mazes.
        optimizer: optimizer, filter and learning rates.
        train: steps, average of the weights, evaluation and checkpoints.
    """

    model: TRMConfig = _TINY
    data: MazeData = field(default_factory=MazeData)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(frozen=True)
class ArcConfig(_Shared):
    """Trains a tiny recursive model on ARC-AGI, and evaluates it by voting over augmentations.

    Args:
        model: the model; vocab_size, seq_len and num_puzzle_identifiers are those of the data.
        data: the tasks.
        optimizer: optimizer, filter and learning rates.
        train: steps, average of the weights, evaluation and checkpoints.
    """

    model: TRMConfig = CONFIGS["arc"]
    data: ArcTasks = field(default_factory=ArcTasks)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainerConfig = field(default_factory=TrainerConfig)


PuzzleConfig = SudokuConfig | MazeConfig | ArcConfig
_NAMES: dict[type, str] = {SudokuConfig: "sudoku", MazeConfig: "maze", ArcConfig: "arc"}


def build(config: PuzzleConfig, *, callbacks: tuple[Callback, ...] = ()) -> Trainer:
    """Makes data, model, optimizers and the trainer of a run; nothing is written yet.

    Args:
        config: the settings.
        callbacks: beside progress and tracker.

    Raises:
        ValueError, OSError: a setting is out of range, or data is missing or wrong.
    """
    world = World(config.device)
    splits = config.data.load()
    model = _model(config, splits)
    ema = config.train.ema if keeps_average(config.optimizer) else None
    train = replace(config.train, ema=None) if ema is not None else config.train
    trackers = () if config.tracker == "none" else (Tracker(config.tracker),)
    return Trainer(
        model,
        lambda _: make_optimizers(model, config.optimizer, ema),
        PuzzleBatches(
            splits.train,
            config.batch,
            seed=config.train.seed,
            rank=world.rank,
            world_size=world.size,
            augment=splits.augment,
        ),
        _objective(config, model),
        train,
        schedules=lambda made: make_schedules(made, config.optimizer, config.train.steps),
        evaluate=Evaluation(config, splits, world),
        callbacks=(*callbacks, Progress(_SHOWN), *trackers),
        out=config.out or f"runs/{_NAMES[type(config)]}",
        device=world,
        name=_NAMES[type(config)],
        settings=to_json(config),
        files=REPORT_FILES,
    )


def _model(config: PuzzleConfig, splits: Splits) -> TinyRecursiveModel:
    """Returns the model with the sizes of the data; the seed decides its weights."""
    meta = splits.train.metadata
    fitted = replace(
        config.model,
        vocab_size=meta.vocab_size,
        seq_len=meta.seq_len,
        num_puzzle_identifiers=meta.num_puzzle_identifiers,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)
        return TinyRecursiveModel(fitted)


def _objective(config: PuzzleConfig, model: TinyRecursiveModel) -> Objective:
    if config.supervision == "per_step":
        return PerStepSupervision(model, halt_weight=config.halt_weight)
    steps = model.config.halt_max_steps
    return JointSupervision(model, steps, config.weights, halt_weight=config.halt_weight)


class Evaluation:
    """Official evaluation on the puzzles that are held out.

    Args:
        config: settings of the run.
        splits: its puzzles.
        world: the processes, each of which takes its part.
    """

    def __init__(self, config: PuzzleConfig, splits: Splits, world: World) -> None:
        self.config = config
        self.splits = splits
        self.world = world
        size = config.evaluation_batch
        self.batches = evaluation_batches(splits.test, size, world.rank, world.size)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, TinyRecursiveModel)
        batches = (to_device(batch, model.lm_head.device) for batch in self.batches)
        if self.splits.voting is not None:
            return self._vote(model, self.splits.voting, batches)
        return model.evaluate(batches, halt_weight=self.config.halt_weight)

    def _vote(
        self, model: TinyRecursiveModel, voting: ArcVoting, batches: Iterable[dict[str, Tensor]]
    ) -> dict[str, float]:
        """Returns pass@K, and what single answers are worth."""
        meter = Meter(model.lm_head.device)
        voting.begin()
        count = 0
        for batch in batches:
            inputs, ids, labels = (batch[name] for name in _FIELDS)
            found = model.predict(inputs, ids, early_halt=False)
            voting.update(inputs, ids, found.tokens, found.q_halt)
            wrong = ((found.tokens != labels) & (labels >= 0)).any(dim=1)
            count += len(wrong)
            meter.add({"exact_accuracy": ((~wrong).sum(), len(wrong))})
        voting.merge(self.world.gather(voting.state_dict()))
        return {"count": float(count), **meter.means(), **voting.scores()}


def finish(trainer: Trainer, summary: Summary) -> list[str]:
    """Returns the lines that are shown after a run: what is solved, by what else, and how."""
    lines = [f"{summary.reason}: step {summary.step:,}, {summary.seconds:.0f} s"]
    if summary.skipped:
        lines.append(f"{summary.skipped} steps were skipped: see events.jsonl")
    if summary.signal is None and summary.metrics:
        lines += _solved(trainer, summary)
    if trainer.out is not None:
        lines += ["", f"report: trm-fast report {trainer.out} --html"]
    return lines


def _voted(summary: Summary) -> list[str]:
    shares = ", ".join(
        f"{share:.1%} {name}" for name, share in summary.metrics.items() if name.startswith("pass@")
    )
    tasks = summary.metrics["tasks"]
    return [f"solved by vote, of {tasks:.0f} evaluation tasks: {shares}"]


def _solved(trainer: Trainer, summary: Summary) -> list[str]:
    evaluation, model = trainer.evaluator, trainer.model
    assert isinstance(evaluation, Evaluation) and isinstance(model, TinyRecursiveModel)
    config, splits = evaluation.config, evaluation.splits
    share, count = summary.metrics["exact_accuracy"], summary.metrics["count"]
    lines = [f"exactly solved: {share:.1%} of {count:,.0f} puzzles that it has never seen"]
    if isinstance(config, ArcConfig):
        return _voted(summary)
    if isinstance(config, SudokuConfig):
        draw: Draw = draw_sudoku
        lines.append(
            f"without a model: {most_common(splits.train, splits.test):.1%} with the digit that is "
            f"most common in each cell, {elimination(splits.test, 1):.1%} by elimination once and "
            f"guessing, {elimination(splits.test):.1%} by elimination to its end and guessing"
        )
    else:
        draw = draw_maze(config.data.width)
    averaged = nullcontext() if trainer.ema is None else trainer.ema.swapped()
    with averaged:
        return [*lines, "", *solve_aloud(model, splits.test, draw)]


PRESETS: dict[str, dict[str, Any]] = {
    "sudoku": {
        "tiny": SudokuConfig(
            data=SudokuData(size=6, clues=(8, 12), train=10_000, test=1_000),
            optimizer=OptimizerConfig(lr=2e-3, alpha=0.9, lamb=0.5, min_ratio=0.05),
            train=TrainerConfig(
                steps=2000,
                ema=0.99,
                log_every=50,
                evaluate_every=500,
                save_every=500,
                monitor="exact_accuracy",
            ),
        ),
        "9x9": SudokuConfig(
            model=replace(_TINY, hidden_size=128),
            data=SudokuData(size=9, clues=(28, 40), train=50_000, test=1_000),
            optimizer=OptimizerConfig(lr=2e-3, alpha=0.9, lamb=0.5, min_ratio=0.05),
            train=TrainerConfig(
                steps=8000,
                ema=0.995,
                log_every=50,
                evaluate_every=500,
                save_every=500,
                monitor="exact_accuracy",
            ),
        ),
        "official": SudokuConfig(
            model=CONFIGS["sudoku_mlp"],
            data=SudokuData(path="hub", train=1000, test=0),
            optimizer=OFFICIAL,
            batch=768,
            train=_OFFICIAL_RUN,
        ),
    },
    "maze": {
        "tiny": MazeConfig(
            model=replace(_TINY, mlp_t=False, pos_encodings="rope"),
            data=MazeData(height=8, width=8, train=10_000, test=500),
            optimizer=OptimizerConfig(lr=1e-3, alpha=0.9, lamb=0.5, min_ratio=0.05),
            train=TrainerConfig(
                steps=1500,
                ema=0.99,
                log_every=50,
                evaluate_every=500,
                save_every=500,
                monitor="exact_accuracy",
            ),
        ),
        "official": MazeConfig(
            model=CONFIGS["maze"],
            data=MazeData(path="hub", train=0, test=0, augment=False),
            optimizer=OFFICIAL,
            batch=768,
            train=_OFFICIAL_RUN,
        ),
    },
    "arc": {
        "tiny": ArcConfig(
            model=replace(
                _TINY, puzzle_emb_ndim=64, puzzle_emb_len=1, mlp_t=False, pos_encodings="rope"
            ),
            data=ArcTasks(augmentations=20, tasks=20),
            optimizer=OptimizerConfig(lr=1e-3, alpha=0.9, lamb=0.5, puzzle_lr=1e-2),
            batch=8,
            evaluation_batch=32,
            train=TrainerConfig(steps=500, ema=0.99, log_every=20, monitor="pass@2"),
        ),
        "official": ArcConfig(
            optimizer=replace(OFFICIAL, weight_decay=0.1, puzzle_lr=1e-2, puzzle_weight_decay=0.1),
            batch=768,
            train=replace(_OFFICIAL_RUN, steps=518_640, evaluate_every=51_864, monitor="pass@2"),
        ),
    },
}
