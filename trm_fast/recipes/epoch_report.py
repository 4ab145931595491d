"""What a run by epochs keeps of them, and how it shows them."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from trm_fast.train import Progress, Record, Run, Step, Summary

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

    def add(self, epoch: int, train: Scores, val: Scores, monitor: str) -> bool:
        """Takes the scores of an epoch; returns whether it is the best so far."""
        self.train_history.append(train)
        self.val_history.append(val)
        is_best = self.best_epoch < 0 or val[monitor] > self.best
        if is_best:
            self.best, self.best_epoch = val[monitor], epoch
        return is_best


class Shown(Protocol):
    """What the report asks of an ``EpochTrainer``."""

    monitor: str
    percent: tuple[str, ...]
    per_epoch: int

    def train_scores(self, means: Scores) -> Scores: ...

    def text(self, scores: Scores) -> str: ...


class EpochReport(Progress):
    """Collects the scores of each epoch and prints them: a line per epoch, below it a bar with
    running means on a terminal.

    Args:
        shown: says which scores there are, and how they are written.
        history: takes the scores.
        epochs: number of epochs at which the run ends.
        on_best: called with an epoch and its validation scores if it is the best so far.
        quiet: whether to print nothing.
    """

    def __init__(
        self,
        shown: Shown,
        history: History,
        epochs: int,
        on_best: Callable[[int, Scores], None] | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(bar=False if quiet else None)
        self.trainer, self.history, self.epochs = shown, history, epochs
        self.on_best, self.quiet = on_best, quiet
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
        epoch = run.step // self.trainer.per_epoch - 1
        val = {name: record[name] for name in run.metrics}
        is_best = self.history.add(epoch, self.train, val, self.trainer.monitor)
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        self._line(
            run,
            f"epoch {epoch + 1}/{self.epochs}  train {self.trainer.text(self.train)}  "
            f"validation {self.trainer.text(val)}  {seconds:.1f} s{'  (best)' if is_best else ''}",
        )
        if is_best and self.on_best is not None and run.world.is_main:
            self.on_best(epoch, val)

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
