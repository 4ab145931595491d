"""``trm-fast bench grokking``: the command, without torch until it runs."""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trm_fast._paths import expanded
from trm_fast.recipes.grokking.bench.plan import DEFAULT, FAMILIES, VARIANTS, select_rows

HELP = "Compares optimizers and filters at equal weight decay on the grokking recipe."


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(_number(word, 0) for word in _words(text))


def _count(text: str) -> int:
    return _number(text, 1)


def _number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}; got {text!r}")
    return int(text)


# Flag, how its text is read, default, name of the value and description.
_OPTIONS: tuple[tuple[str, Callable[[str], Any], Any, str, str], ...] = (
    ("--rows", _words, DEFAULT, "ROW,...", "rows, with * for any text"),
    ("--seeds", _seeds, (0, 1, 2), "SEED,...", "seeds; each trains all rows before the next"),
    ("--iterations", _count, 3000, "N", "iterations after which a run gives up"),
    ("--prime", _count, 97, "P", "modulus of the equations"),
    ("--device", str, "cpu", "NAME", "auto, cpu or another torch device"),
    ("--out", expanded, Path("runs/bench-grokking"), "DIR", "directory of the runs"),
    ("--report", expanded, None, "FILE.md", "report; its figure lies beside it, as PNG"),
    ("--jobs", _count, 1, "N", "processes"),
    ("--threads", _count, 1, "N", "threads of each process"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options, and to the help the names of the rows."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(
        [
            "A row is named FAMILY-VARIANT.",
            "families:",
            *(f"  {name:14} {family.label}" for name, family in FAMILIES.items()),
            "variants:",
            *(f"  {name:14} {variant.label}" for name, variant in VARIANTS.items()),
            "",
            "A finished run is one file below --out and is never trained again, so the command",
            "may be interrupted and repeated, and several may run at once.",
        ]
    )
    for flag, read, default, metavar, help in _OPTIONS:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        help = f"{help} (default: {shown or 'report.md below --out'})"
        parser.add_argument(flag, type=read, default=default, metavar=metavar, help=help)
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--time",
        action="store_true",
        help="train no runs; measure the seconds per iteration of all rows, in turns",
    )
    only.add_argument(
        "--report-only",
        action="store_true",
        help="train no runs; write the report of those that are finished",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and writes its report, also when it is interrupted.

    Returns:
        0, or 1 if a run has diverged.

    Raises:
        ValueError: an option is wrong, or ``--out`` holds other runs.
        ModuleNotFoundError: matplotlib is not installed.
    """
    rows = select_rows(args.rows)
    report = args.report or args.out / "report.md"
    if report.suffix != ".md":
        raise ValueError(f"bench grokking: --report must end in .md; got {report}")
    # A missing matplotlib has to show now, not after the training.
    importlib.import_module("matplotlib.figure")
    from trm_fast.recipes.grokking.bench.runs import Plan, measure_time, train_missing
    from trm_fast.recipes.grokking.bench.table import write_report
    from trm_fast.recipes.grokking.config import GrokkingConfig

    base = GrokkingConfig(iterations=args.iterations, prime=args.prime, device=args.device)
    plan = Plan(rows, args.seeds, base, args.out)
    try:
        if args.time:
            measure_time(plan, args.threads)
        elif not args.report_only:
            train_missing(plan, args.jobs, args.threads)
    except KeyboardInterrupt:
        write_report(plan, report)
        raise
    write_report(plan, report)
    print(f"report: {report}")
    return int(any(outcome.diverged for outcome in plan.outcomes().values()))
