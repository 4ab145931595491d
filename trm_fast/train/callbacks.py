"""Callbacks: what happens beside a run, with a state that is saved and comes back."""

import math
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from trm_fast.train.config import Summary
    from trm_fast.train.trainer import Trainer

Record = dict[str, Any]
Mode = Literal["max", "min"]


class Callback:
    """Is called by a ``Trainer`` in every process; override what is needed. ``state_dict`` goes
    into checkpoints, under the class's name."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step, after a resume."""

    def on_step(self, trainer: "Trainer") -> None:
        """After each step; ``trainer.step`` counts it already."""

    def on_log(self, trainer: "Trainer", record: Record) -> None:
        """After an interval, with its record of metrics.jsonl."""

    def on_evaluate(self, trainer: "Trainer", record: Record) -> None:
        """After an evaluation, with its record of metrics.jsonl."""

    def on_save(self, trainer: "Trainer", path: "Path") -> None:
        """After a checkpoint has been written, in the first process only."""

    def on_event(self, trainer: "Trainer", record: Record) -> None:
        """After something that must not pass in silence, with its record of events.jsonl."""

    def on_end(self, trainer: "Trainer", summary: "Summary") -> None:
        """After the last step and checkpoint, also of a run that was interrupted."""

    def close(self) -> None:
        """After everything else, also if an error has ended the run: gives back what it holds."""

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` returned."""


class EarlyStopping(Callback):
    """Stops when a metric of the evaluation has not become better for a while.

    Args:
        monitor: name of the metric.
        patience: evaluations without a better value after which the run stops, >= 1.
        mode: whether better is "max" or "min".
        min_delta: by how much a value must be better, >= 0, in the unit of the metric.

    Raises:
        ValueError: a setting is out of range; during the run, the metric is unknown.
    """

    def __init__(
        self, monitor: str, patience: int = 10, mode: Mode = "max", min_delta: float = 0.0
    ) -> None:
        if patience < 1:
            raise ValueError(f"EarlyStopping: patience must be >= 1; got {patience!r}")
        if mode not in ("max", "min"):
            raise ValueError(f"EarlyStopping: mode must be 'max' or 'min'; got {mode!r}")
        if not min_delta >= 0:
            raise ValueError(f"EarlyStopping: min_delta must be >= 0; got {min_delta!r}")
        self.monitor, self.patience, self.mode = monitor, patience, mode
        self.min_delta = min_delta
        self.best: float | None = None
        self.waited = 0

    def on_start(self, trainer: "Trainer") -> None:
        self._judge(trainer)

    def on_evaluate(self, trainer: "Trainer", record: Record) -> None:
        value = metric(record, self.monitor, "EarlyStopping: monitor")
        if self.best is None or is_better(value, self.best, self.mode, self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        self._judge(trainer)

    def _judge(self, trainer: "Trainer") -> None:
        if self.waited >= self.patience:
            trainer.stop(
                f"{self.monitor} has not become better than {self.best:.6g} "
                f"in {self.waited} evaluations"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


class StopAtTarget(Callback):
    """Stops when a metric of the evaluation reaches a value.

    Args:
        monitor: name of the metric.
        target: the value.
        mode: whether the metric is to rise ("max") or to fall ("min") to it.
    """

    def __init__(self, monitor: str, target: float, mode: Mode = "max") -> None:
        self.monitor, self.target, self.mode = monitor, target, mode

    def on_start(self, trainer: "Trainer") -> None:
        # A run that had reached it has, unless the target is another one now.
        if trainer.evaluated_at == trainer.step and trainer.metrics:
            self.on_evaluate(trainer, trainer.metrics)

    def on_evaluate(self, trainer: "Trainer", record: Record) -> None:
        value = metric(record, self.monitor, "StopAtTarget: monitor")
        if value >= self.target if self.mode == "max" else value <= self.target:
            trainer.stop(f"{self.monitor} {value:.6g} has reached {self.target:.6g}")


def metric(record: Record, name: str, owner: str) -> float:
    """Returns a metric of a record.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in record:
        known = sorted({*record} - {"kind", "step", "seconds"})
        raise ValueError(
            f"{owner} must be a metric of the evaluation; got {name!r}, not among "
            f"{', '.join(known)}"
        )
    return float(record[name])


def is_better(value: float, than: float, mode: Mode, min_delta: float = 0.0) -> bool:
    """Returns whether a value is better than the best so far; NaN never is."""
    if math.isnan(value):
        return False
    if math.isnan(than):
        return True
    return value > than + min_delta if mode == "max" else value < than - min_delta
