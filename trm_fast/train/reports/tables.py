"""The tables of a report, as texts: for a terminal and for a page."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from trm_fast.train.reports.reading import Record, RunReport, is_share, metrics_of


class Table(NamedTuple):
    """A table of texts.

    Args:
        title: what it shows.
        header: of the columns; empty for none.
        rows: the texts.
        numeric: whether all columns but the first are numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numeric: bool = False


def sentence(report: RunReport) -> str:
    """Says in one sentence what the run has reached."""
    at = f"step {report.step:,}" + ("" if report.steps is None else f" of {report.steps:,}")
    if report.best is None or report.last is None:
        return f"{report.state} at {at}: there is no evaluation"
    best = metric_text(report.monitor, report.best[report.monitor])
    return (
        f"{report.state} at {at}: best {report.monitor} {best} at step {report.best['step']:,}, "
        f"last {metric_text(report.monitor, report.last.get(report.monitor, math.nan))}"
    )


def overview(reports: Sequence[RunReport]) -> Table:
    """One row for each run."""
    header = ("run", "state", "steps", "time", "steps/s", "metric", "best", "at step", "last")
    return Table("runs", header, [_overview(report) for report in reports], numeric=True)


def _overview(report: RunReport) -> tuple[str, ...]:
    best, last = report.best, report.last
    steps = f"{report.step:,}" + ("" if report.steps is None else f"/{report.steps:,}")
    return (
        report.label,
        report.state,
        steps,
        time_text(report.seconds),
        number(report.pace),
        report.monitor or "-",
        "-" if best is None else metric_text(report.monitor, best[report.monitor]),
        "-" if best is None else f"{best['step']:,}",
        "-" if last is None else metric_text(report.monitor, last.get(report.monitor, math.nan)),
    )


def evaluations(report: RunReport, most: int | None = None) -> Table:
    """The evaluations, the last ``most`` of them and the best one."""
    shown = report.evaluations if most is None else report.evaluations[-most:]
    if report.best is not None and report.best not in shown:
        shown = [report.best, *shown]
    names = list(dict.fromkeys(name for record in shown for name in metrics_of(record)))
    rows = [_evaluation(record, names, record is report.best) for record in shown]
    left = len(report.evaluations) - len(shown)
    title = "evaluations" + (f" ({left} more are not shown)" if left else "")
    return Table(title, ("step", "time", *names, ""), rows, numeric=True)


def _evaluation(record: Record, names: Sequence[str], is_best: bool) -> tuple[str, ...]:
    values = (metric_text(name, record[name]) if name in record else "-" for name in names)
    seconds = time_text(record["seconds"])
    return (f"{record['step']:,}", seconds, *values, "best" if is_best else "")


def throughput(report: RunReport) -> Table:
    """How fast the run was."""
    rows = [
        ("time", f"{time_text(report.seconds)}, evaluations and checkpoints included"),
        ("pace", f"{number(report.pace)} steps/s (median of the intervals)"),
    ]
    each = report.examples
    if each is not None and not math.isnan(report.pace):
        # The last batch of an epoch may be smaller.
        rate = number(report.pace * each)
        rows.append(("examples", f"at most {rate} per second, {each:,} per step"))
    skipped = sum(event["event"] == "skipped" for event in report.events)
    rows.append(("skipped steps", str(skipped)))
    return Table("throughput", (), rows)


def environment(report: RunReport) -> Table:
    """Machine and versions."""
    rows = [(str(name), value_text(value)) for name, value in report.environment.items()]
    return Table("machine and versions", (), rows)


def settings(report: RunReport) -> Table:
    """Every setting."""
    rows = [(name, value_text(value)) for name, value in report.settings.items()]
    return Table("settings", (), rows)


def checkpoints(report: RunReport) -> Table:
    """The checkpoints that are there, and what is wrong with them."""
    rows = []
    for info in report.checkpoints:
        name = info.path.name
        roles = [("latest", report.latest), ("best", report.best_checkpoint)]
        marks = ", ".join(role for role, pointed in roles if pointed == name)
        score = "-" if info.score is None else number(info.score)
        # All metrics of a step stand among the evaluations.
        shown = _summary(report.monitor, info.summary.get(report.monitor))
        size = size_text(info.size) if info.damage is None else "-"
        rows.append((name, size, score, marks, shown if info.damage is None else info.damage))
    header = ("checkpoint", "size", "score", "", report.monitor or "evaluation")
    return Table("checkpoints (contents are verified when they are loaded)", header, rows)


def _summary(name: str, value: Any) -> str:
    if isinstance(value, float):
        return metric_text(name, value)
    return "-" if value is None else value_text(value)


def backends(report: RunReport) -> Table:
    """What ran each op that the run has called, and why nothing faster did; each process that goes
    on with a run reports it again."""
    rows = []
    for name, op in report.backends.items():
        fallbacks = op.get("fallbacks", {})
        for call, backend in op.get("calls", {}).items():
            reasons = [reason for name, reason in fallbacks.items() if name.startswith(f"{call} ")]
            rows.append((name, call, str(backend), "; ".join(map(str, reasons)) or "-"))
    return Table(
        "backends (in the last process of the run)", ("op", "call", "ran on", "not on"), rows
    )


def events(report: RunReport, most: int | None = None) -> Table:
    """What did not go as planned, the last ``most`` events."""
    shown = report.events if most is None else report.events[-most:]
    rows = [(f"{event['step']:,}", event["event"], event["message"]) for event in shown]
    left = len(report.events) - len(shown)
    title = "events" + (f" ({left} earlier ones are not shown)" if left else "")
    return Table(title, ("step", "event", "message"), rows)


def metric_text(name: str, value: float) -> str:
    """Returns a metric in the form in which it is read."""
    if is_share(name) and math.isfinite(value):
        return f"{100 * value:.2f} %"
    return f"{value:,.0f}" if name == "count" and math.isfinite(value) else number(value)


def number(value: float) -> str:
    """Returns a number with four digits, a large one as a whole number; "-" for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"


def value_text(value: Any) -> str:
    """Returns a setting as one writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    return f"{value:,}" if type(value) is int and abs(value) >= 10_000 else str(value)


def time_text(seconds: float) -> str:
    """Returns a time such as "8.2 s", "12:05" (minutes) or "3:01:07" (hours); "-" for none."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def size_text(count: int) -> str:
    """Returns a number of bytes such as "1.25 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
