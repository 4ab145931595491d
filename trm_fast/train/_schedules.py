"""Schedules that move with the updates, and those that a metric moves."""

from collections.abc import Iterable, Sequence
from copy import copy
from functools import cache
from inspect import Parameter, signature
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

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
    of: str = "",
) -> None:
    """Refuses schedules that would never be given the metric that they need.

    Args:
        schedules: those of the run.
        config: of the run.
        stages: in which the schedules hold.
        evaluate: what stages without an evaluation of their own have.
        of: whose schedules they are, for the message.

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
        kind = type(needing[0]).__name__
        raise ValueError(
            f"Trainer: schedules{of} must not have {kind}, which takes a metric, without evaluate, "
            "evaluate_every >= 1 and monitor, the name of the metric; got monitor "
            f"{config.monitor!r} and {'some' if any(every) else 'no'} evaluations"
        )


def check_later_schedules(
    stages: Sequence[Stage],
    optimizers: Sequence[Optimizer],
    config: TrainerConfig,
    evaluate: Evaluate | None,
) -> None:
    """Refuses stages with schedules that would never be given the metric that they need.

    They are made once on copies of the optimizers, which share nothing but the parameters. A
    function that cannot make them yet, as it needs what the stage sets, is asked again when its
    stage begins: ``check_schedules`` then sees what it makes.

    Args:
        stages: of the run.
        optimizers: of the run; nothing of them changes.
        config: of the run.
        evaluate: what stages without an evaluation of their own have.

    Raises:
        ValueError: there is one.
    """
    for index, stage in enumerate(stages):
        if stage.schedules is None:
            continue
        try:
            made = list(stage.schedules([_apart(optimizer) for optimizer in optimizers]))
        except Exception:
            # Whatever is wrong with it, the stage will say it where it can be told apart.
            continue
        later = (i for i in range(index + 1, len(stages)) if stages[i].schedules is not None)
        held = stages[index : next(later, len(stages))]
        check_schedules(made, config, held, evaluate, f" of stage {stage.name!r}")


def _apart(optimizer: Optimizer) -> Optimizer:
    """Returns a copy of an optimizer whose options may be changed."""
    twin = copy(optimizer)
    # Schedules write into a tensor in place.
    twin.param_groups = [
        {name: v.clone() if isinstance(v, Tensor) else v for name, v in group.items()}
        for group in optimizer.param_groups
    ]
    return twin
