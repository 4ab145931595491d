"""What a grokking run shows: progress while it trains, the picture and the last lines."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trm_fast.recipes.grokking import Evaluation, GrokkingConfig, GrokkingResult

    Show = Callable[[Evaluation], None]

_FILTERS = {
    "ema": "GrokFast-EMA filter",
    "ma": "GrokFast-MA filter",
    "highpass": "high-pass filter",
    "projection": "projection filter",
    "cosine_gate": "cosine-gate filter",
    "none": "no filter",
}
_OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "muon": "Muon"}


def progress(config: "GrokkingConfig") -> AbstractContextManager["Show"]:
    """Returns a context whose value shows one evaluation: bars on a terminal, else plain lines."""
    return _bars(config) if sys.stdout.isatty() else _lines(config)


@contextmanager
def _lines(config: "GrokkingConfig") -> Iterator["Show"]:
    due = config.log_every

    def show(evaluation: "Evaluation") -> None:
        nonlocal due
        if evaluation.iteration >= due:
            due = evaluation.iteration - evaluation.iteration % config.log_every + config.log_every
            print(
                f"iteration {evaluation.iteration:6,}  "
                f"train {evaluation.train_accuracy:6.1%}  "
                f"validation {evaluation.validation_accuracy:6.1%}  "
                f"loss {evaluation.train_loss:.3f} / {evaluation.validation_loss:.3f}  "
                f"{evaluation.seconds:.1f} s",
                flush=True,
            )

    yield show


@contextmanager
def _bars(config: "GrokkingConfig") -> Iterator["Show"]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:>19}"),
        BarColumn(bar_width=40),
        TextColumn("{task.percentage:5.1f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # 4 redraws per second read as continuous and cost the training no measurable time.
    with Progress(*columns, refresh_per_second=4) as bars:
        train = bars.add_task("train accuracy", total=1.0, note="")
        validation = bars.add_task("validation accuracy", total=1.0, note="")

        def show(evaluation: "Evaluation") -> None:
            pace = 1000 * evaluation.seconds / evaluation.iteration
            bars.update(
                train,
                completed=evaluation.train_accuracy,
                note=f"iteration {evaluation.iteration:,}, {pace:.1f} ms each",
            )
            bars.update(
                validation,
                completed=evaluation.validation_accuracy,
                note=f"target {_percent(config.target)}",
            )

        yield show


def summary(result: "GrokkingResult", config: "GrokkingConfig") -> str:
    """Says in one line when the target was reached, if it was; then where the files are."""
    target, last, reached = _percent(config.target), result.last, result.reached
    if reached is None:
        text = (
            f"validation accuracy did not pass {target} within {last.iteration:,} iterations "
            f"({_percent(last.validation_accuracy)} after {last.seconds:.1f} s)"
        )
    else:
        text = (
            f"validation accuracy passed {target} at iteration {reached.iteration:,} "
            f"after {reached.seconds:.1f} s"
        )
    if result.picture is not None:
        text += f"\npicture: {result.picture}"
    return f"{text}\nmetrics: {result.out / 'metrics.jsonl'}"


def draw_accuracy(
    path: Path,
    history: "list[Evaluation]",
    reached: "Evaluation | None",
    config: "GrokkingConfig",
) -> None:
    """Draws train and validation accuracy over iterations, with a line where the target is met.

    Args:
        path: PNG file to write.
        history: at least one evaluation, in order.
        reached: the first evaluation at the target, or None.
        config: settings of the run, for the title and the target.
    """
    from matplotlib.figure import Figure

    iterations = [evaluation.iteration for evaluation in history]
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    curves = (
        ("train_accuracy", "train", "#8c8c8c"),
        ("validation_accuracy", "validation", "#1f5fa8"),
    )
    for field, label, colour in curves:
        values = [100 * getattr(evaluation, field) for evaluation in history]
        axes.plot(iterations, values, color=colour, linewidth=1.8, label=label)
    if reached is not None:
        axes.axvline(reached.iteration, color="#b03a2e", linewidth=1.0, linestyle="--")
        # Left of the crossing, at 72 %, no curve passes: train rises well before or close to it.
        axes.annotate(
            f"validation {_percent(config.target)}\nat iteration {reached.iteration:,}",
            xy=(reached.iteration, 100 * config.target),
            xytext=(0.4 * reached.iteration, 72),
            ha="right",
            va="center",
            color="#b03a2e",
            arrowprops={"arrowstyle": "-", "color": "#b03a2e", "linewidth": 0.8},
        )
    axes.set_xscale("log")
    axes.set_ylim(-2, 102)
    axes.set_xlabel("iterations (weight updates)")
    axes.set_ylabel("accuracy, %")
    axes.set_title(
        f"{config.operation} mod {config.prime}: {_OPTIMIZERS[config.optimizer]}, "
        f"{_FILTERS[config.filter]}, seed {config.seed}",
        fontsize=11,
    )
    axes.grid(True, which="major", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(path)


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
