"""``EpochTrainer``: what the systems' own trainer classes share: epochs, early stopping, the best
model in a ``.pt`` file."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trm_fast._paths import expanded
from trm_fast.nn.evaluating import evaluating
from trm_fast.recipes.epoch_report import EpochReport, History, Scores
from trm_fast.recipes.epoch_state import State, further_state, go_on, with_weights
from trm_fast.recipes.pt_file import check_model, read_pt, write_pt
from trm_fast.train import (
    Callback,
    Curriculum,
    EarlyStopping,
    EpochBatches,
    Objective,
    Trainer,
    TrainerConfig,
)
from trm_fast.train.checkpoints.snapshot import named_as
from trm_fast.train.config import Mode
from trm_fast.train.distributed import World
from trm_fast.train.generators import fork_rng
from trm_fast.train.meter import Meter
from trm_fast.train.objective import Metrics


class EpochTrainer(ABC):
    """Trains a model by epochs, with early stopping, and keeps the best one.

    A subclass makes the optimizer, the objective and the validation, and may override ``config``
    (precision, accumulated batches, average of the weights), ``schedules``, ``callbacks`` and
    ``curriculum``. Everything random in an epoch follows from its number and from torch's seed at
    construction, so that a run that goes on after ``load_checkpoint`` is the uninterrupted one to
    the bit. With a curriculum the batches have their own epochs, and only a run of ``trainer`` with
    ``out`` resumes to the bit.

    Args:
        model: the model; it is moved to the device.
        batches: the training batches, with a length; None with a ``curriculum``.
        device: where to train; None is a GPU if there is one, else the CPU.
        grad_clip: largest norm of all gradients together; None does not clip.
        examples: the largest number of examples in a batch, for reports; None if it is not known.
        per_epoch: batches between two validations, >= 1; None is all of ``batches``. Needed with a
            ``curriculum``, and refused without one.

    Attributes:
        name: of the recipe.
        best_file: where ``fit`` keeps the best model.
        monitor: the score of the validation by which an epoch is best.
        mode: whether its best value is the "max" or the "min".
        best_key: how ``summary`` and ``.pt`` files call that value.
        percent: the scores that are in percent.
        only_validated: the scores that are left out where training batches are described.

    Raises:
        ValueError: ``batches`` and ``per_epoch`` do not fit ``curriculum``, or there is no batch.
    """

    name: str
    best_file = "best_model.pt"
    monitor = "accuracy"
    mode: Mode = "max"
    best_key = "best_val_acc"
    percent: tuple[str, ...] = ()
    only_validated: tuple[str, ...] = ()

    optimizer: Optimizer

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None,
        *,
        device: str | torch.device | None = None,
        grad_clip: float | None = None,
        examples: int | None = None,
        per_epoch: int | None = None,
    ) -> None:
        self.world = World("auto" if device is None else device)
        self.device = self.world.device
        self.model = model.to(self.device)
        self.grad_clip, self.examples = grad_clip, examples
        self.seed = torch.initial_seed()
        if (batches is None) != (per_epoch is not None):
            raise ValueError(
                f"{type(self).__name__}: either batches, or per_epoch and a curriculum, must be "
                f"given; got batches {type(batches).__name__} and per_epoch {per_epoch!r}"
            )
        self.per_epoch: int = len(batches) if per_epoch is None else per_epoch  # type: ignore[arg-type]
        if self.per_epoch < 1:
            raise ValueError(
                f"{type(self).__name__}: batches of an epoch must be at least one; got "
                f"{self.per_epoch!r}"
            )
        self.batches = None if batches is None else EpochBatches(batches, seed=self.seed)
        self.history = History()
        self._trainer_now: Trainer | None = None
        self._own: list[Callback] = []  # what callbacks() has given to it
        self._loaded: State = {}

    def config(self) -> TrainerConfig:
        """Returns precision, accumulated batches, average of the weights and what else is asked
        of the trainer. Steps, intervals, monitor, mode and seed are set by this class."""
        return TrainerConfig(clip_norm=self.grad_clip)

    def schedules(self, optimizers: list[Optimizer]) -> Sequence[Any]:
        """Returns the schedules of the optimizers; each is stepped once per update."""
        return ()

    def callbacks(self) -> Sequence[Callback]:
        """Returns further callbacks; their states go on from one call of ``fit`` or ``train_epoch``
        to the next, and are in ``.pt`` files."""
        return ()

    def curriculum(self) -> Curriculum | None:
        """Returns new stages, or None to train on ``batches``. An epoch is ``per_epoch`` batches
        then, of whichever stage; where a stage ends within it, its training scores are those of the
        batches after that. The run also ends with the last stage."""
        return None

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
        """What a checkpoint says of how its model was trained; "seed" is added to it."""

    @abstractmethod
    def load_hyperparameters(self, values: dict[str, Any]) -> None:
        """Takes over ``hyperparameters`` of a checkpoint.

        Raises:
            ValueError: they do not fit the model.
        """

    @property
    def stepped(self) -> Optimizer:
        """What the trainer steps, which looks for gradients that are not finite itself."""
        return self.optimizer

    @property
    def epoch(self) -> int:
        """Number of epochs that were trained."""
        if self.batches is not None:
            return self.batches.completed
        return self._step // self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Updates of the weights in an epoch."""
        return -(-self.per_epoch // self.config().accumulate)

    @property
    def _step(self) -> int:
        """Updates of the weights so far."""
        if self.batches is not None:
            rest = -(-self.batches.position // self.config().accumulate)
            return self.batches.epoch * self.steps_per_epoch + rest
        if self._trainer_now is not None:
            return self._trainer_now.step
        return int(self._loaded["trainer"]["step"]) if self._loaded else 0

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
        """Returns the scores of the validation batches, means over the samples, with the averaged
        weights if there are any; nothing changes.

        Raises:
            ValueError, TypeError: a batch cannot be used, with the name of the sample, or there is
                none.
        """
        ema = None if self._trainer_now is None else self._trainer_now.ema
        with nullcontext() if ema is None else ema.swapped():
            return self._validated()

    def _validated(self) -> Scores:
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
        best = None if checkpoint_dir is None else expanded(checkpoint_dir) / self.best_file
        report = EpochReport(self, self.history, num_epochs, best)
        return self._trainer(
            num_epochs, [report, self._stopping(patience)], validates=True, out=out,
            settings=settings,
        )  # fmt: skip

    def _stopping(self, patience: int) -> EarlyStopping:
        """Returns early stopping that goes on where the history ends."""
        stopping = EarlyStopping(self.monitor, patience, self.mode)
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
        step, every, state = self._step, self.steps_per_epoch, self._further_state()
        # As the schedules of the new trainer find the options, so they are given back to it.
        state = with_weights(state, self.model, self.stepped)
        config = replace(
            self.config(),
            steps=epochs * every,
            log_every=every,
            evaluate_every=every,
            save_every=every if out else 0,
            monitor=self.monitor if validates else "",
            mode=self.mode,
            seed=self.seed % 2**32,
        )
        self._own = list(self.callbacks())
        trainer = Trainer(
            self.model,
            self.stepped,
            self._source(),
            self.objective(),
            config,
            schedules=self.schedules,
            evaluate=(lambda model: self._validated()) if validates else None,
            callbacks=[*callbacks, *self._own],
            out=out,
            device=self.world,
            name=self.name,
            files=(self.best_file,),
            report={"percent": [*self.percent], "examples": self.examples},
            settings=settings,
        )
        go_on(trainer, state)
        trainer.step = step
        self._trainer_now, self._loaded = trainer, {}
        return trainer

    def _source(self) -> EpochBatches | Curriculum:
        """Returns what is trained on."""
        stages = self.curriculum()
        if (stages is None) != (self.batches is not None):
            raise ValueError(
                f"{type(self).__name__}: curriculum must return stages if batches is None, and "
                f"None otherwise; got {type(stages).__name__}"
            )
        source = stages or self.batches
        assert source is not None
        return source

    def _further_state(self) -> State:
        """Returns what goes on beside weights and optimizer."""
        if self._trainer_now is None:
            return self._loaded
        return further_state(self._trainer_now, self._own, staged=self.batches is None)

    def _run(self, trainer: Trainer) -> None:
        trainer.fit()
        if self.batches is not None:
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
        values = self._values(epoch, metrics)
        if self.world.is_main:
            write_pt(type(self).__name__, expanded(path), values)

    def _values(self, epoch: int, metrics: Scores) -> dict[str, Any]:
        further = self._further_state()
        return {
            "epoch": epoch,
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "metrics": dict(metrics),
            **self._history(),
            "hyperparameters": {**self.hyperparameters, "seed": self.seed},
            **({"further_state": further} if further else {}),
        }

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
        owner = type(self).__name__
        found = read_pt(owner, expanded(path), self._kinds(), self.device)
        seed = found["hyperparameters"].get("seed")
        if not isinstance(seed, int) or found["epoch"] < 0:
            raise ValueError(
                f"{owner}: {path} must be a file of save_checkpoint, with a seed and an epoch >= "
                f"0; got {seed!r} and {found['epoch']}"
            )
        # The model may be compiled now and not then, or the other way round.
        named = named_as(found["model_state_dict"], self.model.state_dict())
        found["model_state_dict"] = named
        check_model(owner, self.model, named)
        before = deepcopy(self._values(self.epoch - 1, {}))
        place = None if self.batches is None else self.batches.state_dict()
        try:
            self._load(found)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            self._load(before)
            if self.batches is not None:
                self.batches.load_state_dict(place)  # type: ignore[arg-type]
            reason = (
                f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            )
            raise ValueError(
                f"{owner}: {path} must be a file of save_checkpoint of the same trainer; got one "
                f"that cannot be loaded ({reason})"
            ) from error
        return found

    def _kinds(self) -> dict[str, type | tuple[type, ...]]:
        number = (int, float)
        return {
            "epoch": int, "model_state_dict": dict, "optimizer_state_dict": dict, "metrics": dict,
            "hyperparameters": dict, self.best_key: number, "best_epoch": int,
            "train_history": list, "val_history": list,
        }  # fmt: skip

    def _load(self, values: dict[str, Any]) -> None:
        self.load_hyperparameters(values["hyperparameters"])
        self.optimizer.load_state_dict(values["optimizer_state_dict"])
        self.model.load_state_dict(values["model_state_dict"])
        names = ("best_epoch", "train_history", "val_history")
        self.history = History(values[self.best_key], *(values[name] for name in names))
        self.seed = values["hyperparameters"]["seed"]
        if self.batches is not None:
            place = {"seed": self.seed, "epoch": values["epoch"] + 1, "position": 0}
            place |= {"length": self.per_epoch, "start": None, "now": None}
            self.batches.load_state_dict(place)
        self._trainer_now, self._loaded = None, values.get("further_state", {})
        if self._loaded:
            self._trainer(self.epoch + 1, [])  # refuses a state that does not fit
