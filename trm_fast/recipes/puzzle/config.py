"""Settings of a puzzle run, and presets: the official ones and small ones.

Source of the official ones: SamsungSAILMontreal/TinyRecursiveModels at e7b6871.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trm_fast.nn import CONFIGS, TRMConfig
from trm_fast.recipes.puzzle.data import ArcTasks, MazeData, SudokuData
from trm_fast.recipes.puzzle.optimizer import PuzzleOptimizerConfig
from trm_fast.train import TrainerConfig

OFFICIAL = PuzzleOptimizerConfig(
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
        optimizer: optimizer, filter and learning rates.
        train: steps, average of the weights, evaluation and checkpoints.
    """

    batch: int = 64
    evaluation_batch: int = 256
    supervision: Literal["per_step", "joint"] = "per_step"
    weights: Literal["uniform", "halving"] = "uniform"
    halt_weight: float = 0.5
    device: str = "auto"
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    out: str = ""
    optimizer: PuzzleOptimizerConfig = field(default_factory=PuzzleOptimizerConfig)
    train: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(frozen=True)
class SudokuConfig(_Shared):
    """Trains a tiny recursive model on Sudoku; the defaults solve 6x6 on a laptop.

    Args:
        model: the model; vocab_size, seq_len and num_puzzle_identifiers are those of the data.
        data: the puzzles.
    """

    model: TRMConfig = _TINY
    data: SudokuData = field(default_factory=SudokuData)


@dataclass(frozen=True)
class MazeConfig(_Shared):
    """Trains a tiny recursive model to find the shortest path through a maze.

    Args:
        model: the model; vocab_size, seq_len and num_puzzle_identifiers are those of the data.
        data: the mazes.
    """

    model: TRMConfig = _TINY
    data: MazeData = field(default_factory=MazeData)


@dataclass(frozen=True)
class ArcConfig(_Shared):
    """Trains a tiny recursive model on ARC-AGI, and evaluates it by voting over augmentations.

    Args:
        model: the model; vocab_size, seq_len and num_puzzle_identifiers are those of the data.
        data: the tasks.
    """

    model: TRMConfig = CONFIGS["arc"]
    data: ArcTasks = field(default_factory=ArcTasks)


PuzzleConfig = SudokuConfig | MazeConfig | ArcConfig

PRESETS: dict[str, dict[str, Any]] = {
    "sudoku": {
        "tiny": SudokuConfig(
            data=SudokuData(size=6, clues=(8, 12), train=10_000, test=1_000),
            optimizer=PuzzleOptimizerConfig(lr=2e-3, alpha=0.9, lamb=0.5, min_ratio=0.05),
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
            optimizer=PuzzleOptimizerConfig(lr=2e-3, alpha=0.9, lamb=0.5, min_ratio=0.05),
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
            optimizer=PuzzleOptimizerConfig(lr=1e-3, alpha=0.9, lamb=0.5, min_ratio=0.05),
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
            optimizer=PuzzleOptimizerConfig(lr=1e-3, alpha=0.9, lamb=0.5, puzzle_lr=1e-2),
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
