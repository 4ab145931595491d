"""Prints what was measured, side by side."""

import io

from pytest_benchmark.stats import Stats
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ._session import Bench, Measured, Result
from ._tables import Unavailable

# A narrower terminal wraps the lines of a table, which is better than the loss of a column.
WIDTH = 180
UNITS = {"B": ("moved", "GB/s"), "FLOP": ("FLOP", "GFLOP/s")}
LEGEND = """
median, quartiles: of all timed steps of the run. / row: the median over that of the row. moved,
FLOP: work of one step, the least that its algorithm can do; with ~ what a chain of operators does.
of row: the rate of work over that of the row. state: bytes per parameter. extra: tensors alive
during a step, at their peak, beyond those alive before it. kept: bytes for the backward pass.
error: against the formula in float64. How and why: bench/README.md.
"""


def text(bench: Bench, heading: str) -> str:
    """Returns all tables as text."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    _print_line(console, heading)
    for result in bench.results.values():
        _print_table(console, result)
    for title, lines in bench.notes.items():
        _print_line(console, f"\n{title}\n")
        for line in lines:
            _print_line(console, f"  {line}")
    if bench.results:
        console.print(LEGEND, highlight=False)
    return console.file.getvalue()


def _print_table(console: Console, result: Result) -> None:
    names = [name for name in (*result.case.rows, *result.case.more) if name in result.rows]
    rows = {name: result.measured(name) for name in names}
    rows = {name: row for name, row in rows.items() if row}
    _print_line(console, f"\n{result.case.title}\n")
    if rows:
        cells = {name: _cells(result, row) for name, row in rows.items()}
        # In the order of the first row that has most of them.
        columns = list(
            dict.fromkeys(c for row in sorted(cells.values(), key=len)[::-1] for c in row)
        )
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for name, row in cells.items():
            table.add_row(name, *(row.get(column, "") for column in columns))
        console.print(table)
    for name in names:
        found = result.rows[name]
        if isinstance(found, Exception):
            verdict = "not measured" if isinstance(found, Unavailable) else type(found).__name__
            _print_line(console, f"  {name}: {verdict}: {str(found).splitlines()[0]}")


def _print_line(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(result: Result, row: Measured) -> dict[str, str]:
    """Returns the columns of a row by their heading."""
    stats = Stats()
    for second in row.seconds:
        stats.update(second)
    low, median, high = map(in_seconds, (stats.q1, stats.median, stats.q3))
    cells = {"median": median, "quartiles": f"{low} - {high}"}
    cells |= {f"/ {base}": _ratio(ratio) for base, ratio in result.ratios(row).items()}
    if row.work is not None:
        work, rate = UNITS[result.unit]
        size = in_bytes(row.work) if result.unit == "B" else f"{row.work:.3g}"
        cells[work] = f"{'' if row.least else '~'}{size}"
        cells[rate] = f"{row.work / row.median / 1e9:.1f}"
    if (share := result.share(row)) is not None:
        floor, *_ = result.floor.split(",")
        cells[f"of {floor}"] = f"{share:.0%}"
    return cells | dict(_fact(name, value) for name, value in row.facts.items())


def _fact(name: str, value: object) -> tuple[str, str]:
    """Returns heading and text of a column that a bench file has added."""
    if name == "state_bytes_per_parameter":
        return "state", f"{value:.1f}"
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes"), in_bytes(value)
    heading = name.replace("_", " ")
    return heading, f"{value:.1e}" if isinstance(value, float) else str(value)


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.2g}x"


def in_seconds(seconds: float) -> str:
    """Returns a time with three digits and its unit."""
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{_three_digits(seconds * scale)} {unit}"
    return f"{_three_digits(seconds * 1e6)} us"


def in_bytes(size: float) -> str:
    """Returns a size with three digits and its unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{_three_digits(size / scale)} {unit}"
    return f"{size:.0f} B"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
