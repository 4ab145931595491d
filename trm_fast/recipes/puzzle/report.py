"""What is shown after a puzzle run."""

from contextlib import nullcontext

from trm_fast.data.puzzles.forms import exact_keys, repeats
from trm_fast.nn import TinyRecursiveModel
from trm_fast.recipes.puzzle.baselines import elimination, most_common
from trm_fast.recipes.puzzle.config import ArcConfig, SudokuConfig
from trm_fast.recipes.puzzle.data import Splits
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


def _voted(summary: Summary, splits: Splits) -> list[str]:
    shares = ", ".join(
        f"{share:.1%} {name}" for name, share in summary.metrics.items() if name.startswith("pass@")
    )
    tasks = summary.metrics["tasks"]
    return [
        f"solved by vote, of {tasks:.0f} evaluation tasks: {shares}",
        f"test pairs: {_seen(splits) or 'none that it has seen in training'}",
    ]


def _seen(splits: Splits) -> str:
    """Says how many of the test puzzles are in the training data; nothing if none is."""
    found = repeats([splits.train], [splits.test], splits.keys_of)
    form = "" if splits.keys_of is exact_keys else ", or a form of one that augmentation draws"
    return f"{found.seen:,} of {found.of:,} are in the training data{form}" * (found.seen > 0)


def _solved(trainer: Trainer, summary: Summary) -> list[str]:
    evaluation, model = trainer.evaluator, trainer.model
    assert isinstance(evaluation, Evaluation) and isinstance(model, TinyRecursiveModel)
    config, splits = evaluation.config, evaluation.splits
    share, count = summary.metrics["exact_accuracy"], summary.metrics["count"]
    if isinstance(config, ArcConfig):
        return _voted(summary, splits)
    seen = _seen(splits)
    known = f", but {seen}" if seen else " that it has never seen"
    lines = [f"exactly solved: {share:.1%} of {count:,.0f} puzzles{known}"]
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
