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
import json
import math
import time
from collections.abc import Iterator
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
from trm_fast.recipes._grokking_model import Decoder
from trm_fast.recipes._grokking_report import draw_accuracy, progress, summary

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
        plot: draw accuracy.png; needs matplotlib.
        out: directory of the run; empty means runs/grokking-OPTIMIZER-FILTER-seedSEED.
        overwrite: replace the run that is in the directory instead of refusing to start.

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
    plot: bool = True
    out: str = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("warmup", "seed"):
            _require(getattr(self, name) >= 0, f"{name} must be >= 0", getattr(self, name))
        for name in ("window", "batch", "iterations", "log_every"):
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
    """State of the run after one epoch; one line of metrics.jsonl.

    Args:
        iteration: weight updates so far.
        epoch: epochs so far.
        seconds: wall time since training began, evaluations included.
        train_accuracy: share of right answers in the epoch, each taken before its update.
        validation_accuracy: share of right answers on the validation half, after the epoch.
        train_loss: mean cross entropy in the epoch, in nats per equation.
        validation_loss: mean cross entropy on the validation half, in nats per equation.
    """

    iteration: int
    epoch: int
    seconds: float
    train_accuracy: float
    validation_accuracy: float
    train_loss: float
    validation_loss: float


@dataclass(frozen=True)
class GrokkingResult:
    """What a run found.

    Args:
        reached: the first evaluation at or above the target, or None.
        last: the last evaluation.
        out: directory of the run with config.json and metrics.jsonl.
        picture: the drawn accuracies, or None.
    """

    reached: Evaluation | None
    last: Evaluation
    out: Path
    picture: Path | None


def train_grokking(config: GrokkingConfig) -> GrokkingResult:
    """Runs the experiment and writes config.json, metrics.jsonl and accuracy.png below ``out``.

    Shows accuracies while it runs: as bars on a terminal (needs rich), else as lines. The random
    state of the process is left as it was.

    Args:
        config: settings of the run.

    Returns:
        When the target was reached, the last evaluation, and where the files are.

    Raises:
        ValueError: the prime, the operation, the device or an optimizer setting cannot be used.
        FileExistsError: ``out`` is not empty and ``overwrite`` is off.
        FloatingPointError: the loss is not finite any more.
        ModuleNotFoundError: matplotlib, or rich on a terminal, is not installed.
    """
    if config.plot:
        # A missing matplotlib has to show now, not after the training.
        importlib.import_module("matplotlib.figure")
    config = _resolved(config)
    model, train, validation, generator = _build(config)
    optimizer = _optimizer(model, config)
    out = _start_run(config)
    print(
        f"{config.operation} mod {config.prime}: {train.shape[1]:,} equations to train on, "
        f"{validation.shape[1]:,} to validate; {_count(model):,} parameters on {config.device}"
    )
    history: list[Evaluation] = []
    reached = None
    picture = out / "accuracy.png" if config.plot else None
    try:
        with (out / "metrics.jsonl").open("w") as metrics, progress(config) as show:
            for evaluation in _epochs(model, optimizer, train, validation, generator, config):
                history.append(evaluation)
                metrics.write(json.dumps(dataclasses.asdict(evaluation)) + "\n")
                metrics.flush()
                show(evaluation)
                if reached is None and evaluation.validation_accuracy >= config.target:
                    reached = evaluation
                if reached is not None and config.stop_at_target:
                    break
    finally:
        # Also after Ctrl-C: what is known so far is worth a picture.
        if picture is not None and history:
            draw_accuracy(picture, history, reached, config)
    result = GrokkingResult(reached, history[-1], out, picture)
    print(summary(result, config))
    return result


def grokking_epochs(config: GrokkingConfig) -> Iterator[Evaluation]:
    """Trains without writing or showing anything; yields one evaluation per epoch.

    The model is built by the call, the epochs are trained as they are asked for, also past the
    target. ``out``, ``overwrite``, ``plot`` and ``log_every`` mean nothing here.

    Args:
        config: settings of the run.

    Returns:
        The evaluations, until the iterations are used up.

    Raises:
        ValueError: the prime, the operation, the device or an optimizer setting cannot be used.
        FloatingPointError: the loss is not finite any more.
    """
    config = _resolved(config)
    model, train, validation, generator = _build(config)
    return _epochs(model, _optimizer(model, config), train, validation, generator, config)


