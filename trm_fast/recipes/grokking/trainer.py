"""The published grokking experiment: a decoder learns x*y mod 97, first by heart, then by rule.

Source: Lee et al. 2024, arXiv:2405.20233, and ironjr/grokfast at commit 93b2248 (``main.py``).

With one seed everything random agrees with that code on the CPU: the initial weights, the split of
the equations and the order of every batch. Published on a GTX 1080 Ti: validation reaches 95 % at
iteration 910 with the EMA filter (alpha 0.98, lamb 2, weight decay 0.005) and at 39,890 with Adam
alone (weight decay 0). Measured with the same code, seed 0, on a CPU: 910 with the filter; without
it 79 % at 42,000. The two published rows differ in weight decay: to see what the filter itself
does, compare with ``filter="none"`` at the same weight decay.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from trm_fast.optim import GrokFastAdamW, MuGrokfast
from trm_fast.optim.groups import split_params
from trm_fast.optim.schedules import warmup_constant
from trm_fast.recipes.grokking.config import PRESETS, GrokkingConfig
from trm_fast.recipes.grokking.data import PermutedEquations, model_and_data
from trm_fast.recipes.grokking.model import Decoder
from trm_fast.recipes.grokking.report import Evaluation, Picture, evaluations, finish
from trm_fast.recipes.recipe import Recipe
from trm_fast.recipes.settings import directory_of
from trm_fast.train import (
    Callback,
    EpochBatches,
    Progress,
    StepResult,
    StopAtTarget,
    Trainer,
    TrainerConfig,
)
from trm_fast.train.distributed import World
from trm_fast.train.meter import Meter
from trm_fast.train.reports.reading import FILES as REPORT_FILES


def build(config: GrokkingConfig) -> Trainer:
    """Makes data, model, optimizer and the trainer of a run; nothing is written yet.

    Raises:
        ValueError: the prime, the operation, the device or an optimizer setting cannot be used.
        ModuleNotFoundError: matplotlib is to draw and not installed.
    """
    name = f"grokking-{config.optimizer}-{config.filter}-seed{config.seed}"
    out = directory_of(config.out, name)
    shown = ("train_accuracy", "validation_accuracy", "train_loss", "validation_loss")
    pictures = [Picture(config)] if config.plot else []
    return _trainer(config, out, (Progress(shown, every=config.log_every), *pictures))


def grokking_epochs(config: GrokkingConfig) -> Iterator[Evaluation]:
    """Trains without writing or showing anything; yields one evaluation per epoch.

    The model is built by the call, the epochs are trained as they are asked for, also past the
    target. ``out`` and ``plot`` mean nothing here.

    Args:
        config: settings of the run.

    Returns:
        The evaluations, until the iterations are used up.

    Raises:
        ValueError: the prime, the operation, the device or an optimizer setting cannot be used.
        FloatingPointError: the loss is not finite any more.
    """
    trainer = _trainer(dataclasses.replace(config, stop_at_target=False), None, ())
    return _epochs(trainer)


def _epochs(trainer: Trainer) -> Iterator[Evaluation]:
    for step in trainer.updates():
        if trainer.evaluated_at == step:
            yield evaluations(trainer.history[-2:])[0]


def _trainer(config: GrokkingConfig, out: str | None, callbacks: Sequence[Callback]) -> Trainer:
    world = World(config.device)
    model, train, validation, generator = model_and_data(config, world.device)
    batches = PermutedEquations(train, config.batch, generator)
    target = StopAtTarget("validation_accuracy", config.target)
    return Trainer(
        model,
        _optimizer(model, config),
        EpochBatches(batches),
        _objective,
        TrainerConfig(
            steps=config.iterations,
            log_every=len(batches),
            evaluate_every=len(batches),
            save_every=config.save_every * len(batches),
            max_nonfinite=1,
            seed=config.seed,
        ),
        # As published, the first update has a learning rate of 0.
        schedules=lambda made: [LambdaLR(made[0], warmup_constant(config.warmup))],
        evaluate=lambda model: _validate(model, validation, config.batch),
        callbacks=(*([target] if config.stop_at_target else []), *callbacks),
        out=out,
        device=world,
        name="grokking",
        settings=dataclasses.asdict(config),
        files=("accuracy.png", *REPORT_FILES),
        report={"examples": config.batch},
    )


def _optimizer(model: Decoder, config: GrokkingConfig) -> Optimizer:
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "filter": None if config.filter == "none" else config.filter,
        "alpha": config.alpha,
        "lamb": config.lamb,
        "window": config.window,
    }
    if config.optimizer == "muon":
        groups = split_params(model, heads=[model.head])
        return MuGrokfast(groups, muon_lr=config.muon_lr, adjust_lr_fn="match_rms_adamw", **options)
    decoupled = config.optimizer == "adamw"
    return GrokFastAdamW(model.parameters(), decoupled_weight_decay=decoupled, **options)


def _objective(model: nn.Module, equations: Tensor) -> StepResult:
    loss, right = _answer(model, equations)
    count = equations.shape[1]
    metrics = {"train_loss": (count * loss, count), "train_accuracy": (right.sum(), count)}
    return StepResult(loss, metrics)


def _validate(model: nn.Module, equations: Tensor, batch: int) -> dict[str, float]:
    meter = Meter(equations.device)
    for part in equations.split(batch, dim=1):
        found = _objective(model, part).metrics
        meter.add({name.replace("train", "validation"): value for name, value in found.items()})
    return meter.means()


def _answer(model: nn.Module, equations: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean loss and, per equation, whether the most likely result is right."""
    logits, result = model(equations[:-1]), equations[-1]
    return F.cross_entropy(logits, result), logits.argmax(-1) == result


RECIPE = Recipe(
    name="grokking",
    presets=PRESETS["grokking"],
    build=build,
    finish=finish,
    length="iterations",
    may_change=("log_every", "save_every", "device", "out", "plot", "stop_at_target", "target"),
    evaluation={"plot": False},
)
