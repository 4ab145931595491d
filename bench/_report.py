"""Collects what was measured, prints it as tables and saves it as JSON."""

import io
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from ._machine import facts
from ._timing import quartiles

RESULTS = Path(__file__).parent / "results"
# A narrower terminal wraps the lines of a table, which is better than the loss of a column.
WIDTH = 160


@dataclass
class Row:
    """One variant.

    Args:
        name: what ran.
        seconds: one timed step each.
        moved: bytes that one step reads and writes, or None if nobody has counted them.
        one_pass: ``moved`` is the least that the algorithm can move; else it is what its operators
            read and write, one after the other.
        state_bytes: bytes of the states per parameter.
        extra: bytes of tensors during a step, beyond those alive before it.
    """

    name: str
    seconds: list[float]
    moved: float | None
    one_pass: bool = True
    state_bytes: float | None = None
    extra: int | None = None

    @property
    def median(self) -> float:
        return quartiles(self.seconds)[1]

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second."""
        return None if self.moved is None else self.moved / self.median


@dataclass
class Table:
    """One size on one device; ratios are to ``base``, shares of bandwidth to ``copy``."""

    title: str
    rows: list[Row]
    base: str
    copy: str
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def share(self, row: Row) -> float | None:
        """Returns the bandwidth of ``row`` over that of the copy."""
        copy = self.row(self.copy)
        return row.bandwidth / copy.bandwidth if row.bandwidth and copy else None


class Run:
    """The tables of one ``pytest bench`` and the machine that they come from."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.facts = facts()
        self.tables: list[Table] = []
        self.skipped: dict[str, str] = {}

    def text(self) -> str:
        """Returns all tables as text."""
        console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
        _print_line(console, _heading(self.facts))
        for table in self.tables:
            _print_table(console, table)
        for name, reason in self.skipped.items():
            _print_line(console, f"\n{name}: not measured: {reason}")
        console.print(_LEGEND, highlight=False)
        return console.file.getvalue()

    def save(self) -> Path:
        """Writes the run below bench/results; an older file stays."""
        RESULTS.mkdir(exist_ok=True)
        machine = self.facts["gpu"] or f"{self.facts['cpu']} {self.facts['cores']} cores"
        slug = re.sub(r"[^a-z0-9]+", "-", f"{machine}".lower()).strip("-")
        stem = f"{slug}-{self.facts['date'][:10]}"
        path = RESULTS / f"{stem}.json"
        number = 2
        while path.exists():
            path = RESULTS / f"{stem}-{number}.json"
            number += 1
        path.write_text(json.dumps(self._json(), indent=1) + "\n")
        return path

    def _json(self) -> dict[str, object]:
        tables = [
            {
                "title": table.title,
                "rows": [_row_json(table, row) for row in table.rows],
                "missing": table.missing,
                "notes": table.notes,
            }
            for table in self.tables
        ]
        return self.facts | {"rounds": self.rounds, "tables": tables}


_LEGEND = """
median, quartiles: of all timed steps of the run. moved: bytes per step: for an update in one pass
the least that its algorithm can move; with ~ what a chain of operators reads and writes. GB/s:
moved over median. of copy: GB/s over that of the copy; it can exceed 100 %. state: bytes per
parameter. extra: tensors alive during a step, at their peak, beyond those alive before it. How and
why: bench/README.md.
"""


def _heading(facts: dict[str, object]) -> str:
    gpu = f"{facts['gpu']}, CUDA {facts['cuda']}; " if facts["gpu"] else ""
    return (
        f"\n{gpu}{facts['cpu']}, {facts['cores']} cores, threads: {facts['threads']}, "
        f"{facts['cpu_capability']}, load average {facts['load_average']} at the start\n"
        f"trm_fast {facts['trm_fast']} ({facts['compiler'] or 'cpp not built'}), torch "
        f"{facts['torch']}, Python {facts['python']}, commit {facts['commit'] or 'unknown'}, "
        f"{facts['date']}"
    )


def _print_table(console: Console, table: Table) -> None:
    base = f"/ {table.base}"
    columns = ("median", "quartiles", base, "moved", "GB/s", "of copy", "state", "extra")
    shown = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in table.rows:
        shown.add_row(row.name, *_cells(table, row))
    console.print(f"\n{table.title}\n", highlight=False)
    console.print(shown)
    for name, reason in table.missing.items():
        _print_line(console, f"  not run: {name}: {reason}")
    for note in table.notes:
        _print_line(console, f"  {note}")


def _print_line(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(table: Table, row: Row) -> list[str]:
    low, median, high = map(in_seconds, quartiles(row.seconds))
    base, share = table.row(table.base), table.share(row)
    return [
        median,
        f"{low} - {high}",
        f"{row.median / base.median:.2f}x" if base else "",
        "" if row.moved is None else f"{'' if row.one_pass else '~'}{in_bytes(row.moved)}",
        "" if row.bandwidth is None else f"{row.bandwidth / 1e9:.1f}",
        "" if share is None else f"{share:.0%}",
        "" if row.state_bytes is None else f"{row.state_bytes:.1f}",
        "" if row.extra is None else in_bytes(row.extra),
    ]


def _row_json(table: Table, row: Row) -> dict[str, object]:
    low, median, high = quartiles(row.seconds)
    summary = {
        "first_quartile": low,
        "median": median,
        "third_quartile": high,
        "timed_steps": len(row.seconds),
        "share_of_copy": table.share(row),
    }
    facts = asdict(row)
    del facts["seconds"]
    return facts | summary


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
