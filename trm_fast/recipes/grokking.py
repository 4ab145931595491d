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
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from trm_fast.data.modular import Operation, modular_equations, split_equations
from trm_fast.optim import GrokFastAdamW, MuGrokfast
from trm_fast.optim.groups import split_params
from trm_fast.optim.schedules import warmup_constant
from trm_fast.recipes._grokking_model import Decoder
from trm_fast.recipes._grokking_report import draw_accuracy, first_at, told
from trm_fast.train import (
    Callback,
    Progress,
    StepResult,
    StopAtTarget,
    Summary,
    Trainer,
    TrainerConfig,
)
from trm_fast.train.callbacks import Record
from trm_fast.train.distributed import World
from trm_fast.train.meter import Meter
from trm_fast.train.report import FILES as REPORT_FILES

Inner = Literal["adam", "adamw", "muon"]
Filter = Literal["ema", "ma", "highpass", "projection", "cosine_gate", "none"]


@dataclass(frozen=True)
class GrokkingConfig:
    """Settings of one run; the defaults are the published Grokfast row.

    Args:
        prime: modulus of the equations, a prime number.
        operation: what is learned: x*y, x/y, x+y or x-y, modulo the prime.
        optimizer: adam adds the weight decay to the gradient (L2), adamw shrinks the weights by it,
            muon orthogonalises the update of the matrices in the layers and leaves embeddings,
            head, norms and biases to adamw.
        filter: what happens to the gradient before the optimizer: ema adds lamb times its running
            mean (GrokFast), ma adds lamb times the mean of the last window gradients (GrokFast-MA),
            highpass adds lamb times gradient minus running mean (the opposite), projection adds
            lamb times the part along the running mean, per tensor, cosine_gate multiplies a tensor
            by lamb if it points along the running mean and divides by it if not, none changes
            nothing.
        alpha: decay of the running mean per iteration, in [0, 1].
        lamb: weight of what the filter adds, >= 0, no unit; unused without a filter.
        window: gradients that ma averages, >= 1; until there are so many, none is changed.
        lr: learning rate after the warm-up; with muon that of embeddings, head, norms and biases.
        muon_lr: learning rate of the matrices that muon updates; it scales their updates to the
            size that adamw's usually have, so the two rates compare.
        betas: decay of the two Adam moments per iteration, each in [0, 1).
        weight_decay: strength of the weight decay, >= 0.
        warmup: iterations over which lr rises linearly from 0; the first one has lr 0.
        batch: equations per iteration; the last batch of an epoch is smaller.
        seed: seed of the initial weights, the split and the batches.
        iterations: number of weight updates after which the run ends at the latest.
        target: validation accuracy to be reached, in [0, 1].
        stop_at_target: end the run at the first evaluation that reaches the target.
        device: where to train: auto (cuda if there is one, else cpu) or a torch device.
        log_every: iterations between two lines of progress when the output is not a terminal.
        save_every: epochs between two checkpoints.
        plot: draw accuracy.png; needs matplotlib.
        out: directory of the run; empty means runs/grokking-OPTIMIZER-FILTER-seedSEED.

    Raises:
        ValueError: a value is outside its range or not among its choices.
    """

    prime: int = 97
    operation: Operation = "x*y"
    optimizer: Inner = "adam"
    filter: Filter = "ema"
    alpha: float = 0.98
    lamb: float = 2.0
    window: int = 100
    lr: float = 1e-3
    muon_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.005
    warmup: int = 10
    batch: int = 512
    seed: int = 0
    iterations: int = 300_000
    target: float = 0.95
    stop_at_target: bool = True
    device: str = "auto"
    log_every: int = 100
    save_every: int = 10
    plot: bool = True
    out: str = ""

    def __post_init__(self) -> None:
        for name in ("warmup", "seed"):
            _require(getattr(self, name) >= 0, f"{name} must be >= 0", getattr(self, name))
        for name in ("window", "batch", "iterations", "log_every", "save_every"):
            _require(getattr(self, name) >= 1, f"{name} must be >= 1", getattr(self, name))
        _require(0 <= self.target <= 1, "target must be in [0, 1]", self.target)
        for name, choices in (("optimizer", get_args(Inner)), ("filter", get_args(Filter))):
            value = getattr(self, name)
            _require(value in choices, f"{name} must be one of {', '.join(choices)}", value)


def _require(holds: bool, what: str, value: object) -> None:
    if not holds:
        raise ValueError(f"grokking: {what}; got {value!r}")