def _resolved(config: GrokkingConfig) -> GrokkingConfig:
    """Replaces the values that stand for a choice by what was chosen."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch says in words and exception types that differ by device why it cannot be used.
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"grokking: device must be auto or one torch can use; got {device!r} ({reason})"
        ) from error
    name = f"grokking-{config.optimizer}-{config.filter}-seed{config.seed}"
    return dataclasses.replace(config, device=device, out=config.out or str(Path("runs") / name))


def _start_run(config: GrokkingConfig) -> Path:
    """Makes the directory of the run and writes its config.json."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not config.overwrite:
        raise FileExistsError(
            f"grokking: out must be a new or empty directory; got {out}, which holds files. "
            "Choose another out, or set overwrite to true"
        )
    for name in ("metrics.jsonl", "accuracy.png"):
        (out / name).unlink(missing_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    return out


def _build(config: GrokkingConfig) -> tuple[Decoder, Tensor, Tensor, torch.Generator]:
    """Builds the model, both halves of the data and the generator that shuffles the batches."""
    equations = modular_equations(config.prime, config.operation)
    generator = torch.Generator()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # not those of GPUs
        model = Decoder(config.prime + 2)
        # The published code draws weights, split and batches from one stream, in this order.
        generator.set_state(torch.get_rng_state())
    train, validation = split_equations(equations, generator)
    device = config.device
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


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _epochs(
    model: Decoder,
    optimizer: Optimizer,
    train: Tensor,
    validation: Tensor,
    generator: torch.Generator,
    config: GrokkingConfig,
) -> Iterator[Evaluation]:
    """Trains epoch by epoch until the iterations are used up; yields one evaluation per epoch."""
    warmup = max(config.warmup, 1)
    schedule = LambdaLR(
        optimizer, lambda update: min(1.0, update / warmup) if config.warmup else 1.0
    )
    start = time.perf_counter()
    iteration = epoch = 0
    while iteration < config.iterations:
        # Each order permutes the previous one, as published.
        order = torch.randperm(train.shape[1], generator=generator)
        train = train[:, order.to(train.device)]
        batches = train.split(config.batch, dim=1)[: config.iterations - iteration]
        train_loss, train_accuracy = _train(model, optimizer, schedule, batches)
        iteration += len(batches)
        epoch += 1
        if not math.isfinite(train_loss):
            raise FloatingPointError(
                f"grokking: the training loss must stay finite; got {train_loss} in the "
                f"{len(batches)} iterations up to {iteration}. A smaller lr may help"
            )
        validation_loss, validation_accuracy = _validate(model, validation, config.batch)
        yield Evaluation(
            iteration=iteration,
            epoch=epoch,
            seconds=round(time.perf_counter() - start, 3),
            train_accuracy=train_accuracy,
            validation_accuracy=validation_accuracy,
            train_loss=train_loss,
            validation_loss=validation_loss,
        )


def _train(
    model: Decoder,
    optimizer: Optimizer,
    schedule: LambdaLR,
    batches: tuple[Tensor, ...],
) -> tuple[float, float]:
    """Updates the weights once per batch; returns mean loss and accuracy before the updates."""
    scores = []
    for batch in batches:
        loss, right = _answer(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        scores.append(_score(loss, right))
    return _mean(scores, batches)


@torch.no_grad()
def _validate(model: Decoder, equations: Tensor, batch: int) -> tuple[float, float]:
    batches = equations.split(batch, dim=1)
    return _mean([_score(*_answer(model, part)) for part in batches], batches)


def _answer(model: Decoder, equations: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean loss and, per equation, whether the most likely result is right."""
    logits, result = model(equations[:-1]), equations[-1]
    return F.cross_entropy(logits, result), logits.argmax(-1) == result


def _score(loss: Tensor, right: Tensor) -> Tensor:
    return torch.stack([loss.detach(), right.float().mean()])


def _mean(scores: list[Tensor], batches: tuple[Tensor, ...]) -> tuple[float, float]:
    """Averages scores over equations; the only transfer from the device in a pass over them."""
    sizes = torch.tensor([batch.shape[1] for batch in batches], dtype=torch.float64)
    loss, accuracy = (sizes @ torch.stack(scores).cpu().double() / sizes.sum()).tolist()
    return loss, accuracy
