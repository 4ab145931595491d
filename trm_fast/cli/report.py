"""``trm-fast report``: what runs have been, as tables, curves and a page."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trm_fast._paths import expanded
from trm_fast.cli import COMMANDS
from trm_fast.cli._runs import runs_in

if TYPE_CHECKING:
    from trm_fast.train.reports.reading import RunReport

HELP = COMMANDS["report"]

_SHOWN = 10  # evaluations and events of a run on a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the runs and where the files go."""
    parser.add_argument(
        "runs", nargs="+", type=expanded, metavar="RUN",
        help="directory of a run, or of several that one command has trained",
    )  # fmt: skip
    parser.add_argument(
        "--html", action="store_true", help="also write report.html, one page that needs no network"
    )
    parser.add_argument(
        "--out", type=expanded, metavar="DIR",
        help="where curves.png and report.html go (default: RUN; several runs need it)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prints the tables and writes curves.png, which has all runs in it, and the page.

    Raises:
        ValueError: a run is none or damaged, or several RUN have no ``--out``.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if len(args.runs) > 1 and args.out is None:
        raise ValueError(
            f"report: --out must name the directory for {len(args.runs)} runs; got none"
        )
    from trm_fast.train.reports.reading import read_run

    reports = [read_run(run) for path in args.runs for run in runs_in("report", path)]
    _show(reports)
    print(end="", flush=True)  # before what takes time
    for line in _write(reports, args.out or args.runs[0], args.html):
        print(line)
    return 0


def _show(reports: "Sequence[RunReport]") -> None:
    from trm_fast.cli._tables import printable, show
    from trm_fast.train.reports import tables

    if len(reports) > 1:
        show(tables.overview(reports))
    for report in reports:
        print(
            printable(f"\n{report.name} {report.label}: ".strip() + " " + tables.sentence(report))
        )
        print(printable(f"  {report.reason}"))
        for note in report.notes:
            print(printable(f"  note: {note}"))
        if len(reports) == 1:
            show(tables.evaluations(report, _SHOWN))
            show(tables.throughput(report))
            show(tables.environment(report))
            show(tables.checkpoints(report))
            show(tables.backends(report))
        show(tables.events(report, _SHOWN))


def _write(reports: "Sequence[RunReport]", out: Path, html: bool) -> list[str]:
    """Writes the files, each whole or not at all; returns what to say about them."""
    from trm_fast.train import files
    from trm_fast.train.reports.curves import png, svg
    from trm_fast.train.reports.page import page

    pages = {"curves.png": png(reports)}
    if html:
        pages["report.html"] = page(reports, svg(reports)).encode("utf-8", "replace")
    with files.explained("report", out):
        out.mkdir(parents=True, exist_ok=True)
        for name, data in pages.items():
            files.replace(out / name, data)
    kinds = {"curves.png": "curves", "report.html": "page"}
    return ["", *(f"{kinds[name]}: {out / name}" for name in pages)]
