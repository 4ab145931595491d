"""The trainer of the classifier, and its recipe."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from trm_fast.recipes.classify.config import PRESETS, ClassifyConfig
from trm_fast.recipes.classify.data import CheckedLoader, TRMDataModule, checked_batches
from trm_fast.recipes.classify.loss import ClassifyObjective, TRMLoss
from trm_fast.recipes.classify.model import TinyRecursiveModel
from trm_fast.recipes.classify.optimizer import GrokFastOptimizer
from trm_fast.recipes.classify.report import finish, scores_text
from trm_fast.recipes.epoch_report import Scores
from trm_fast.recipes.facade import EpochTrainer
from trm_fast.recipes.recipe import Recipe
from trm_fast.recipes.settings import directory_of
from trm_fast.train import Trainer
from trm_fast.train.batches import to_device
from trm_fast.train.distributed import World
from trm_fast.train.objective import Metrics


class TRMTrainer(EpochTrainer):
    """Trains a ``TinyRecursiveModel`` by epochs, with early stopping, and keeps the best model.

    Args:
        model: the model; it is moved to the device.
        train_loader: training batches (features, targets, ...), with a length; what follows the
            first two tensors is ignored. Features are [batch, input_dim] and finite, targets
            [batch] whole numbers from 0 to output_dim - 1.
        val_loader: validation batches, likewise.
        lr: learning rate of AdamW, >= 0.
        alpha: decay per step of the filter's mean, in [0, 1].
        lambda_: strength of the filter, >= 0.
        weight_decay: of AdamW, decoupled, >= 0.
        T: levels, 1 <= T <= max_depth.
        n: micro-steps per level, >= 1.
        device: where to train; None is a GPU if there is one, else the CPU.
        class_weights: weight of each class in the loss, [output_dim]; None weighs all alike.
        complexity_weight: weight of the penalty for complexity, >= 0.
        filter: as in ``GrokFastOptimizer``.
        grad_clip: largest norm of all gradients together; None does not clip.

    Raises:
        ValueError: a number is out of range.
        TypeError: ``train_loader`` has no length.
    """

    name = "classify"
    percent = ("accuracy", "top3_accuracy")
    only_validated = ("top3_accuracy",)
    model: TinyRecursiveModel
    optimizer: GrokFastOptimizer

    def __init__(
        self,
        model: TinyRecursiveModel,
        train_loader: DataLoader[Any],
        val_loader: DataLoader[Any],
        *,
        lr: float = 1e-3,
        alpha: float = 0.98,
        lambda_: float = 0.1,
        weight_decay: float = 0.01,
        T: int = 3,
        n: int = 6,
        device: str | torch.device | None = None,
        class_weights: Tensor | Sequence[float] | None = None,
        complexity_weight: float = 0.01,
        filter: str | None = "highpass",
        grad_clip: float | None = None,
    ) -> None:
        model.get_complexity(T, n)  # checks both
        batches = CheckedLoader(train_loader, model.output_dim)
        examples = getattr(train_loader, "batch_size", None)
        super().__init__(model, batches, device=device, grad_clip=grad_clip, examples=examples)
        self.criterion = TRMLoss(complexity_weight, class_weights).to(self.device)
        self.criterion.check_classes("TRMTrainer", model.output_dim)
        options: dict[str, Any] = {"lr": lr, "alpha": alpha, "lambda_": lambda_, "filter": filter}
        self.optimizer = GrokFastOptimizer(model.parameters(), weight_decay=weight_decay, **options)
        self.T, self.n = T, n
        self.train_loader, self.val_loader = train_loader, val_loader

    @property
    def stepped(self) -> Optimizer:
        return self.optimizer.inner

    @property
    def hyperparameters(self) -> dict[str, Any]:
        group = self.optimizer.param_groups[0]
        return {
            "T": self.T,
            "n": self.n,
            "lr": float(group["lr"]),
            "alpha": self.optimizer.alpha,
            "lambda": self.optimizer.lambda_,
            "weight_decay": float(group["weight_decay"]),
            "filter": self.optimizer.filter,
            "complexity_weight": self.criterion.complexity_weight,
        }

    def load_hyperparameters(self, values: dict[str, Any]) -> None:
        self.model.get_complexity(values["T"], values["n"])  # checks both
        self.T, self.n = values["T"], values["n"]
        self.criterion.complexity_weight = values["complexity_weight"]

    def objective(self) -> ClassifyObjective:
        return ClassifyObjective(self.model, self.criterion, self.T, self.n)

    def validation(self) -> Iterator[Metrics]:
        objective = self.objective()
        for batch in checked_batches(self.val_loader, self.model.output_dim):
            yield objective.result(self.model, to_device(batch, self.device)).metrics

    def scores(self, means: Scores) -> Scores:
        """Returns "loss", the mean over the samples, and "accuracy" and "top3_accuracy" in percent;
        the latter counts a sample if its class is among the min(3, classes) most likely."""
        return {
            "loss": means["sample_loss"],
            **{name: means[name] for name in ("accuracy", "top3_accuracy")},
        }

    def text(self, scores: Scores) -> str:
        return scores_text(scores)


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
        config.input_dim, config.hidden, config.num_classes, config.max_depth,
        dropout=config.dropout, y_every_step=config.y_every_step, halt=config.halt,
    )  # fmt: skip
    data = TRMDataModule(
        config.num_train, config.num_val, config.batch_size, config.input_dim, config.num_classes,
        config.seed,
    )  # fmt: skip
    facade = TRMTrainer(
        model, data.train_dataloader(), data.val_dataloader(), lr=config.lr, alpha=config.alpha,
        lambda_=config.lam, weight_decay=config.weight_decay, T=config.T, n=config.n,
        device=world.device, complexity_weight=config.complexity_weight,
        filter=None if config.filter == "none" else config.filter, grad_clip=config.grad_clip,
    )  # fmt: skip
    out = directory_of(config.out, f"classify-{config.filter}-seed{config.seed}")
    settings = asdict(replace(config, out=out))
    return facade.trainer(config.epochs, config.patience, out, out=out, settings=settings)


RECIPE = Recipe(
    name="classify",
    presets=PRESETS["classify"],
    build=build,
    finish=finish,
    length="epochs",
    may_change=("patience", "device", "out"),
    percent=TRMTrainer.percent,
)