@dataclass(frozen=True)
class Evaluation:
    """State of the run after one epoch.

    Args:
        iteration: weight updates so far.
        seconds: wall time since training began, evaluations included.
        train_accuracy: share of right answers in the epoch, each taken before its update.
        validation_accuracy: share of right answers on the validation half, after the epoch.
        train_loss: mean cross entropy in the epoch, in nats per equation.
        validation_loss: mean cross entropy on the validation half, in nats per equation.
    """

    iteration: int
    seconds: float
    train_accuracy: float
    validation_accuracy: float
    train_loss: float
    validation_loss: float


class EpochBatches:
    """Equations in batches, without end; each epoch permutes the order of the last one.

    Args:
        equations: tokens [5, count].
        size: equations per batch; the last batch of an epoch is smaller.
        generator: draws the permutations; advanced.
    """

    def __init__(self, equations: Tensor, size: int, generator: torch.Generator) -> None:
        self.equations = equations
        self.size = size
        self.generator = generator
        self.order = torch.arange(equations.shape[1])
        self.position = self.per_epoch

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-self.equations.shape[1] // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            if self.position == self.per_epoch:
                permutation = torch.randperm(len(self.order), generator=self.generator)
                self.order, self.position = self.order[permutation], 0
            batches = self.equations[:, self.order.to(self.equations.device)]
            for batch in batches.split(self.size, dim=1)[self.position :]:
                self.position += 1
                yield batch

    def describe(self) -> str:
        """Names the last batch."""
        return f"batch {self.position} of {self.per_epoch} of an epoch"

    def state_dict(self) -> dict[str, Any]:
        """Returns order, place in it, and the state of the generator."""
        return {
            "order": self.order,
            "position": self.position,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the place of a ``state_dict``."""
        self.order, self.position = state["order"], state["position"]
        self.generator.set_state(state["generator"])


class Picture(Callback):
    """Draws accuracy.png when the run ends, also when it is interrupted."""

    def __init__(self, config: GrokkingConfig) -> None:
        # A missing matplotlib has to show now, not after the training.
        importlib.import_module("matplotlib.figure")
        self.config = config

    def on_end(self, trainer: Trainer, summary: Summary) -> None:
        history = evaluations(trainer.history)
        if history and trainer.out is not None and trainer.world.is_main:
            draw_accuracy(trainer.out / "accuracy.png", history, self.config)


def build(config: GrokkingConfig) -> Trainer:
    """Makes data, model, optimizer and the trainer of a run; nothing is written yet.

    Raises:
        ValueError: the prime, the operation, the device or an optimizer setting cannot be used.
        ModuleNotFoundError: matplotlib is to draw and not installed.
    """
    name = f"grokking-{config.optimizer}-{config.filter}-seed{config.seed}"
    out = config.out or str(Path("runs") / name)
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
    model, train, validation, generator = _data(config, world.device)
    batches = EpochBatches(train, config.batch, generator)
    target = StopAtTarget("validation_accuracy", config.target)
    return Trainer(
        model,
        _optimizer(model, config),
        batches,
        _objective,
        TrainerConfig(
            steps=config.iterations,
            log_every=batches.per_epoch,
            evaluate_every=batches.per_epoch,
            save_every=config.save_every * batches.per_epoch,
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
    )


def _data(
    config: GrokkingConfig, device: torch.device
) -> tuple[Decoder, Tensor, Tensor, torch.Generator]:
    """Builds the model, both halves of the data and the generator that shuffles the batches."""
    equations = modular_equations(config.prime, config.operation)
    generator = torch.Generator()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # not those of GPUs
        model = Decoder(config.prime + 2)
        # The published code draws weights, split and batches from one stream, in this order.
        generator.set_state(torch.get_rng_state())
    train, validation = split_equations(equations, generator)
    return model.to(device), train.to(device), validation.to(device), generator


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


def evaluations(history: Sequence[Record]) -> list[Evaluation]:
    """Joins the records of training and evaluation of each epoch."""
    steps: dict[int, Record] = {}
    for record in history:
        steps.setdefault(record["step"], {}).update(record)
    names = [field.name for field in dataclasses.fields(Evaluation)]
    return [
        Evaluation(**{name: {**found, "iteration": step}[name] for name in names})
        for step, found in steps.items()
        if "validation_loss" in found
    ]


def finish(trainer: Trainer, summary: Summary) -> list[str]:
    """Returns the lines that are shown after a run."""
    config = GrokkingConfig(**trainer.settings)
    history = evaluations(trainer.history)
    reached = first_at(history, config.target)
    lines = [told(history, reached, config.target)]
    if trainer.out is not None and config.plot:
        lines.append(f"picture: {trainer.out / 'accuracy.png'}")
    return lines


PRESETS = {"grokking": {"official": GrokkingConfig()}}
