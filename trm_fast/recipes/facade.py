"""``EpochTrainer``: what the systems' own trainer classes share: epochs, early stopping, the best
model in a ``.pt`` file."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trm_fast.nn.evaluating import evaluating
from trm_fast.recipes.epoch_report import EpochReport, History, Scores
from trm_fast.recipes.pt_file import check_model, read_pt, write_pt
from trm_fast.train import Callback, EarlyStopping, EpochBatches, Objective, Trainer, TrainerConfig
from trm_fast.train.distributed import World
from trm_fast.train.generators import fork_rng
from trm_fast.train.meter import Meter
from trm_fast.train.objective import Metrics


class EpochTrainer(ABC):
    """Trains a model by epochs, with early stopping, and keeps the best one.

    A subclass makes the optimizer, the objective and the validation. Everything random in an epoch
    follows from its number and from torch's seed at construction, so that a run that goes on after
    ``load_checkpoint`` is the uninterrupted one to the bit.

    Args:
        model: the model; it is moved to the device.
        batches: the training batches, with a length.
        device: where to train; None is a GPU if there is one, else the CPU.
        grad_clip: largest norm of all gradients together; None does not clip.
        examples: the largest number of examples in a batch, for reports; None if it is not known.

    Attributes:
        name: of the recipe.
        best_file: where ``fit`` keeps the best model.
        monitor: the score of the validation whose largest value is best.
        best_key: how ``summary`` and ``.pt`` files call that value.
        percent: the scores that are in percent.
        only_validated: the scores that are left out where training batches are described.
    """

    name: str
    best_file = "best_model.pt"
    monitor = "accuracy"
    best_key = "best_val_acc"
    percent: tuple[str, ...] = ()
    only_validated: tuple[str, ...] = ()

    optimizer: Optimizer

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        device: str | torch.device | None = None,
        grad_clip: float | None = None,
        examples: int | None = None,
    ) -> None:
        self.world = World("auto" if device is None else device)
        self.device = self.world.device
        self.model = model.to(self.device)
        self.grad_clip, self.examples = grad_clip, examples
        self.seed = torch.initial_seed()
        self.per_epoch = len(batches)  # type: ignore[arg-type]
        self.batches = EpochBatches(batches, seed=self.seed)
        self.history = History()

    @abstractmethod
    def objective(self) -> Objective:
        """Returns what a step computes."""

    @abstractmethod
    def validation(self) -> Iterator[Metrics]:
        """Yields the metrics of each validation batch."""

    @abstractmethod
    def scores(self, means: Scores) -> Scores:
        """Returns the scores, "loss" and ``monitor`` among them, of the means of metrics."""

    @abstractmethod
    def text(self, scores: Scores) -> str:
        """Returns scores as they are shown."""

    @property
    @abstractmethod
    def hyperparameters(self) -> dict[str, Any]:
        """What a checkpoint says of how its model was trained, "seed" among it."""

    @abstractmethod
    def load_hyperparameters(self, values: dict[str, Any]) -> None:
        """Takes over ``hyperparameters`` of a checkpoint.

        Raises:
            ValueError: they do not fit the model; nothing has changed then.
        """

    @property
    def stepped(self) -> Optimizer:
        """What the trainer steps, which looks for gradients that are not finite itself."""
        return self.optimizer

    @property
    def epoch(self) -> int:
        """Number of epochs that were trained."""
        return self.batches.completed

    def train_epoch(self) -> Scores:
        """Trains for one epoch, without a line of output.

        Returns:
            The scores, means over the samples as they were met.

        Raises:
            ValueError, TypeError: a batch cannot be used; the message names the sample.
            NonFiniteError: three updates in a row were skipped, as something was not finite.
        """
        report = EpochReport(self, History(), self.epoch + 1, quiet=True)
        self._run(self._trainer(self.epoch + 1, [report]))
        return report.train

    def validate(self) -> Scores:
        """Returns the scores of the validation batches, means over the samples; nothing changes.

        Raises:
            ValueError, TypeError: a batch cannot be used, with the name of the sample, or there is
                none.
        """
        meter = Meter(self.device)
        # An iterator of a DataLoader draws a seed, even if nothing is shuffled.
        with evaluating(self.model), fork_rng(self.device), torch.no_grad():
            for metrics in self.validation():
                meter.add(metrics)
        means = meter.means()
        if not means:
            raise ValueError(
                f"{type(self).__name__}: val_loader must give at least one batch; got none"
            )
        return self.scores(means)

    def train_scores(self, means: Scores) -> Scores:
        """Returns the scores of training batches, of the means of their metrics."""
        found = self.scores(means)
        return {name: found[name] for name in found if name not in self.only_validated}

    def fit(
        self, num_epochs: int, patience: int = 10, checkpoint_dir: str | Path | None = None
    ) -> dict[str, Any]:
        """Trains until there were ``num_epochs`` epochs in all, or the score of the validation has
        not risen for a while; prints a line per epoch, and a bar on a terminal.

        SIGINT and SIGTERM let the step that is under way finish, and end the run.

        Args:
            num_epochs: epochs in all, >= 1, those before ``load_checkpoint`` included.
            patience: epochs without a better score after which the run ends, >= 1.
            checkpoint_dir: where the best model is kept, as ``best_file``; None keeps none.

        Returns:
            The best score under ``best_key``, "best_epoch" from 0, "train_history" and
            "val_history" with the scores of each epoch, and "total_epochs", the number trained.

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
        return {**self._history(), "total_epochs": self.epoch}

    def _history(self) -> dict[str, Any]:
        values = asdict(self.history)
        return {self.best_key: values.pop("best"), **values}

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
                f"{type(self).__name__}: num_epochs must be a whole number >= 1; got {num_epochs!r}"
            )
        save = None
        if checkpoint_dir is not None:
            save = partial(self.save_checkpoint, Path(checkpoint_dir) / self.best_file)
        report = EpochReport(self, self.history, num_epochs, save)
        return self._trainer(
            num_epochs, [report, self._stopping(patience)], validates=True, out=out,
            settings=settings,
        )  # fmt: skip

    def _stopping(self, patience: int) -> EarlyStopping:
        """Returns early stopping that goes on where the history ends."""
        stopping = EarlyStopping(self.monitor, patience)
        if self.history.best_epoch >= 0:
            stopping.best = self.history.best
            stopping.waited = self.epoch - 1 - self.history.best_epoch
        return stopping

    def _trainer(
        self,
        epochs: int,
        callbacks: Sequence[Callback],
        *,
        validates: bool = False,
        out: str | Path | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Trainer:
        """Returns a ``Trainer`` that goes on from here until so many epochs are done."""
        config = TrainerConfig(
            steps=epochs * self.per_epoch,
            clip_norm=self.grad_clip,
            log_every=self.per_epoch,
            evaluate_every=self.per_epoch,
            save_every=self.per_epoch if out else 0,
            monitor=self.monitor if validates else "",
            seed=self.seed % 2**32,
        )
        trainer = Trainer(
            self.model,
            self.stepped,
            self.batches,
            self.objective(),
            config,
            evaluate=(lambda model: self.validate()) if validates else None,
            callbacks=callbacks,
            out=out,
            device=self.world,
            name=self.name,
            files=(self.best_file,),
            report={"percent": [*self.percent], "examples": self.examples},
            settings=settings,
        )
        trainer.step = self.epoch * self.per_epoch + self.batches.position
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
        values = {
            "epoch": epoch,
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "metrics": dict(metrics),
            **self._history(),
            "hyperparameters": self.hyperparameters,
        }
        write_pt(type(self).__name__, Path(path), values)

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
        keys = (
            "epoch", "model_state_dict", "optimizer_state_dict", "metrics", "hyperparameters",
            *self._history(),
        )  # fmt: skip
        owner = type(self).__name__
        found = read_pt(owner, Path(path), keys, self.device)
        check_model(owner, self.model, found["model_state_dict"])
        # Each of the two refuses what does not fit before it changes anything.
        before = self.hyperparameters
        self.load_hyperparameters(found["hyperparameters"])
        try:
            self.optimizer.load_state_dict(found["optimizer_state_dict"])
        except BaseException:
            self.load_hyperparameters(before)
            raise
        self.model.load_state_dict(found["model_state_dict"])
        names = ("best_epoch", "train_history", "val_history")
        self.history = History(found[self.best_key], *(found[name] for name in names))
        self.seed = found["hyperparameters"]["seed"]
        place = {"seed": self.seed, "epoch": found["epoch"] + 1, "position": 0}
        self.batches.load_state_dict({**place, "length": self.per_epoch, "start": None})
        return found
