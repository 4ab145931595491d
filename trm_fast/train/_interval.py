"""What a run says of the updates since it last said something: means, pace, what callbacks add."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from trm_fast.train.callbacks import Callback
from trm_fast.train.distributed import World
from trm_fast.train.meter import Meter
from trm_fast.train.run import Record


class Interval:
    """The updates between two records.

    Args:
        step: updates of the run when it begins.
        seconds: wall time of the run when it begins.
    """

    def __init__(self, step: int = 0, seconds: float = 0.0) -> None:
        self.step, self.seconds = step, seconds

    def pause(self, seconds: float) -> None:
        """Leaves some time out: it does not belong to the pace of the updates."""
        self.seconds += seconds

    def record(self, step: int, seconds: float, numbers: Mapping[str, float], lr: float) -> Record:
        """Returns the record of the interval, which ends now; the next one begins.

        Args:
            step: updates of the run.
            seconds: wall time of the run.
            numbers: means over the interval.
            lr: learning rate of the first group.
        """
        updates, taken = step - self.step, seconds - self.seconds
        pace = updates / taken if updates and taken > 0 else math.nan
        self.step, self.seconds = step, seconds
        start: Record = {"kind": "train", "step": step, "seconds": round(seconds, 3)}
        return {**start, **numbers, "lr": lr, "steps_per_second": round(pace, 3)}


# What a record says besides metrics.
FIELDS = frozenset(
    {"kind", "step", "seconds", "lr", "steps_per_second", "curriculum/stage", "curriculum/step"}
)


def check_names(names: Iterable[str], owner: str) -> None:
    """Checks that metrics leave the other fields of a record alone.

    Args:
        names: of the metrics.
        owner: where they come from, for the message.

    Raises:
        ValueError: a metric has the name of such a field, or cannot be printed.
    """
    for name in names:
        if name in FIELDS or not name.isprintable():
            raise ValueError(
                f"Trainer: metrics of {owner} must have names that can be printed and are none of "
                f"{', '.join(sorted(FIELDS))}; got {name!r}"
            )


def numbers_of(found: Any) -> dict[str, float]:
    """Returns what a function of an evaluation has returned as plain numbers.

    Raises:
        TypeError: it is no mapping of names to numbers.
    """
    if not isinstance(found, Mapping):
        raise TypeError(
            f"Trainer: evaluate must return metrics, a mapping of names to numbers; got {found!r}"
        )
    numbers: dict[str, float] = {}
    for name, value in found.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                "Trainer: evaluate must return a number for each metric; got "
                f"{value!r} for {name!r}"
            ) from error
    return numbers


def add_metrics(
    record: Record, callbacks: Mapping[str, Callback], meter: Meter, world: World
) -> None:
    """Adds the metrics of callbacks to a record, under their own names.

    Args:
        record: is changed.
        callbacks: by name.
        meter: an empty one.
        world: the processes.

    Raises:
        ValueError: a name is used twice, in any process.
    """
    # The others have none, in any process.
    adding = {n: c for n, c in callbacks.items() if type(c).metrics is not Callback.metrics}
    if not adding:
        return
    found = {name: callback.metrics() for name, callback in adding.items()}
    names = {name: {*metrics} for name, metrics in found.items()}
    for part in world.gather({name: [*keys] for name, keys in names.items()}):
        names = {name: keys.union(part[name]) for name, keys in names.items()}
    owners = dict.fromkeys(record, "the trainer")
    for name, keys in names.items():
        for key in sorted(keys):
            if key in owners:
                raise ValueError(
                    f"Trainer: metrics must have names of their own; got {key!r} from "
                    f"{owners[key]} and from callback {name}"
                )
            owners[key] = f"callback {name}"
    for metrics in found.values():
        meter.add(metrics)
    record |= meter.means(world)
