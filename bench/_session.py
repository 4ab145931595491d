"""Measures the tables of one run of pytest, and hands each row to pytest-benchmark."""

import statistics
from dataclasses import dataclass, field
from typing import Any

import pytest

from ._tables import Case, Replay, Row, Table, Unavailable, nothing
from ._timing import Budget, interleave


@dataclass(eq=False)
class Measured:
    """Times of one item of a row, and its columns."""

    seconds: list[float]
    work: float | None
    least: bool
    facts: dict[str, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(eq=False)
class Result:
    """A measured table; a row that gave no times has an exception in its place."""

    case: Case
    baselines: tuple[str, ...] = ()
    floor: str | None = None
    unit: str = "B"
    rows: dict[str, Measured | Exception] = field(default_factory=dict)

    def measured(self, name: str | None) -> Measured | None:
        row = self.rows.get(name)
        return row if isinstance(row, Measured) else None

    def ratios(self, row: Measured) -> dict[str, float]:
        """Returns the median of a row over that of each baseline of the run."""
        bases = {name: self.measured(name) for name in self.baselines}
        return {name: row.median / base.median for name, base in bases.items() if base}

    def share(self, row: Measured) -> float | None:
        """Returns the rate of work of a row over that of the floor."""
        floor = self.measured(self.floor)
        if floor is None or row.work is None:
            return None
        return row.work / row.median / (floor.work / floor.median)

    def extra_info(self, row: Measured) -> dict[str, Any]:
        """Returns the columns of a row that pytest-benchmark does not compute."""
        info: dict[str, Any] = {"ratio_to": self.ratios(row)}
        if row.work is not None:
            info["bytes" if self.unit == "B" else "flop"] = row.work
            info["least"] = row.least
        if (share := self.share(row)) is not None:
            info["share_of_floor"], info["floor"] = share, self.floor
        return info | row.facts


class Bench:
    """The tables of a run: which of their rows are selected, and what was measured."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.results: dict[Case, Result] = {}
        self.notes: dict[str, list[str]] = {}
        self._selected: dict[Case, list[str]] = {}
        self._open: tuple[Case, Table] | None = None

    def select(self, case: Case, row: str) -> None:
        self._selected.setdefault(case, []).append(row)

    def run(self, case: Case, name: str, benchmark: Any, replay: Replay) -> None:
        """Runs one item: the first of a table measures all of its selected rows."""
        try:
            if benchmark.disabled:
                row = self._table(case).row(name)
                row.prepare()
                benchmark.pedantic(row.step)
                return
            found = self._result(case).rows[name]
            if isinstance(found, Exception):
                raise found
        except Unavailable as reason:
            pytest.skip(str(reason))
        benchmark.extra_info.update(self.results[case].extra_info(found))
        replay.load(found.seconds)
        benchmark.pedantic(nothing, rounds=len(found.seconds))

    def _table(self, case: Case) -> Table:
        """Returns the table, of which one is kept at a time because of its memory."""
        if self._open is None or self._open[0] is not case:
            self._open = None
            self._open = case, case.make()
        return self._open[1]

    def _result(self, case: Case) -> Result:
        if case not in self.results:
            self.results[case] = self._measure(case)
            self._open = None
        return self.results[case]

    def _measure(self, case: Case) -> Result:
        selected = self._selected[case]
        try:
            table = self._table(case)
        except Exception as error:
            return Result(case, rows=dict.fromkeys(selected, error))
        result = Result(case, table.baselines, table.floor, table.unit)
        ready: dict[str, Row] = {}
        for name in (*case.rows, *case.more):
            if name in (*selected, *table.baselines[:1], table.floor):
                try:
                    ready[name] = table.row(name)
                except Exception as error:
                    result.rows[name] = error
        if ready:
            seconds = interleave(ready, self.budget, table.device)
            for name, row in ready.items():
                result.rows[name] = _finished(row, seconds[name])
        return result


def _finished(row: Row, seconds: list[float] | Exception) -> Measured | Exception:
    if isinstance(seconds, Exception):
        return seconds
    try:
        work = None if row.work is None else row.work / row.items
        return Measured(seconds, work, row.least, row.facts())
    except Exception as error:
        return error
