"""What a grokking run shows at its end: the picture and the last line."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trm_fast.recipes.grokking import Evaluation, GrokkingConfig

_FILTERS = {
    "ema": "GrokFast-EMA filter",
    "ma": "GrokFast-MA filter",
    "highpass": "high-pass filter",
    "projection": "projection filter",
    "cosine_gate": "cosine-gate filter",
    "none": "no filter",
}
_OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "muon": "Muon"}


def first_at(history: "Sequence[Evaluation]", target: float) -> "Evaluation | None":
    """Returns the first evaluation whose validation accuracy is at or above the target, or None."""
    return next((found for found in history if found.validation_accuracy >= target), None)


def told(history: "Sequence[Evaluation]", reached: "Evaluation | None", target: float) -> str:
    """Says in one line when the target was reached, if it was."""
    if reached is not None:
        return (
            f"validation accuracy passed {_percent(target)} at iteration {reached.iteration:,} "
            f"after {reached.seconds:.1f} s"
        )
    if not history:
        return "there was no evaluation"
    last = history[-1]
    return (
        f"validation accuracy did not pass {_percent(target)} within {last.iteration:,} iterations "
        f"({_percent(last.validation_accuracy)} after {last.seconds:.1f} s)"
    )


def draw_accuracy(
    path: Path,
    history: "Sequence[Evaluation]",
    config: "GrokkingConfig",
) -> None:
    """Draws train and validation accuracy over iterations, with a line where the target is met.

    Args:
        path: PNG file to write.
        history: at least one evaluation, in order.
        config: settings of the run, for the title and the target.
    """
    from matplotlib.figure import Figure

    reached = first_at(history, config.target)
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
