"""A recursive classifier on feature vectors, trained through a gradient filter.

    features -> recursion -> logits -> loss -> gradients -> filter -> AdamW

The parts have the names and arguments of the system that the recipe implements, and are made of the
shared ones: ``nn.Recursion`` on ``nn.VectorNet``, which run as the op ``vector_latent_update``;
``GrokFastAdamW``, which filters while it steps; ``train.Trainer``.

The default filter, ``highpass``, is the opposite of GrokFast: it damps nothing and amplifies the
fast part of the gradients. ``filter="ema"`` is the published one. See docs/classify.md.

Example:
    >>> data = TRMDataModule(num_train=800, num_val=200, batch_size=32)
    >>> model = TinyRecursiveModel(input_dim=128, hidden_dim=256, output_dim=10, max_depth=5)
    >>> trainer = TRMTrainer(model, data.train_dataloader(), data.val_dataloader())
    >>> summary = trainer.fit(num_epochs=50, patience=10, checkpoint_dir="checkpoints")
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from trm_fast.data.vectors import SyntheticRecursiveDataset
from trm_fast.recipes._classify_data import TRMDataModule
from trm_fast.recipes._classify_loss import TRMLoss
from trm_fast.recipes._classify_model import Prediction, TinyRecursiveModel
from trm_fast.recipes._classify_optimizer import GrokFastOptimizer
from trm_fast.recipes._classify_trainer import BEST, TRMTrainer
from trm_fast.train import Summary, Trainer
from trm_fast.train.distributed import World

__all__ = [
    "PRESETS",
    "ClassifyConfig",
    "GrokFastOptimizer",
    "Prediction",
    "SyntheticRecursiveDataset",
    "TRMDataModule",
    "TRMLoss",
    "TRMTrainer",
    "TinyRecursiveModel",
    "build",
    "finish",
]

Filter = Literal["highpass", "ema", "ma", "projection", "cosine_gate", "none"]


@dataclass(frozen=True)
class ClassifyConfig:
    """Trains a recursive classifier on feature vectors of a synthetic task.

    Args:
        epochs: epochs after which the run ends at the latest.
        patience: epochs without a better validation accuracy after which it ends.
        lr: learning rate of AdamW.
        alpha: decay per step of the filter's running mean, in [0, 1].
        lam: strength of the filter, >= 0.
        filter: what happens to the gradient before AdamW: highpass adds lam times gradient minus
            running mean (the opposite of GrokFast), ema adds lam times the running mean (GrokFast),
            ma adds lam times the mean of the last 100 gradients, projection adds lam times the part
            along the running mean, per tensor, cosine_gate multiplies a tensor by lam if it points
            along the running mean and divides by it if not, none changes nothing.
        weight_decay: decoupled weight decay of AdamW, >= 0.
        grad_clip: largest norm of all gradients together, or null for no clipping.
        T: levels of the recursion, from 1 to max_depth.
        n: micro-steps per level.
        max_depth: largest T; the complexity is a share of that at this depth.
        hidden: size of the states.
        dropout: share of gelu's outputs that are zeroed in training, 0 <= dropout < 1.
        halt: train a head that says when to halt; used by predict with early_exit only.
        y_every_step: let y follow each update of z, instead of the last of a level.
        complexity_weight: weight of the penalty for complexity, >= 0.
        num_train: training samples.
        num_val: validation samples.
        batch_size: samples per update; the last batch of an epoch may have fewer.
        input_dim: size of the feature vectors.
        num_classes: number of classes.
        seed: seed of the weights, the samples and the order of the batches.
        device: where to train: auto (cuda if there is one, else cpu) or a torch device.
        out: directory of the run; empty means runs/classify-FILTER-seedSEED.

    Raises:
        ValueError: a value is outside its range or not among its choices.
    """

    epochs: int = 50
    patience: int = 10
    lr: float = 1e-3
    alpha: float = 0.98
    lam: float = 0.1
    filter: Filter = "highpass"
    weight_decay: float = 0.01
    grad_clip: float | None = None
    T: int = 3
    n: int = 6
    max_depth: int = 5
    hidden: int = 256
    dropout: float = 0.0
    halt: bool = False
    y_every_step: bool = True
    complexity_weight: float = 0.01
    num_train: int = 800
    num_val: int = 200
    batch_size: int = 32
    input_dim: int = 128
    num_classes: int = 10
    seed: int = 0
    device: str = "auto"
    out: str = ""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience"):
            _require(getattr(self, name) >= 1, f"{name} must be >= 1", getattr(self, name))
        _require(self.seed >= 0, "seed must be >= 0", self.seed)
        choices = get_args(Filter)
        _require(self.filter in choices, f"filter must be one of {', '.join(choices)}", self.filter)


def _require(holds: bool, what: str, value: object) -> None:
    if not holds:
        raise ValueError(f"classify: {what}; got {value!r}")


def build(config: ClassifyConfig) -> Trainer:
    """Builds model, data and trainer; seeds torch's global generator.

    Args:
        config: settings of the run.

    Returns:
        The trainer, which has trained nothing yet. Its run writes the files of a run and
        best_model.pt below ``config.out``.

    Raises:
        ValueError: a setting is out of range, the device cannot be used, or there are several
            processes.
    """
    world = World(config.device)
    if world.size > 1:
        raise ValueError(f"classify: this recipe runs in one process; got {world.size}")
    torch.manual_seed(config.seed)
    model = TinyRecursiveModel(
        config.input_dim,
        config.hidden,
        config.num_classes,
        config.max_depth,
        dropout=config.dropout,
        y_every_step=config.y_every_step,
        halt=config.halt,
    )
    data = TRMDataModule(
        config.num_train,
        config.num_val,
        config.batch_size,
        config.input_dim,
        config.num_classes,
        config.seed,
    )
    facade = TRMTrainer(
        model,
        data.train_dataloader(),
        data.val_dataloader(),
        lr=config.lr,
        alpha=config.alpha,
        lambda_=config.lam,
        weight_decay=config.weight_decay,
        T=config.T,
        n=config.n,
        device=world.device,
        complexity_weight=config.complexity_weight,
        filter=None if config.filter == "none" else config.filter,
        grad_clip=config.grad_clip,
    )
    out = config.out or f"runs/classify-{config.filter}-seed{config.seed}"
    settings = dataclasses.asdict(dataclasses.replace(config, out=out))
    return facade.trainer(config.epochs, config.patience, out, out=out, settings=settings)


def finish(trainer: Trainer, summary: Summary) -> list[str]:
    """Returns the lines that are shown after a run."""
    lines = [f"{summary.reason}: step {summary.step:,}, {summary.seconds:.1f} s"]
    if summary.skipped:
        lines.append(f"{summary.skipped} steps were skipped: see events.jsonl")
    if trainer.out is not None and summary.best:
        lines.append(f"best model: {trainer.out / BEST}")
    return lines


PRESETS = {"classify": {"default": ClassifyConfig()}}
