"""Schedules that move with the updates, and those that a metric moves."""

from collections.abc import Iterable, Sequence
from functools import cache
from inspect import Parameter, signature
from typing import Any

from trm_fast.train.config import TrainerConfig
from trm_fast.train.curriculum import Stage
from trm_fast.train.run import Evaluate


def takes_metric(schedule: Any) -> bool:
    """Returns whether the step of a schedule needs a metric, as that of ``ReduceLROnPlateau``."""
    kind: Any = type(schedule)
    return _takes_argument(kind)


@cache
def _takes_argument(kind: Any) -> bool:
    _, *rest = signature(kind.step).parameters.values()
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return any(one.default is Parameter.empty and one.kind in positional for one in rest)


def check_schedules(
    schedules: Iterable[Any],
    config: TrainerConfig,
    stages: Sequence[Stage],
    evaluate: Evaluate | None,
) -> None:
    """Refuses schedules that would never be given the metric that they need.

    Args:
        schedules: those of the run.
        config: of the run.
        stages: in which the schedules hold.
        evaluate: what stages without an evaluation of their own have.

    Raises:
        ValueError: there is one.
    """
    needing = [schedule for schedule in schedules if takes_metric(schedule)]
    every = [
        config.evaluate_every if stage.evaluate_every is None else stage.evaluate_every
        for stage in stages
        if stage.evaluate is not None or evaluate is not None
    ]
    if needing and not (config.monitor and any(every)):
        raise ValueError(
            f"Trainer: schedules must not have {type(needing[0]).__name__}, which takes a metric, "
            "without evaluate, evaluate_every >= 1 and monitor, the name of the metric; got "
            f"monitor {config.monitor!r} and {'some' if any(every) else 'no'} evaluations"
        )
