"""The trainer of the classifier: epochs, early stopping and the best model."""

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises; nothing is unpickled here
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trm_fast.nn.evaluating import evaluating
from trm_fast.recipes.classify.config import PRESETS, ClassifyConfig
from trm_fast.recipes.classify.data import CheckedLoader, TRMDataModule, checked_batches
from trm_fast.recipes.classify.loss import ClassifyObjective, TRMLoss
from trm_fast.recipes.classify.model import TinyRecursiveModel
from trm_fast.recipes.classify.optimizer import GrokFastOptimizer
from trm_fast.recipes.classify.report import BEST, EpochReport, History, Scores, finish
from trm_fast.recipes.recipe import Recipe
from trm_fast.train import Callback, EarlyStopping, EpochBatches, Trainer, TrainerConfig, _files
from trm_fast.train._rng import fork_rng
from trm_fast.train.batches import to_device
from trm_fast.train.distributed import World
from trm_fast.train.meter import Meter

PERCENT = ("accuracy", "top3_accuracy")
KEYS = (
    "epoch",
    "model_state_dict",
    "optimizer_state_dict",
    "metrics",
    "best_val_acc",
    "best_epoch",
    "train_history",
    "val_history",
    "hyperparameters",
)


class TRMTrainer:
    """Trains a ``TinyRecursiveModel`` by epochs, with early stopping, and keeps the best model.

    Everything random in an epoch follows from its number and from torch's seed at construction, so
    that a run that goes on after ``load_checkpoint`` is the uninterrupted one to the bit.

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

    Example:
        >>> data = TRMDataModule()
        >>> trainer = TRMTrainer(
        ...     TinyRecursiveModel(), data.train_dataloader(), data.val_dataloader()
        ... )
        >>> summary = trainer.fit(num_epochs=50, patience=10, checkpoint_dir="checkpoints")
    """

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
        self.world = World("auto" if device is None else device)
        self.device = self.world.device
        self.model = model.to(self.device)
        self.criterion = TRMLoss(complexity_weight, class_weights).to(self.device)
        weights = self.criterion.class_weights
        if weights is not None and len(weights) != model.output_dim:
            raise ValueError(
                f"TRMTrainer: class_weights must be {model.output_dim} numbers, one for each "
                f"class; got {len(weights)}"
            )
        self.optimizer = GrokFastOptimizer(
            model.parameters(),
            lr=lr,
            alpha=alpha,
            lambda_=lambda_,
            weight_decay=weight_decay,
            filter=filter,
        )
        self.T, self.n, self.grad_clip = T, n, grad_clip
        self.train_loader, self.val_loader = train_loader, val_loader
        self.seed = torch.initial_seed()
        checked = CheckedLoader(train_loader, model.output_dim)
        self.per_epoch = len(checked)
        self.batches = EpochBatches(checked, seed=self.seed)
        self.history = History()

    @property
    def epoch(self) -> int:
        """Number of epochs that were trained."""
        return self.batches.epoch

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What a checkpoint says of how its model was trained."""
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
            "seed": self.seed,
        }

    def train_epoch(self) -> dict[str, float]:
        """Trains for one epoch, without a line of output.

        Returns:
            "loss", the mean over the samples as they were met, and "accuracy" in percent.

        Raises:
            ValueError, TypeError: a batch cannot be used; the message names the sample.
            NonFiniteError: three updates in a row were skipped, as something was not finite.
        """
        report = EpochReport(History(), self.epoch + 1, self.per_epoch, quiet=True)
        self._run(self._trainer(self.epoch + 1, [report]))
        return report.train

    def validate(self) -> dict[str, float]:
        """Returns "loss", the mean over the validation samples, and "accuracy" and "top3_accuracy"
        in percent; the latter counts a sample if its class is among the min(3, classes) most
        likely.

        Raises:
            ValueError, TypeError: a batch cannot be used, with the name of the sample, or there is
                none.
        """
        objective = ClassifyObjective(self.model, self.criterion, self.T, self.n)
        meter = Meter(self.device)
        # An iterator of a DataLoader draws a seed, even if nothing is shuffled.
        with evaluating(self.model), fork_rng(self.device), torch.no_grad():
            for batch in checked_batches(self.val_loader, self.model.output_dim):
                meter.add(objective.result(self.model, to_device(batch, self.device)).metrics)
        found = meter.means()
        if not found:
            raise ValueError("TRMTrainer: val_loader must give at least one batch; got none")
        return {"loss": found.pop("sample_loss"), **found}

    def fit(
        self,
        num_epochs: int,
        patience: int = 10,
        checkpoint_dir: str | Path | None = None,
    ) -> dict[str, Any]:
        """Trains until there were ``num_epochs`` epochs in all, or validation accuracy has not
        risen for a while; prints a line per epoch, and a bar on a terminal.

        SIGINT and SIGTERM let the step that is under way finish, and end the run.

        Args:
            num_epochs: epochs in all, >= 1, those before ``load_checkpoint`` included.
            patience: epochs without a better validation accuracy after which the run ends, >= 1.
            checkpoint_dir: where the best model is kept, as best_model.pt; None keeps none.

        Returns:
            "best_val_acc" in percent, "best_epoch" from 0, "train_history" and "val_history" with
            the scores of each epoch, and "total_epochs", the number of epochs trained.

        Raises:
            ValueError, TypeError, NonFiniteError: as ``train_epoch`` and ``validate``.
            OSError: the best model cannot be written.
        """
        trainer = self.trainer(num_epochs, patience, checkpoint_dir)
        if self.epoch < num_epochs:
            self._run(trainer)
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """Returns what ``fit`` does."""
        return {**asdict(self.history), "total_epochs": self.epoch}

    def trainer(
        self,
        num_epochs: int,
        patience: int = 10,
        checkpoint_dir: str | Path | None = None,
        *,
        out: str | Path | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Trainer:
        """Returns the ``Trainer`` whose ``fit`` does what ``fit`` here does.

        Args:
            num_epochs, patience, checkpoint_dir: as for ``fit``.
            out: directory for the files of a run, with checkpoints from which it goes on wherever
                it ended, each epoch; None writes none.
            settings: as for ``Trainer``.

        Raises:
            ValueError: ``num_epochs`` or ``patience`` is out of range.
        """
        if isinstance(num_epochs, bool) or not isinstance(num_epochs, int) or num_epochs < 1:
            raise ValueError(
                f"TRMTrainer: num_epochs must be a whole number >= 1; got {num_epochs!r}"
            )
        save = None
        if checkpoint_dir is not None:
            save = partial(self.save_checkpoint, Path(checkpoint_dir) / BEST)
        report = EpochReport(self.history, num_epochs, self.per_epoch, save)
        callbacks = [report, self._stopping(patience)]
        return self._trainer(
            num_epochs,
            callbacks,
            evaluate=lambda model: self.validate(),
            monitor="accuracy",
            out=out,
            settings=settings,
        )

    def _stopping(self, patience: int) -> EarlyStopping:
        """Returns early stopping that goes on where the history ends."""
        stopping = EarlyStopping("accuracy", patience)
        if self.history.best_epoch >= 0:
            stopping.best = self.history.best_val_acc
            stopping.waited = self.epoch - 1 - self.history.best_epoch
        return stopping

    def _trainer(
        self,
        epochs: int,
        callbacks: Sequence[Callback],
        *,
        evaluate: Callable[[nn.Module], Scores] | None = None,
        monitor: str = "",
        out: str | Path | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Trainer:
        """Returns a ``Trainer`` that goes on from here until so many epochs are done."""
        per_epoch = self.per_epoch
        config = TrainerConfig(
            steps=epochs * per_epoch,
            clip_norm=self.grad_clip,
            log_every=per_epoch,
            evaluate_every=per_epoch,
            save_every=per_epoch if out else 0,
            monitor=monitor,
            seed=self.seed % 2**32,
        )
        trainer = Trainer(
            self.model,
            self.optimizer.inner,  # the trainer looks for gradients that are not finite itself
            self.batches,
            ClassifyObjective(self.model, self.criterion, self.T, self.n),
            config,
            evaluate=evaluate,
            callbacks=callbacks,
            out=out,
            device=self.world,
            name="classify",
            files=(BEST,),
            report={
                "percent": [*PERCENT],
                "examples": getattr(self.train_loader, "batch_size", None),
            },
            settings=settings,
        )
        trainer.step = self.epoch * per_epoch + self.batches.position
        return trainer

    def _run(self, trainer: Trainer) -> None:
        try:
            trainer.fit()
        finally:
            for callback in trainer.callbacks:
                if isinstance(callback, EpochReport):
                    callback.close()
        self.batches.close_epoch()

    def save_checkpoint(self, path: str | Path, epoch: int, metrics: Scores) -> None:
        """Writes model, optimizer and history, as tensors and plain values that ``torch.load``
        reads with ``weights_only=True``.

        Args:
            path: the file; after a crash it is as before or complete.
            epoch: number of the last epoch that the model was trained for, from 0.
            metrics: its scores.

        Raises:
            OSError: it cannot be written.
        """
        history = asdict(self.history)
        values = (
            epoch,
            self.model.state_dict(),
            self.optimizer.state_dict(),
            dict(metrics),
            *(history[name] for name in KEYS[4:8]),
            self.hyperparameters,
        )
        buffer = io.BytesIO()
        torch.save(dict(zip(KEYS, values, strict=True)), buffer)
        with _files.explained("TRMTrainer", Path(path)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _files.replace(Path(path), buffer.getvalue())

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Takes over what ``save_checkpoint`` has written, hyperparameters too; ``fit`` goes on
        with the epoch after it.

        Args:
            path: the file.

        Returns:
            What was in it.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not such a file, or of another model; nothing is loaded then.
        """
        found = _read(Path(path), self.device)
        _check_model(self.model, found["model_state_dict"])
        chosen = found["hyperparameters"]
        self.model.get_complexity(chosen["T"], chosen["n"])
        self.optimizer.load_state_dict(found["optimizer_state_dict"])
        self.model.load_state_dict(found["model_state_dict"])
        self.T, self.n = chosen["T"], chosen["n"]
        self.criterion.complexity_weight = chosen["complexity_weight"]
        self.history = History(*(found[name] for name in KEYS[4:8]))
        self.seed = chosen["seed"]
        self.batches = EpochBatches(self.batches.source, seed=self.seed)
        self.batches.epoch = found["epoch"] + 1
        return found


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """Reads a file of ``save_checkpoint``; executes nothing in it."""
    wanted = f"TRMTrainer: {path} must be a file of save_checkpoint"
    with _files.explained("TRMTrainer", path):
        data = path.read_bytes()
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ValueError(f"{wanted}; got something else")
    try:
        found = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except (RuntimeError, EOFError, LookupError, ValueError, UnpicklingError) as error:
        raise ValueError(f"{wanted}; got one that torch.load refuses") from error
    if not isinstance(found, dict) or not found.keys() >= {*KEYS}:
        lacking = ", ".join(sorted({*KEYS} - {*found})) if isinstance(found, dict) else "all keys"
        raise ValueError(f"{wanted}; got one without {lacking}")
    return found


def _check_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    have = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    came = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted({*have, *came}):
        if have.get(name) != came.get(name):
            raise ValueError(
                f"TRMTrainer: a checkpoint must be of the same model, with {name} "
                f"{have.get(name)}; got {came.get(name)}"
            )


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
    settings = asdict(replace(config, out=out))
    return facade.trainer(config.epochs, config.patience, out, out=out, settings=settings)


RECIPE = Recipe(
    name="classify",
    presets=PRESETS["classify"],
    build=build,
    finish=finish,
    length="epochs",
    may_change=("patience", "device", "out"),
    percent=PERCENT,
)
