"""What a grokking run has found: its evaluations, the picture and the last line."""

import dataclasses
import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trm_fast.recipes.grokking.config import GrokkingConfig
from trm_fast.train import Callback, Record, Run, Summary, Trainer, files

_OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "muon": "Muon"}


@dataclass(frozen=True)
class Evaluation:
    """State of the run after one epoch.

    Args:
        iteration: weight updates so far.
        seconds: wall time since training began, evaluations included.
        train_accuracy: share of right answers in the epoch, each taken before its update.
        validation_accuracy: share of right answers on the validation half, after the epoch.
        train_loss: mean cross entropy in the epoch, in nats per equation.
        validation_loss: mean cross entropy on the validation half, in nats per equation.
    """

    iteration: int
    seconds: float
    train_accuracy: float
    validation_accuracy: float
    train_loss: float
    validation_loss: float


def evaluations(history: Sequence[Record]) -> list[Evaluation]:
    """Joins the records of training and evaluation of each epoch."""
    steps: dict[int, Record] = {}
    for record in history:
        steps.setdefault(record["step"], {}).update(record)
    names = [field.name for field in dataclasses.fields(Evaluation)]
    return [
        Evaluation(**{name: {**found, "iteration": step}[name] for name in names})
        for step, found in steps.items()
        if "validation_loss" in found
    ]


def first_at(history: Sequence[Evaluation], target: float) -> Evaluation | None:
    """Returns the first evaluation whose validation accuracy is at or above the target, or None."""
    return next((found for found in history if found.validation_accuracy >= target), None)


def outcome(history: Sequence[Evaluation], reached: Evaluation | None, target: float) -> str:
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
    history: Sequence[Evaluation],
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
        f"{_filter(config.filter)}, seed {config.seed}",
        fontsize=11,
    )
    axes.grid(True, which="major", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    files.replace(path, drawn.getvalue())


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _filter(name: str) -> str:
    return "no filter" if name == "none" else f"filter {name}"


class Picture(Callback):
    """Draws accuracy.png when the run ends, also when it is interrupted."""

    def __init__(self, config: GrokkingConfig) -> None:
        # A missing matplotlib has to show now, not after the training.
        importlib.import_module("matplotlib.figure")
        self.config = config

    def on_end(self, run: Run, summary: Summary) -> None:
        history = evaluations(run.history)
        if history and run.out is not None and run.world.is_main:
            draw_accuracy(run.out / "accuracy.png", history, self.config)


def finish(trainer: Trainer, summary: Summary) -> list[str]:
    """Returns the lines that are shown after a run."""
    config = GrokkingConfig(**trainer.settings)
    history = evaluations(trainer.history)
    reached = first_at(history, config.target)
    lines = [outcome(history, reached, config.target)]
    if trainer.out is not None and config.plot:
        lines.append(f"picture: {trainer.out / 'accuracy.png'}")
    return lines
