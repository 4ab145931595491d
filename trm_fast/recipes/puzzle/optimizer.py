"""The optimizers of a puzzle run: one for the weights, and sign descent for the puzzle vectors."""

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from trm_fast.nn import TinyRecursiveModel
from trm_fast.optim import SparseSignSGD
from trm_fast.recipes.optimizers import OptimizerConfig, make_optimizer


@dataclass(frozen=True)
class PuzzleOptimizerConfig(OptimizerConfig):
    """Optimizer, gradient filter and learning rates.

    Args:
        puzzle_lr: learning rate of the puzzle vectors, whose steps are of the size of their sign.
        puzzle_weight_decay: weight decay of the puzzle vectors.
    """

    puzzle_lr: float = 1e-4
    puzzle_weight_decay: float = 0.1


def make_puzzle_optimizers(
    model: TinyRecursiveModel, config: PuzzleOptimizerConfig, ema: float | None
) -> list[Optimizer]:
    """Returns the optimizer of the weights, and that of the puzzle vectors if there are any.

    Args:
        model: whose parameters are stepped.
        config: settings.
        ema: as for ``make_optimizer``.
    """
    heads: list[Any] = [model.lm_head, model.q_head]
    options: dict[str, Any] = {"heads": heads, "matrices": [model.recursion]}
    optimizers = [make_optimizer(model, config, ema, **options)]
    if model.puzzles is not None:
        optimizers.append(
            SparseSignSGD(
                [model.puzzles.table], lr=config.puzzle_lr, weight_decay=config.puzzle_weight_decay
            )
        )
    return optimizers
