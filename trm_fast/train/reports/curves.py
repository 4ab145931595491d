"""The curves of runs: loss, shares and pace over steps, as a PNG or as an SVG for a page."""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trm_fast.train.reports.reading import Record, RunReport, is_share, metrics_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Mid tones, which are seen on white and on black.
COLOURS = (
    "#3b82c4", "#d97a1e", "#3f9b57", "#c2477f", "#8a6bd1", "#9a7b4f", "#2aa3a3", "#b3483b",
)  # fmt: skip
_TRAINING = "#8c8c8c"
# Stand for the colours of the page that an SVG is put into.
_INK, _LINE = "#010203", "#040506"
_FEW = 40  # evaluations that are marked one by one
# Shares that are drawn: more would be a tangle.
_MOST_SHARES = 2


def png(reports: Sequence[RunReport]) -> bytes:
    """Returns the curves as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    file = io.BytesIO()
    _figure(reports, "#222222", "#e0e0e0").savefig(file, format="png", dpi=150)
    return file.getvalue()


def svg(reports: Sequence[RunReport]) -> str:
    """Returns the curves as an SVG element, in the colours ``currentColor`` and ``--line`` of the
    page around it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import rc_context

    file = io.StringIO()
    # Text stays text, and the same run gives the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "trm_fast"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure = _figure(reports, _INK, _LINE)
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    # The size is the page's to decide; the view box keeps the proportions.
    return re.sub(r'^(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)


def _figure(reports: Sequence[RunReport], ink: str, line: str) -> "Figure":
    from matplotlib.figure import Figure

    shares = shown_shares(reports)
    heights = [3.0, *([3.0] if shares else []), 1.5]
    figure = Figure(figsize=(7.6, 1.0 + 0.93 * sum(heights)), layout="constrained")
    rows: Any = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    panels: list[Axes] = list(rows[:, 0])
    _loss(panels[0], reports)
    if shares:
        _shares(panels[1], reports, shares)
    _pace(panels[-1], reports)
    panels[-1].set_xlabel("steps (updates of the weights)")
    names = ", ".join(dict.fromkeys(report.name for report in reports))
    only = reports[0] if len(reports) == 1 else None
    what = only.label if only else f"{len(reports)} runs (thick: evaluation, thin: training)"
    figure.suptitle(_plain(f"{names}: {what}"), fontsize=11, color=ink)
    for axes in panels:
        _mark_resumes(axes, reports, ink)
        # The colours of several runs are the same in all panels.
        _style(axes, ink, line, legend=only is not None or axes is panels[0])
    return figure


def _style(axes: "Axes", ink: str, line: str, legend: bool) -> None:
    axes.set_facecolor("none")
    axes.grid(True, color=line, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    axes.tick_params(colors=ink, labelsize=8.5)
    axes.margins(x=0.015)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(ink)
        label.set_fontsize(9.5)
    handles, _ = axes.get_legend_handles_labels()
    if handles and legend:
        axes.legend(frameon=False, labelcolor=ink, fontsize=8.5)


def shown_shares(reports: Sequence[RunReport]) -> list[str]:
    """Returns the names of the shares that are drawn, without "train_" or "validation_"; of several
    runs one share."""
    found = [
        _bare(name)
        for report in reports
        for record in (*report.evaluations[-1:], *report.train[-1:])
        for name in metrics_of(record)
        if is_share(name)
    ]
    monitored = [_bare(report.monitor) for report in reports if is_share(report.monitor)]
    wanted = dict.fromkeys(
        [*monitored, *(n for n in ("exact_accuracy", "accuracy") if n in found), *found]
    )
    return list(wanted)[: 1 if len(reports) > 1 else _MOST_SHARES]


def _loss(axes: "Axes", reports: Sequence[RunReport]) -> None:
    """Draws a loss that training and evaluation have in common, if there is one."""
    drawn: list[str] = []
    for place, report in enumerate(reports):
        names = [
            [_bare(name) for record in records[-1:] for name in metrics_of(record)]
            for records in (report.train, report.evaluations)
        ]
        losses = [[name for name in found if name.endswith("loss")] for found in names]
        order = ("lm_loss", "loss")
        common = [name for name in (*order, *losses[0]) if name in losses[0] and name in losses[1]]
        for kind, records, own in (
            ("training", report.train, losses[0]),
            ("evaluation", report.evaluations, losses[1]),
        ):
            best = [name for name in ("loss", "lm_loss", *own) if name in own]
            if common or best:
                name = (common or best)[0]
                drawn.append(name)
                label = _label(reports, report, name, kind)
                _draw(axes, records, name, kind, _colour(reports, place, kind), label)
    axes.set_ylabel(" / ".join(dict.fromkeys(drawn)) or "loss")


def _shares(axes: "Axes", reports: Sequence[RunReport], shares: Sequence[str]) -> None:
    for place, report in enumerate(reports):
        for number, name in enumerate(shares):
            colour = COLOURS[(place if len(reports) > 1 else number) % len(COLOURS)]
            for kind, records in (("training", report.train), ("evaluation", report.evaluations)):
                label = _label(reports, report, name, kind)
                _draw(axes, records, name, kind, colour, label, scale=100.0)
    axes.set_ylabel(f"{shares[0] if len(shares) == 1 else 'share'}, %")


def _pace(axes: "Axes", reports: Sequence[RunReport]) -> None:
    for place, report in enumerate(reports):
        points = _points(report.train, lambda record: record.get("steps_per_second"))
        colour = COLOURS[place % len(COLOURS)] if len(reports) > 1 else _TRAINING
        axes.plot(*points, color=colour, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("steps/s")


def _draw(
    axes: "Axes", records: list[Record], name: str, kind: str, colour: str, label: str | None,
    scale: float = 1.0,
) -> None:  # fmt: skip
    def value(record: Record) -> float | None:
        numbers = {_bare(key): found for key, found in metrics_of(record).items()}
        return scale * numbers[name] if name in numbers else None

    steps, values = _points(records, value)
    if not steps:
        return
    is_evaluation = kind == "evaluation"
    axes.plot(
        steps,
        values,
        color=colour,
        linewidth=1.9 if is_evaluation else 1.1,
        alpha=1.0 if is_evaluation else 0.55,
        marker="o" if is_evaluation and len(steps) <= _FEW else None,
        markersize=3.2,
        label=label,
    )


def _points(
    records: list[Record], value: Callable[[Record], float | None]
) -> tuple[list[int], list[float]]:
    found = [(record["step"], value(record)) for record in records]
    known = [(step, number) for step, number in found if number is not None]
    # A gap in the line is the truth about a NaN; an infinity would be no place.
    return (
        [step for step, _ in known],
        [number if math.isfinite(number) else math.nan for _, number in known],
    )


def _mark_resumes(axes: "Axes", reports: Sequence[RunReport], ink: str) -> None:
    if len(reports) > 1:
        return
    resumed = [event["step"] for event in reports[0].events if event["event"] == "resumed"]
    for place, step in enumerate(resumed):
        label = None if place else "resumed"
        axes.axvline(step, color=ink, alpha=0.5, linewidth=0.9, linestyle="--", label=label)


def _colour(reports: Sequence[RunReport], place: int, kind: str) -> str:
    if len(reports) > 1:
        return COLOURS[place % len(COLOURS)]
    return COLOURS[0] if kind == "evaluation" else _TRAINING


def _label(reports: Sequence[RunReport], report: RunReport, name: str, kind: str) -> str | None:
    if len(reports) == 1:
        return _plain(f"{name}, {kind}")
    return _plain(report.label) if kind == "evaluation" or not report.evaluations else None


def _bare(name: str) -> str:
    return re.sub(r"^(?:train|validation)_", "", name)


def _plain(label: str) -> str:
    """Returns a text that matplotlib takes as it is: no formula, and not hidden."""
    printable = "".join(character if character.isprintable() else "?" for character in label)
    # matplotlib leaves labels with a leading underscore out of its legend.
    return f"{' ' * printable.startswith('_')}{printable}".replace("$", r"\$")
