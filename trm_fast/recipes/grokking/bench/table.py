"""The report of the grokking benchmark: Markdown tables and a figure of what is finished."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from trm_fast.recipes.grokking.bench.plan import FAMILIES, PLAIN, ROWS, VARIANTS, Row
from trm_fast.recipes.grokking.bench.runs import Outcome, Plan, Timing
from trm_fast.train import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Outcomes = dict[tuple[str, int], Outcome]

# The palette of Okabe and Ito, which most colour-blind readers can tell apart, and greys; a row
# beyond them gets the first colour again.
_PALETTE = (
    "#000000", "#8c8c8c", "#c0c0c0", "#0072b2", "#d55e00", "#009e73", "#56b4e9", "#cc79a7",
    "#e69f00", "#f0e442",
)  # fmt: skip
_COLOURS = {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(VARIANTS)}


def write_report(plan: Plan, path: Path) -> None:
    """Writes the report of all finished runs of a plan, and its figure as PNG beside it.

    Args:
        plan: the runs; those that are not finished are left open.
        path: Markdown file; the figure has the same name.

    Raises:
        ValueError: a file holds a run with other settings.
        ModuleNotFoundError: matplotlib is not installed.
    """
    outcomes = plan.outcomes()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = path.with_suffix(".png")
    if outcomes:
        draw_curves(plan, outcomes, picture)
    text = report(plan, outcomes, plan.timing(), picture.name if outcomes else "")
    files.replace(path, text.encode())


def report(plan: Plan, outcomes: Outcomes, timing: Timing | None, picture: str) -> str:
    """Returns the report as Markdown.

    Args:
        plan: the runs.
        outcomes: the finished ones.
        timing: measured time of the rows, or None.
        picture: address of the figure; empty if there is none.
    """
    target, limit = f"{100 * plan.base.target:.4g} %", f"{plan.base.iterations:,}"
    parts = [
        "# Grokking: every filter at equal weight decay",
        f"Iterations until the validation accuracy is {target}, on {plan.base.operation} mod "
        f"{plan.base.prime} with the published model, data and settings (Adam's betas "
        f"{plan.base.betas[0]:g} and {plan.base.betas[1]:g}, lr {plan.base.lr:g} after "
        f"{plan.base.warmup} iterations of warm-up, batch {plan.base.batch}); a run ends there or "
        f"after {limit} iterations. Optimizer and weight decay are the same within a block; "
        "what differs is the filter in front of the optimizer, or the learning rate without one.",
        _progress(plan, outcomes),
        *(_block(plan, family, outcomes, timing) for family in _families(plan)),
        _caption(plan, timing),
        _environments(outcomes.values(), timing),
        f"![validation accuracy over iterations]({picture})" if picture else "",
        "Made by `trm-fast bench grokking`, which goes on where it was interrupted.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _families(plan: Plan) -> list[str]:
    return list(dict.fromkeys(ROWS[row].family for row in plan.rows))


def _rows_of(plan: Plan, family: str) -> list[str]:
    return [row for row in plan.rows if ROWS[row].family == family]


def _progress(plan: Plan, outcomes: Outcomes) -> str:
    """Says which seeds the table is complete for."""
    counts = {seed: sum((row, seed) in outcomes for row in plan.rows) for seed in plan.seeds}
    whole = [str(seed) for seed in plan.seeds if counts[seed] == len(plan.rows)]
    if len(whole) == len(plan.seeds):
        return f"Seeds: {', '.join(whole)}; all {len(outcomes)} runs are finished."
    open_seeds = (
        f"{count} of {len(plan.rows)} rows of seed {seed}"
        for seed, count in counts.items()
        if count < len(plan.rows)
    )
    finished = [f"all rows of seed {seed}" for seed in whole]
    return f"**Not complete.** Finished: {', '.join([*finished, *open_seeds])}."


def _block(plan: Plan, family: str, outcomes: Outcomes, timing: Timing | None) -> str:
    label, decay = FAMILIES[family].label, FAMILIES[family].weight_decay
    seeds = [f"seed {seed}" for seed in plan.seeds]
    head = ["filter", *seeds, "median", "range", "gain", "ms each", "seconds"]
    lines = [head, ["---", *(["---:"] * (len(head) - 1))]]
    for row in _rows_of(plan, family):
        reached = _reached(plan, row, outcomes)
        seconds = timing.seconds.get(row) if timing else None
        cells = [_cell(plan, outcomes.get((row, seed))) for seed in plan.seeds]
        lines.append(
            [
                VARIANTS[ROWS[row].variant].label,
                *cells,
                _median_text(plan, reached),
                _range_text(plan, reached),
                _gain(plan, row, outcomes),
                "" if seconds is None else f"{1000 * seconds:.1f}",
                _seconds_text(plan, reached, seconds),
            ]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {label}, weight decay {decay:g}\n\n{table}"


def _reached(plan: Plan, row: str, outcomes: Outcomes) -> list[float]:
    """Returns the iterations of every finished seed, infinite where the target was not reached."""
    found = (outcomes.get((row, seed)) for seed in plan.seeds)
    iterations = (outcome.within(plan.base.iterations) for outcome in found if outcome)
    return [math.inf if value is None else value for value in iterations]


def _cell(plan: Plan, outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    reached = outcome.within(plan.base.iterations)
    if reached is not None:
        return f"{reached:,}"
    if outcome.diverged:
        return f"diverged at {outcome.iterations:,}"
    return f"> {plan.base.iterations:,} ({_accuracy_at(outcome, plan.base.iterations):.0%})"


def _accuracy_at(outcome: Outcome, iterations: int) -> float:
    """Returns the last validation accuracy up to ``iterations``."""
    curve = zip(outcome.curve["iteration"], outcome.curve["validation_accuracy"], strict=True)
    return next((y for x, y in reversed(list(curve)) if x <= iterations), 0.0)


def _median(reached: Sequence[float]) -> float:
    """Returns the median, infinite unless more than half of the runs have reached the target."""
    return median(reached) if reached else math.inf


def _median_text(plan: Plan, reached: Sequence[float]) -> str:
    if not reached:
        return ""
    value = _median(reached)
    return f"not within {plan.base.iterations:,}" if math.isinf(value) else f"**{value:,.0f}**"


def _range_text(plan: Plan, reached: Sequence[float]) -> str:
    if len(reached) < 2 or math.isinf(min(reached)):
        return ""
    most = f"> {plan.base.iterations:,}" if math.isinf(max(reached)) else f"{max(reached):,.0f}"
    return f"{min(reached):,.0f} to {most}"


def _gain(plan: Plan, row: str, outcomes: Outcomes) -> str:
    """Returns the iterations of the plain row over those of ``row``, seeds of both only."""
    plain = Row(ROWS[row].family, PLAIN).name
    both = [seed for seed in plan.seeds if {(plain, seed), (row, seed)} <= outcomes.keys()]
    if row == plain or plain not in plan.rows or not both:
        return ""
    common = {run: outcome for run, outcome in outcomes.items() if run[1] in both}
    before, after = (_median(_reached(plan, name, common)) for name in (plain, row))
    limit = plan.base.iterations
    if math.isinf(before) and math.isinf(after):
        return ""
    if math.isinf(before):
        return f"> {limit / after:.2g}"
    return f"< {before / limit:.2g}" if math.isinf(after) else f"{before / after:.2f}"


def _seconds_text(plan: Plan, reached: Sequence[float], seconds: float | None) -> str:
    if seconds is None or not reached:
        return ""
    value = _median(reached)
    if math.isinf(value):
        return f"> {plan.base.iterations * seconds:,.1f}"
    return f"{value * seconds:,.1f}"


def _caption(plan: Plan, timing: Timing | None) -> str:
    limit = f"{plan.base.iterations:,}"
    text = (
        f"`> {limit}` is a run that did not get there within {limit} iterations, with its "
        "validation accuracy at that point. The median counts such a run as infinite, so it is a "
        "number only if more than half of the seeds got there. *gain* is the median of the row "
        "`none` of the same table over that of the row: above 1, the row is faster. Validation "
        "takes place once per epoch. "
    )
    if timing is None:
        return text + "*ms each* and *seconds* are empty: the time is not measured yet."
    return text + (
        "*ms each* is the time of one iteration with its share of the evaluation, measured for all "
        f"rows in turns in one process (median of {timing.rounds} epochs); *seconds* is the median "
        "number of iterations times that."
    )


def _environments(outcomes: Iterable[Outcome], timing: Timing | None) -> str:
    """Says where the runs and the times come from."""
    runs = dict.fromkeys(_place(outcome.environment) for outcome in outcomes)
    texts = [f"Runs: {'; '.join(runs)}." if runs else ""]
    texts += [f"Times: {_place(timing.environment)}." if timing else ""]
    return " ".join(text for text in texts if text)


def _place(environment: dict[str, object]) -> str:
    threads = environment["threads"]
    return (
        f"{environment['processor']}, {threads} thread{'' if threads == 1 else 's'}, "
        f"torch {environment['torch']}, trm_fast {environment['trm_fast']}"
    )


def draw_curves(plan: Plan, outcomes: Outcomes, path: Path) -> None:
    """Draws validation accuracy over iterations: one panel per optimizer and weight decay, one
    colour per variant, a strong line for the seed of the median and thin ones for the others.

    Args:
        plan: the runs.
        outcomes: the finished ones, at least one.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    families = _families(plan)
    columns = min(2, len(families))
    lines = math.ceil(len(families) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * lines + 1.0), dpi=150, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, family in zip(panels, families, strict=False):
        _draw_panel(panel, plan, family, outcomes)
    for panel in panels[len(families) :]:
        panel.remove()
    shown = [name for name in VARIANTS if any(ROWS[row].variant == name for row in plan.rows)]
    figure.legend(
        [Line2D([], [], color=_COLOURS[name], linewidth=2) for name in shown],
        [VARIANTS[name].label for name in shown],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    files.replace(path, drawn.getvalue())


def _draw_panel(panel: "Axes", plan: Plan, family: str, outcomes: Outcomes) -> None:
    for row in _rows_of(plan, family):
        runs = [outcomes[row, seed] for seed in plan.seeds if (row, seed) in outcomes]
        runs.sort(key=lambda run: run.within(plan.base.iterations) or math.inf)
        middle = (len(runs) - 1) // 2
        for index, run in enumerate(runs):
            strong = index == middle
            # An epoch's accuracy jumps by a few percent, so thin lines are light.
            panel.plot(
                run.curve["iteration"],
                [100 * value for value in run.curve["validation_accuracy"]],
                color=_COLOURS[ROWS[row].variant],
                linewidth=1.8 if strong else 0.7,
                alpha=1.0 if strong else 0.45,
                zorder=3 if strong else 2,
            )
    panel.axhline(100 * plan.base.target, color="#b03a2e", linewidth=0.8, linestyle="--")
    panel.set_xscale("log")
    # Before that nothing has been seen to happen.
    panel.set_xlim(plan.base.iterations / 50, 1.05 * plan.base.iterations)
    panel.set_ylim(-2, 102)
    panel.set_xlabel("iterations (weight updates)", fontsize=9)
    panel.set_ylabel("validation accuracy, %", fontsize=9)
    label, decay = FAMILIES[family].label, FAMILIES[family].weight_decay
    panel.set_title(f"{label}, weight decay {decay:g}", fontsize=10)
    panel.grid(True, which="major", color="#e3e3e3", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
