"""``Curriculum``: stages of a run, each with batches, evaluation, schedules and settings."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch.optim import Optimizer

from trm_fast._fields import check_fields
from trm_fast.train._stage_batches import StageBatches
from trm_fast.train.callbacks import metric
from trm_fast.train.config import Mode, TrainerConfig
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
            on with those of the stage before. Stages that are given the same batches go on with
            them where they stand; a function must make new ones.
        evaluate: as for ``Trainer``; None takes the trainer's.
        steps: updates in the stage, >= 1; None sets no end.
        done: is given the record of each evaluation of the stage; returns why the stage is over,
            or None. See ``until``. It is asked again after a resume, so it may depend on nothing
            but the record.
        settings: options of optimizers by name, for all groups that have them, but none that a
            schedule moves, unless the stage has schedules of its own; or a function of the
            run that sets those of some groups, or attributes of the model. It is called when the
            stage begins, and with each resume before options are loaded, so it may depend on
            nothing but the stage.
        schedules: a function of the optimizers as for ``Trainer``, called after ``settings``. They
            replace the schedules before, whose learning rates are undone first. It is also called
            when the trainer is made, with copies of the optimizers: schedules that take a metric
            are refused then where none will come, as far as they can be made so early.
        evaluate_every: updates of the stage per evaluation; None takes the trainer's.

    Raises:
        ValueError: a number is out of range.
        TypeError: a name or a number is of another type.
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
        check_fields(self)
        for what, least in (("steps", 1), ("evaluate_every", 0)):
            value = getattr(self, what)
            if value is not None and value < least:
                raise ValueError(f"Stage: {what} must be >= {least}, or None; got {value!r}")

    def check_settings(self, scheduled: set[str]) -> None:
        """Refuses options that would hold for one update only.

        Args:
            scheduled: options that the schedules before the stage move.

        Raises:
            ValueError: there is one, and the stage has no schedules of its own.
        """
        options = self.settings if isinstance(self.settings, Mapping) else {}
        lost = sorted(scheduled & options.keys())
        if lost and self.schedules is None:
            raise ValueError(
                "Stage: settings must not have an option that a schedule moves, which would set it "
                f"back; got {lost[0]!r} in stage {self.name!r}. Give the stage schedules of its own"
            )


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
        ValueError: there is no stage, two have one name, none is called ``first``, or the first of
            the stages has no batches.
    """

    def __init__(self, stages: Sequence[Stage], first: str = "") -> None:
        self.stages = tuple(stages)
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("Curriculum: stages must be at least one; got none")
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(
                    f"Curriculum: stages must have names of their own; got {name!r} twice"
                )
        self.index = self.position(first) if first else 0
        if self.stages[0].batches is None:
            # Any stage may be entered by its name, and each goes on with batches before it.
            raise ValueError(
                f"Curriculum: the first of the stages must have batches; got None in {names[0]!r}"
            )
        self.step = 0
        self.history: list[Record] = []
        self.finished: str | None = None
        self.visited: list[str] = []
        self.sources = StageBatches(self.stages)
        self._next: tuple[str, str] | None = None
        self._owned = False

    @property
    def stage(self) -> Stage:
        """The present stage."""
        return self.stages[self.index]

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
        self.position(name)
        self._next = name, reason

    def check(self, run: Run, evaluate: Evaluate | None) -> None:
        """Compares the stages with the run that they are for; no other one may have them.

        Args:
            run: the run.
            evaluate: what stages without an evaluation of their own have.

        Raises:
            ValueError: a stage does not fit the run, or another trainer has the stages.
        """
        if self._owned:
            raise ValueError(
                "Curriculum: a curriculum must be given to one trainer, as it knows where the run "
                "stands; got one that another trainer has. Make a new one of the same stages"
            )
        scheduled = _scheduled(run.schedules)
        for stage in self.stages:
            if stage.schedules is not None:
                scheduled = set()  # which options its schedules move shows when it begins
            stage.check_settings(scheduled)
            if stage.done is not None:
                _require_evaluations(stage, run.config, evaluate)
        self._owned = True

    @property
    def entered(self) -> bool:
        """Whether the present stage has begun."""
        return self.visited[-1:] == [self.stage.name]

    def enter(self, run: Run) -> None:
        """Begins the present stage: settings, schedules."""
        self._apply(self.stage, run)
        self.visited.append(self.stage.name)  # last: a stage that cannot be entered is not

    def enter_again(self, run: Run) -> None:
        """Brings settings and schedules to where the stages so far have brought them."""
        for name in self.visited:
            self._apply(self.stages[self.position(name)], run)

    def _apply(self, stage: Stage, run: Run) -> None:
        groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
        for group in groups if stage.schedules is not None else ():
            # What the schedules before have made of it is undone.
            group["lr"] = group.pop("initial_lr", group["lr"])
        if isinstance(stage.settings, Mapping):
            stage.check_settings(_scheduled(run.schedules))
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
        if reason is None and self.sources.exhausted(self.index):
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
        index = self.index + 1 if self._next is None else self.position(self._next[0])
        self._next = None
        self.sources.leave()
        if index == len(self.stages):
            self.finished = reason
            return False
        self.index, self.step = index, 0
        return True

    def reopen(self) -> None:
        """Takes the end of the last stage back, so that it is decided anew: the stage may be a
        longer one now, or have another one after it."""
        if self.finished is not None:
            self.finished = None
            self.history.pop()

    def state_dict(self) -> dict[str, Any]:
        """Returns stage, step and history, with the names of the stages."""
        return {
            "stages": [stage.name for stage in self.stages],
            "index": self.index,
            "step": self.step,
            "next": None if self._next is None else list(self._next),
            "visited": list(self.visited),
            "history": [dict(record) for record in self.history],
            "epochs": self.sources.state_dict(),
            "finished": self.finished,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` returned; stages may have been added or changed.

        Raises:
            ValueError: a stage that was entered, or is to be entered next, is no longer there.
        """
        self.index = self.position(state["stages"][state["index"]])
        for name in state["visited"]:
            self.position(name)
        self._next = None
        if state["next"] is not None:
            name, reason = state["next"]
            self.go_to(name, reason)
        self.step, self.visited = state["step"], list(state["visited"])
        self.history = [dict(record) for record in state["history"]]
        self.finished = state["finished"]
        self.sources.load_state_dict(state["epochs"])


def _scheduled(schedules: Sequence[Any]) -> set[str]:
    """Returns the options that schedules move: the learning rate, unless they name another one."""
    return {getattr(schedule, "option", "lr") for schedule in schedules}


def _require_evaluations(stage: Stage, config: TrainerConfig, evaluate: Evaluate | None) -> None:
    if stage.evaluate is None and evaluate is None:
        raise ValueError(
            "Stage: done needs the argument evaluate of the stage or of the trainer; got None in "
            f"stage {stage.name!r}"
        )
    every = config.evaluate_every if stage.evaluate_every is None else stage.evaluate_every
    if every == 0:
        raise ValueError(
            "Stage: done needs evaluations during the stage: evaluate_every of the stage or of the "
            f"trainer's config must be >= 1; got 0 in stage {stage.name!r}"
        )


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
