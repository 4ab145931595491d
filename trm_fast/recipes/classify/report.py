"""What a run of the classifier keeps of its epochs, and how it shows them."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from trm_fast.train import Progress, Record, Run, Step, Summary, Trainer

Scores = dict[str, float]

BEST = "best_model.pt"

# Seconds between two looks at the running means, for which a GPU is waited for.
_LOOK = 0.25


@dataclass
class History:
    """Scores of the epochs so far; accuracies in percent.

    Args:
        best_val_acc: best validation accuracy, 0 before the first validation.
        best_epoch: when it was reached, from 0; -1 before the first validation.
        train_history, val_history: scores of each epoch that ``fit`` has run.
    """

    best_val_acc: float = 0.0
    best_epoch: int = -1
    train_history: list[Scores] = field(default_factory=list)
    val_history: list[Scores] = field(default_factory=list)

    def add(self, epoch: int, train: Scores, val: Scores) -> bool:
        """Takes the scores of an epoch; returns whether it is the best so far."""
        self.train_history.append(train)
        self.val_history.append(val)
        is_best = self.best_epoch < 0 or val["accuracy"] > self.best_val_acc
        if is_best:
            self.best_val_acc, self.best_epoch = val["accuracy"], epoch
        return is_best


class EpochReport(Progress):
    """Collects the scores of each epoch and prints them: a line per epoch, below it a bar with
    running means on a terminal.

    Args:
        history: takes the scores.
        epochs: number of epochs at which the run ends.
        per_epoch: updates in an epoch.
        on_best: called with an epoch and its validation scores if it is the best so far.
        quiet: whether to print nothing.
    """

    def __init__(
        self,
        history: History,
        epochs: int,
        per_epoch: int,
        on_best: Callable[[int, Scores], None] | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(bar=False if quiet else None)
        self.history, self.epochs, self.per_epoch = history, epochs, per_epoch
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
        if "accuracy" in means:
            self._display.update(self._task, shown=_scores(means["sample_loss"], means["accuracy"]))

    def on_log(self, run: Run, record: Record) -> None:
        self.train = {"loss": record["sample_loss"], "accuracy": record["accuracy"]}

    def on_evaluate(self, run: Run, record: Record) -> None:
        epoch = run.step // self.per_epoch - 1
        val = {name: record[name] for name in ("loss", "accuracy", "top3_accuracy")}
        is_best = self.history.add(epoch, self.train, val)
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        self._line(
            run,
            f"epoch {epoch + 1}/{self.epochs}  train {_scores(**self.train)}  "
            f"validation {_scores(val['loss'], val['accuracy'])}, top-3 "
            f"{val['top3_accuracy']:.1f} %  {seconds:.1f} s{'  (best)' if is_best else ''}",
        )
        if is_best and self.on_best is not None and run.world.is_main:
            self.on_best(epoch, val)

    def on_end(self, run: Run, summary: Summary) -> None:
        super().on_end(run, summary)
        history = self.history
        if run.stop_reason is not None or summary.signal is not None:
            self._line(run, f"stopped early: {summary.reason}")
        if history.best_epoch >= 0:
            self._line(
                run,
                f"best validation accuracy {history.best_val_acc:.2f} % at epoch "
                f"{history.best_epoch + 1}",
            )

    def _line(self, run: Run, line: str) -> None:
        if not self.quiet:
            super()._line(run, line)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.history)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self.history, name, value)


def _scores(loss: float, accuracy: float) -> str:
    return f"loss {loss:.3f}, accuracy {accuracy:.1f} %"


def finish(trainer: Trainer, summary: Summary) -> list[str]:
    """Returns the lines that are shown after a run."""
    lines = [f"{summary.reason}: step {summary.step:,}, {summary.seconds:.1f} s"]
    if summary.skipped:
        lines.append(f"{summary.skipped} steps were skipped: see events.jsonl")
    if trainer.out is not None and summary.best:
        lines.append(f"best model: {trainer.out / BEST}")
    return lines
