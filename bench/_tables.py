"""How a bench file declares its tables: cases with a title and rows, and what makes a row."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import pytest
import torch

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# Measured only with --all-rows.
MORE = "more_rows"


class Unavailable(Exception):
    """A row cannot run here, for the reason that the message gives; its item is skipped."""


def nothing() -> None:
    pass


@dataclass(eq=False)
class Row:
    """One variant, ready to be timed.

    Args:
        step: the call that is timed.
        prepare: puts the inputs of the next step in place; not timed.
        items: what one step makes; the samples are the time of one item.
        work: bytes that one step moves, or floating point operations that its task needs, in the
            unit of the table; None if they are not counted.
        least: ``work`` is the least that the algorithm can do; else it is what its operators do,
            one after the other.
        facts: more columns by name, computed after the timing.
    """

    step: Callable[[], object]
    prepare: Callable[[], object] = nothing
    items: int = 1
    work: float | None = None
    least: bool = True
    facts: Callable[[], dict[str, Any]] = dict


class Table(Protocol):
    """What the rows of one table share while they are measured.

    ``baselines`` are the rows whose medians the others are divided by; the first is measured even
    if it is not selected, and so is ``floor``, the row whose rate of work the others are compared
    with. ``unit`` is that of the work, "B" or "FLOP".
    """

    device: str
    baselines: tuple[str, ...]
    floor: str | None
    unit: str

    def row(self, name: str) -> Row:
        """Returns a row that has been checked against the formula in float64.

        Raises:
            AssertionError: its results are wrong.
            Unavailable: it cannot run here.
        """


@dataclass(frozen=True, eq=False)
class Case:
    """A table before it is measured.

    Args:
        id: names the table in the names of its items.
        title: heads the table, and is the group of its rows in pytest-benchmark.
        make: builds the table.
        rows: names of the rows.
        more: names of rows that are measured only with ``--all-rows``.
        default: False if the whole table is.
    """

    id: str
    title: str
    make: Callable[[], Table]
    rows: tuple[str, ...]
    more: tuple[str, ...] = ()
    default: bool = True

    def parameters(self) -> Iterator[Any]:
        for name in (*self.rows, *self.more):
            marks = [pytest.mark.benchmark(group=self.title, timer=Replay())]
            if not self.default or name in self.more:
                marks.append(getattr(pytest.mark, MORE))
            yield pytest.param(self.id, name, id=f"{self.id}-{name}", marks=marks)


class Replay:
    """A timer for pytest-benchmark that gives recorded times: 0 when a round starts, and the time
    of the sample when it ends."""

    __name__ = "perf_counter, in turns with the other rows"

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, seconds: Iterable[float]) -> None:
        self._readings = chain.from_iterable((0.0, second) for second in seconds)

    def __call__(self) -> float:
        return next(self._readings)


def rows_of(cases: Iterable[Case]) -> Callable[..., None]:
    """Returns a test with one item for each row of each table."""
    by_id = {case.id: case for case in cases}
    parameters = chain.from_iterable(case.parameters() for case in by_id.values())

    @pytest.mark.parametrize(("table", "row"), list(parameters))
    def test(table: str, row: str, benchmark, bench, request) -> None:
        replay = request.node.get_closest_marker("benchmark").kwargs["timer"]
        bench.run(by_id[table], row, benchmark, replay)

    test.cases = by_id
    return test
