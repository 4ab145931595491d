"""Callbacks: what happens beside a run, with a state that is saved and comes back."""

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trm_fast.train.config import Mode, Summary
from trm_fast.train.objective import Metrics
from trm_fast.train.run import Record, Run, Step


class Callback:
    """Is called by a ``Trainer`` in every process; override what is needed. A hook may leave out
    what comes after ``run``, as in ``on_step(self, run)``.

    Attributes:
        name: key of its state in a checkpoint, which no other callback of the run may have; empty
            means the name of the class.
    """

    name: str = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        hooks = [name for name in vars(Callback) if name.startswith("on_")]
        for name, hook in [*vars(cls).items()]:
            alike = get_close_matches(name, hooks, 1, 0.8) if name.startswith("on") else []
            if alike and name not in hooks:
                raise TypeError(
                    f"{cls.__name__}: {name} must be a hook of Callback, or be called otherwise; "
                    f"did you mean {alike[0]}?"
                )
            if name.startswith("on_") and _leaves_out(hook, getattr(Callback, name, None)):
                setattr(cls, name, _with_run_alone(hook))

    def on_start(self, run: Run) -> None:
        """Before the first step, after a resume."""

    def on_gradients(self, run: Run, step: Step) -> None:
        """After the backward passes of an update, before it: the norm is known, nothing has moved.
        Options of optimizers and ``step.clip_norm`` that are set here hold for this update."""

    def on_step(self, run: Run, step: Step) -> None:
        """After each update; ``run.step`` counts it already. The gradients are still there."""

    def on_epoch(self, run: Run, epoch: int) -> None:
        """After all batches of an epoch have been used, with its number, from 0. ``EpochBatches``
        have epochs, thus every plain iterable, which a trainer puts into them; and own ``Batches``
        with an attribute ``completed``, the epochs of which all batches were given, such as
        ``PuzzleBatches``. Others have none."""

    def on_stage(self, run: Run, stage: str) -> None:
        """When a stage of a ``Curriculum`` begins, with its name; not again after a resume."""

    def metrics(self) -> Metrics:
        """Returns what an interval has shown, as ``StepResult.metrics``; called once when it is
        logged. The means stand in its record under the same names, which must be its own."""
        return MappingProxyType({})

    def on_log(self, run: Run, record: Record) -> None:
        """After an interval, with its record of metrics.jsonl."""

    def on_evaluate(self, run: Run, record: Record) -> None:
        """After an evaluation, with its record of metrics.jsonl."""

    def on_save(self, run: Run, path: Path) -> None:
        """After a checkpoint has been written, in the first process only."""

    def on_event(self, run: Run, record: Record) -> None:
        """After something that must not pass in silence, with its record of events.jsonl."""

    def on_end(self, run: Run, summary: Summary) -> None:
        """After the last step and checkpoint, also of a run that was interrupted."""

    def close(self) -> None:
        """After everything else, also if an error has ended the run: gives back what it holds."""

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values and tensors, of this process; called once for each checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` returned; not called if that was empty."""


def _leaves_out(hook: Any, declared: Any) -> bool:
    """Whether a hook takes the run alone where it is given more."""
    if declared is None or not callable(hook):
        return False
    own = signature(hook)
    return _takes(signature(declared), 3) and _takes(own, 2) and not _takes(own, 3)


def _takes(hook: Signature, count: int) -> bool:
    """Whether it can be called with that many arguments."""
    try:
        hook.bind(*range(count))
    except TypeError:
        return False
    return True


def _with_run_alone(hook: Callable[..., None]) -> Callable[..., None]:
    @wraps(hook)
    def called(self: Callback, run: Run, _: object) -> None:
        hook(self, run)

    return called


def by_name(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Returns callbacks by their names.

    Raises:
        TypeError: one is no ``Callback``.
        ValueError: two have the same.
    """
    found: dict[str, Callback] = {}
    for callback in callbacks:
        if not isinstance(callback, Callback):
            got = getattr(callback, "__name__", type(callback).__name__)
            raise TypeError(f"Trainer: callbacks must be objects of class Callback; got {got}")
        name = callback.name or type(callback).__name__
        if name in found:
            kinds = f"{type(found[name]).__name__} and {type(callback).__name__}"
            raise ValueError(
                f"Trainer: callbacks must have names of their own; got {kinds}, both named "
                f"{name!r}. Set the attribute name of one"
            )
        found[name] = callback
    return found


class EarlyStopping(Callback):
    """Stops when a metric of the evaluation has not become better for a while. With each stage of a
    curriculum it begins anew, and after a resume with another ``mode``, by which the values so far
    do not compare; other settings hold from then on. An event says what has changed.

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
        self.name = f"EarlyStopping {monitor}"
        self.best: float | None = None
        self.waited = 0
        self._changes: list[str] = []  # since the checkpoint, still to be reported

    def on_start(self, run: Run) -> None:
        changes, self._changes = self._changes, []
        if changes:
            run.event("changed", f"{self.name}: {'; '.join(changes)}")
        self._judge(run)

    def on_stage(self, run: Run, stage: str) -> None:
        # Another stage has other data: its values are not to be compared.
        self.best, self.waited = None, 0

    def on_evaluate(self, run: Run, record: Record) -> None:
        value = metric(record, self.monitor, "EarlyStopping: monitor")
        if self.best is None or is_better(value, self.best, self.mode, self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        self._judge(run)

    def _judge(self, run: Run) -> None:
        if self.waited >= self.patience:
            run.stop(
                f"{self.monitor} has not become better than {self.best:.6g} "
                f"in {self.waited} evaluations"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "settings": self._settings()}

    def _settings(self) -> dict[str, Any]:
        return dict(patience=self.patience, mode=self.mode, min_delta=self.min_delta)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = self._settings()
        before = {**now, **state.get("settings", {})}  # checkpoints have not always had them
        self._changes = [f"{k} {before[k]} is now {v}" for k, v in now.items() if before[k] != v]
        self.best, self.waited = state["best"], state["waited"]
        if before["mode"] != self.mode:
            self.best, self.waited = None, 0


class StopAtTarget(Callback):
    """Stops when a metric of the evaluation reaches a value.

    Args:
        monitor: name of the metric.
        target: the value.
        mode: whether the metric is to rise ("max") or to fall ("min") to it.
    """

    def __init__(self, monitor: str, target: float, mode: Mode = "max") -> None:
        self.monitor, self.target, self.mode = monitor, target, mode
        self.name = f"StopAtTarget {monitor}"

    def on_start(self, run: Run) -> None:
        # A run that had reached it has, unless the target is another one now.
        if run.evaluated_at == run.step and run.metrics:
            self.on_evaluate(run, run.metrics)

    def on_evaluate(self, run: Run, record: Record) -> None:
        value = metric(record, self.monitor, "StopAtTarget: monitor")
        if value >= self.target if self.mode == "max" else value <= self.target:
            run.stop(f"{self.monitor} {value:.6g} has reached {self.target:.6g}")


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
