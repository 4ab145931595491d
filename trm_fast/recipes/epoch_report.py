"""What a run by epochs keeps of them, and how it shows them."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trm_fast.train import Progress, Record, Run, Step, Summary, Trainer
from trm_fast.train.callbacks import is_better
from trm_fast.train.config import Mode

Scores = dict[str, float]

# Seconds between two looks at the running means, for which a GPU is waited for.
_LOOK = 0.25


@dataclass
class History:
    """Scores of the epochs so far.

    Args:
        best: best score of the validation, 0 before the first one.
        best_epoch: when it was reached, from 0; -1 before the first validation.
        train_history, val_history: scores of each epoch.
    """

    best: float = 0.0
    best_epoch: int = -1
    train_history: list[Scores] = field(default_factory=list)
    val_history: list[Scores] = field(default_factory=list)

    def add(self, epoch: int, train: Scores, val: Scores, monitor: str, mode: Mode) -> bool:
        """Takes the scores of an epoch; returns whether it is the best so far."""
        self.train_history.append(train)
        self.val_history.append(val)
        is_best = self.best_epoch < 0 or is_better(val[monitor], self.best, mode)
        if is_best:
            self.best, self.best_epoch = val[monitor], epoch
        return is_best


class Shown(Protocol):
    """What the report asks of an ``EpochTrainer``."""

    monitor: str
    mode: Mode
    percent: tuple[str, ...]

    @property
    def steps_per_epoch(self) -> int: ...

    def save_checkpoint(self, path: Path, epoch: int, metrics: Scores) -> None: ...

    def train_scores(self, means: Scores) -> Scores: ...

    def text(self, scores: Scores) -> str: ...


class EpochReport(Progress):
    """Collects the scores of each epoch and prints them: a line per epoch, below it a bar with
    running means on a terminal.

    Args:
        shown: says which scores there are, and how they are written.
        history: takes the scores.
        epochs: number of epochs at which the run ends.
        best_model: the file that takes the model of the best epoch, or None.
        quiet: whether to print nothing.
    """

    def __init__(
        self,
        shown: Shown,
        history: History,
        epochs: int,
        best_model: Path | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(bar=False if quiet else None)
        self.trainer, self.history, self.epochs = shown, history, epochs
        self.best_model, self.quiet = best_model, quiet
        self.train: Scores = {}
        self._looked = self._began = time.perf_counter()

    def on_step(self, run: Run, step: Step) -> None:
        super().on_step(run, step)
        now = time.perf_counter()
        if self._display is None or now - self._looked < _LOOK:
            return
        self._looked = now
        means = run.meter.means()
        if means:
            self._display.update(
                self._task, shown=self.trainer.text(self.trainer.train_scores(means))
            )

    def on_log(self, run: Run, record: Record) -> None:
        self.train = self.trainer.train_scores(record)

    def on_evaluate(self, run: Run, record: Record) -> None:
        epochs, rest = divmod(run.step, self.trainer.steps_per_epoch)
        if rest:
            return  # of the end of a stage within an epoch
        epoch = epochs - 1
        val = {name: record[name] for name in run.metrics}
        is_best = self.history.add(epoch, self.train, val, self.trainer.monitor, self.trainer.mode)
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        self._line(
            run,
            f"epoch {epoch + 1}/{self.epochs}  train {self.trainer.text(self.train)}  "
            f"validation {self.trainer.text(val)}  {seconds:.1f} s{'  (best)' if is_best else ''}",
        )
        if is_best and self.best_model is not None:
            self.trainer.save_checkpoint(self.best_model, epoch, val)

    def on_end(self, run: Run, summary: Summary) -> None:
        super().on_end(run, summary)
        if run.stop_reason is not None or summary.signal is not None:
            self._line(run, f"stopped early: {summary.reason}")
        if self.history.best_epoch >= 0:
            best, name = self.history.best, self.trainer.monitor
            value = f"{best:.2f} %" if name in self.trainer.percent else f"{best:.4g}"
            self._line(
                run, f"best validation {name} {value} at epoch {self.history.best_epoch + 1}"
            )

    def _line(self, run: Run, line: str) -> None:
        if not self.quiet:
            super()._line(run, line)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.history)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self.history, name, value)


def best_model_of(trainer: Trainer) -> Path | None:
    """Returns the file with the model of the best epoch of a run, or None if none was kept."""
    reports = [each for each in trainer.callbacks if isinstance(each, EpochReport)]
    paths = [each.best_model for each in reports if each.history.best_epoch >= 0]
    return paths[0] if paths else None
