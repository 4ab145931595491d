"""Official TRM on puzzles: Sudoku, mazes and ARC-AGI, with the official settings and small ones.

Source: Jolicoeur-Martineau 2025, arXiv:2510.04871; SamsungSAILMontreal/TinyRecursiveModels at
e7b6871 (model, loss, optimizer, schedule, data layout, evaluation). Declared differences: every
random draw is seeded; evaluation takes the averaged weights and the table of puzzle vectors as it
is; runs resume to the same bits.
"""

from dataclasses import replace
from typing import Any

import torch

from trm_fast.data.puzzles import PuzzleBatches
from trm_fast.nn import TinyRecursiveModel
from trm_fast.recipes.optimizers import keeps_average, make_schedules
from trm_fast.recipes.puzzle.config import (
    PRESETS,
    ArcConfig,
    MazeConfig,
    PuzzleConfig,
    SudokuConfig,
)
from trm_fast.recipes.puzzle.data import Splits
from trm_fast.recipes.puzzle.evaluation import Evaluation
from trm_fast.recipes.puzzle.optimizer import make_puzzle_optimizers
from trm_fast.recipes.puzzle.report import finish
from trm_fast.recipes.recipe import Recipe, trainer_settings
from trm_fast.recipes.settings import directory_of, to_json
from trm_fast.train import (
    Callback,
    JointSupervision,
    Objective,
    PerStepSupervision,
    Progress,
    Tracker,
    Trainer,
)
from trm_fast.train.distributed import World
from trm_fast.train.reports.reading import FILES as REPORT_FILES

_SHOWN = ("loss", "accuracy", "exact_accuracy", "pass@1", "pass@2", "steps")
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
        lambda _: make_puzzle_optimizers(model, config.optimizer, ema),
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
        out=directory_of(config.out, _name_of(config)),
        device=world,
        name=_name_of(config),
        settings=to_json(config),
        files=REPORT_FILES,
        report={"examples": config.batch * config.train.accumulate},
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


def _name_of(config: PuzzleConfig) -> str:
    return _NAMES[type(config)]


def _recipe(name: str, all_data: dict[str, Any]) -> Recipe[Any]:
    return Recipe(
        name=name,
        presets=PRESETS[name],
        build=build,
        finish=finish,
        length="train.steps",
        may_change=(*trainer_settings("train"), "tracker", "device", "out"),
        evaluation={"tracker": "none"},
        data="data.path",
        all_data=all_data,
    )


SUDOKU = _recipe("sudoku", {"data.train": 0, "data.test": 0})
MAZE = _recipe("maze", {"data.train": 0, "data.test": 0})
ARC = _recipe("arc", {})
