"""``Curriculum``: stages of a run, each with batches, evaluation, schedules and settings."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch.optim import Optimizer

from trm_fast.train.batches import Batches, batches_of, completed, exhausted
from trm_fast.train.callbacks import metric
from trm_fast.train.config import Mode
from trm_fast.train.run import Evaluate, Record, Run

Done = Callable[[Record], str | None]
ENDED = "the batches have ended"


@dataclass(frozen=True)
class Stage:
    """A part of a run. It ends after ``steps``, when ``done`` says why, when its batches end, or by
    ``Curriculum.go_to``, whichever comes first.

    Args:
        name: what it is called, which no other stage may be.
        batches: as for ``Trainer``, or a function that makes them when the stage begins; None goes
            on with those of the stage before.
        evaluate: as for ``Trainer``; None takes the trainer's.
        steps: updates in the stage, >= 1; None sets no end.
        done: is given the record of each evaluation of the stage; returns why the stage is over,
            or None. See ``until``.
        settings: options of optimizers by name, for all groups that have them; or a function of the
            run that sets those of some groups, or attributes of the model. It is called when the
            stage begins, and with each resume before options are loaded, so it may depend on
            nothing but the stage.
        schedules: a function of the optimizers as for ``Trainer``, called after ``settings``. They
            replace the schedules before, whose learning rates are undone first.
        evaluate_every: updates of the stage per evaluation; None takes the trainer's.

    Raises:
        ValueError: a number is out of range.
    """

    name: str
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None
    evaluate: Evaluate | None = None
    steps: int | None = None
    done: Done | None = None
    settings: Mapping[str, Any] | Callable[[Run], object] | None = None
    schedules: Callable[[list[Optimizer]], Sequence[Any]] | None = None
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        for what, least in (("steps", 1), ("evaluate_every", 0)):
            value = getattr(self, what)
            if value is not None and value < least:
                raise ValueError(f"Stage: {what} must be >= {least}, or None; got {value!r}")


def until(monitor: str, target: float, mode: Mode = "max") -> Done:
    """Returns a ``Stage.done`` that ends a stage when a metric of the evaluation reaches a value.

    Args:
        monitor: name of the metric.
        target: the value.
        mode: whether the metric is to rise ("max") or to fall ("min") to it.

    Raises:
        ValueError: during the run, the metric is unknown.
    """

    def done(record: Record) -> str | None:
        value = metric(record, monitor, "until: monitor")
        reached = value >= target if mode == "max" else value <= target
        return f"{monitor} {value:.6g} has reached {target:.6g}" if reached else None

    return done


class Curriculum:
    """The stages of a run, one after another; a ``Trainer`` takes one in place of batches. The run
    ends with the last stage, or with ``TrainerConfig.steps``.

    Args:
        stages: at least one.
        first: name of the stage with which the run begins; empty for the first one.

    Attributes:
        index: which stage it is, from 0.
        step: updates in the stage so far.
        history: a record for each stage that is over: "stage", "step" of the run, "steps" of the
            stage, and "reason".
        finished: why the last stage is over, or None.

    Raises:
        ValueError: there is no stage, two have one name, none is called ``first``, or the first
            stages have no batches.
    """

    def __init__(self, stages: Sequence[Stage], first: str = "") -> None:
        self.stages = tuple(stages)
        names = [stage.name for stage in self.stages]
        if not names or len({*names}) < len(names):
            got = ", ".join(names) or "none"
            raise ValueError(f"Curriculum: stages must be at least one, each named; got {got}")
        self.index = self.position(first) if first else 0
        if all(stage.batches is None for stage in self.stages[: self.index + 1]):
            raise ValueError(f"Curriculum: stage {names[self.index]!r} must have batches; got None")
        self.step = 0
        self.history: list[Record] = []
        self.finished: str | None = None
        self.visited: list[str] = []
        self.evaluate: Evaluate | None = None  # of stages that have none
        self._next: tuple[int, str] | None = None
        self._source: tuple[str, Batches] | None = None
        self._sources: dict[str, Batches] = {}
        self._places: dict[str, Any] = {}
        self._epochs: dict[str, int] = {}

    @property
    def stage(self) -> Stage:
        """The present stage."""
        return self.stages[self.index]

    @property
    def epochs(self) -> int:
        """Epochs that are over, and that callbacks know of."""
        return sum(self._epochs.values())

    def position(self, name: str) -> int:
        """Returns the index of a stage.

        Raises:
            ValueError: there is none of this name.
        """
        names = [stage.name for stage in self.stages]
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"Curriculum: a stage must be one of {', '.join(names)}; got {name!r}{hint}"
            )
        return names.index(name)

    @property
    def is_left(self) -> bool:
        """Whether ``go_to`` has been called."""
        return self._next is not None

    def go_to(self, name: str, reason: str) -> None:
        """Ends the stage after this step and goes on with another one, or with this one anew. Its
        batches go on where they stood.

        Raises:
            ValueError: there is none of this name.
        """
        self._next = self.position(name), reason

    def batches(self) -> Batches:
        """Returns the batches of the present stage, made when they are asked for first."""
        return (self._source or self._make_source())[1]

    def _make_source(self) -> tuple[str, Batches]:
        origin = next(s for s in reversed(self.stages[: self.index + 1]) if s.batches is not None)
        name = origin.name
        if name not in self._sources:
            given: Any = origin.batches
            source = self._sources[name] = batches_of(
                given if isinstance(given, Iterable) else given()
            )
            if name in self._places:
                source.load_state_dict(self._places.pop(name))
            # Epochs from before the run are nothing new.
            self._epochs.setdefault(name, completed(source))
        self._source = name, self._sources[name]
        return self._source

    def new_epoch(self) -> bool:
        """Counts an epoch of the present batches that is over; returns whether there was one."""
        name, source = self._source or self._make_source()
        if completed(source) <= self._epochs[name]:
            return False
        self._epochs[name] += 1
        return True

    @property
    def entered(self) -> bool:
        """Whether the present stage has begun."""
        return self.visited[-1:] == [self.stage.name]

    def enter(self, run: Run) -> None:
        """Begins the present stage: evaluation, settings, schedules."""
        self.visited.append(self.stage.name)
        self._apply(self.stage, run)

    def enter_again(self, run: Run) -> None:
        """Brings settings and schedules to where the stages so far have brought them."""
        for name in self.visited:
            self._apply(self.stages[self.position(name)], run)

    def _apply(self, stage: Stage, run: Run) -> None:
        if any(other.evaluate is not None for other in self.stages):
            run.evaluator = stage.evaluate or self.evaluate
        groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
        for group in groups if stage.schedules is not None else ():
            # What the schedules before have made of it is undone.
            group["lr"] = group.pop("initial_lr", group["lr"])
        if isinstance(stage.settings, Mapping):
            _set_options(groups, stage.settings, stage.name)
        elif stage.settings is not None:
            stage.settings(run)
        if stage.schedules is not None:
            run.schedules = list(stage.schedules(run.optimizers))

    def reason_to_end(self, record: Record | None) -> str | None:
        """Returns why the stage is over, or None.

        Args:
            record: of an evaluation after this step, or None.
        """
        if self._next is not None:
            return self._next[1]
        reason = None
        if record is not None and self.stage.done is not None:
            reason = self.stage.done(record)
        if reason is None and self.stage.steps is not None and self.step >= self.stage.steps:
            reason = f"all {self.stage.steps} steps of the stage are done"
        if reason is None and exhausted(self.batches()):
            reason = ENDED
        return reason

    def advance(self, step: int, reason: str) -> bool:
        """Ends the stage; returns whether there is a further one.

        Args:
            step: of the run.
            reason: why the stage is over.
        """
        record = {"stage": self.stage.name, "step": step, "steps": self.step, "reason": reason}
        self.history.append(record)
        index = self.index + 1 if self._next is None else self._next[0]
        self._next = self._source = None
        if index == len(self.stages):
            self.finished = reason
            return False
        self.index, self.step = index, 0
        return True

    def places(self) -> dict[str, Any]:
        """Returns where the batches of the stages stand in this process."""
        return self._places | {name: part.state_dict() for name, part in self._sources.items()}

    def load_places(self, places: dict[str, Any]) -> None:
        """Goes on from what ``places`` returned; iterators from before must not be used."""
        self._places = dict(places)
        for name, source in self._sources.items():
            if name in self._places:
                source.load_state_dict(self._places.pop(name))

    def state_dict(self) -> dict[str, Any]:
        """Returns stage, step and history, with the names of the stages."""
        return {
            "stages": [stage.name for stage in self.stages],
            "index": self.index,
            "step": self.step,
            "visited": list(self.visited),
            "history": [dict(record) for record in self.history],
            "epochs": dict(self._epochs),
            "finished": self.finished,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` returned; stages may have been added or changed.

        Raises:
            ValueError: a stage that was entered is no longer there.
        """
        self.index = self.position(state["stages"][state["index"]])
        for name in state["visited"]:
            self.position(name)
        self.step, self.visited = state["step"], list(state["visited"])
        self.history = [dict(record) for record in state["history"]]
        self._epochs, self.finished = dict(state["epochs"]), state["finished"]
        if self.finished is not None and self.index + 1 < len(self.stages):
            # There are further stages now.
            self.index, self.step, self.finished = self.index + 1, 0, None
        self._next = self._source = None


def _set_options(groups: list[dict[str, Any]], options: Mapping[str, Any], stage: str) -> None:
    for name, value in options.items():
        having = [group for group in groups if name in group]
        if not having:
            known = ", ".join(sorted({*groups[0]} - {"params"}))
            raise ValueError(
                f"Stage: settings must be options of an optimizer, such as {known}; got {name!r} "
                f"in stage {stage!r}"
            )
        for group in having:
            group[name] = value
