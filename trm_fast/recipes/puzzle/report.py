"""What is shown after a puzzle run."""

from contextlib import nullcontext

from trm_fast.nn import TinyRecursiveModel
from trm_fast.recipes.puzzle.baselines import elimination, most_common
from trm_fast.recipes.puzzle.config import ArcConfig, SudokuConfig
from trm_fast.recipes.puzzle.evaluation import Evaluation
from trm_fast.recipes.puzzle.show import (
    MAZE_LEGEND,
    Draw,
    draw_maze,
    draw_sudoku,
    solve_aloud,
    sudoku_legend,
)
from trm_fast.recipes.recipe import how_it_ended
from trm_fast.train import Summary, Trainer


def finish(trainer: Trainer, summary: Summary) -> list[str]:
    """Returns the lines that are shown after a run: what is solved, by what else, and how."""
    lines = how_it_ended(summary)
    if summary.signal is None and summary.metrics:
        lines += _solved(trainer, summary)
    if trainer.out is not None:
        lines += ["", f"report: trm-fast report {trainer.out} --html"]
    return lines


def _voted(summary: Summary) -> list[str]:
    shares = ", ".join(
        f"{share:.1%} {name}" for name, share in summary.metrics.items() if name.startswith("pass@")
    )
    tasks = summary.metrics["tasks"]
    return [f"solved by vote, of {tasks:.0f} evaluation tasks: {shares}"]


def _solved(trainer: Trainer, summary: Summary) -> list[str]:
    evaluation, model = trainer.evaluator, trainer.model
    assert isinstance(evaluation, Evaluation) and isinstance(model, TinyRecursiveModel)
    config, splits = evaluation.config, evaluation.splits
    share, count = summary.metrics["exact_accuracy"], summary.metrics["count"]
    lines = [f"exactly solved: {share:.1%} of {count:,.0f} puzzles that it has never seen"]
    if isinstance(config, ArcConfig):
        return _voted(summary)
    if isinstance(config, SudokuConfig):
        draw: Draw = draw_sudoku
        legend = sudoku_legend()
        lines.append(
            f"without a model: {most_common(splits.train, splits.test):.1%} with the digit that is "
            f"most common in each cell, {elimination(splits.test, 1):.1%} by elimination once and "
            f"guessing, {elimination(splits.test):.1%} by elimination to its end and guessing"
        )
    else:
        draw, legend = draw_maze(config.data.width), MAZE_LEGEND
    averaged = nullcontext() if trainer.ema is None else trainer.ema.swapped()
    with averaged:
        return [*lines, "", legend, *solve_aloud(model, splits.test, draw)]
