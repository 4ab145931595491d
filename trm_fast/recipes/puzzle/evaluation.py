"""The official evaluation of a puzzle run, on the puzzles that are held out."""

from collections.abc import Iterable

from torch import Tensor, nn

from trm_fast.data.puzzles import evaluation_batches
from trm_fast.data.puzzles.arc_voting import ArcVoting
from trm_fast.nn import TinyRecursiveModel
from trm_fast.recipes.puzzle.config import PuzzleConfig
from trm_fast.recipes.puzzle.data import Splits
from trm_fast.train.batches import to_device
from trm_fast.train.distributed import World
from trm_fast.train.meter import Meter

_FIELDS = ("inputs", "puzzle_identifiers", "labels")


class Evaluation:
    """Official evaluation on the puzzles that are held out.

    Args:
        config: settings of the run.
        splits: its puzzles.
        world: the processes, each of which takes its part.
    """

    def __init__(self, config: PuzzleConfig, splits: Splits, world: World) -> None:
        self.config = config
        self.splits = splits
        self.world = world
        size = config.evaluation_batch
        self.batches = evaluation_batches(splits.test, size, world.rank, world.size)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, TinyRecursiveModel)
        batches = (to_device(batch, model.lm_head.device) for batch in self.batches)
        if self.splits.voting is not None:
            return self._vote(model, self.splits.voting, batches)
        return model.evaluate(batches, halt_weight=self.config.halt_weight)

    def _vote(
        self, model: TinyRecursiveModel, voting: ArcVoting, batches: Iterable[dict[str, Tensor]]
    ) -> dict[str, float]:
        """Returns pass@K, and what single answers are worth."""
        meter = Meter(model.lm_head.device)
        voting.begin()
        count = 0
        for batch in batches:
            inputs, ids, labels = (batch[name] for name in _FIELDS)
            found = model.predict(inputs, ids, early_halt=False)
            voting.update(inputs, ids, found.tokens, found.q_halt)
            wrong = ((found.tokens != labels) & (labels >= 0)).any(dim=1)
            count += len(wrong)
            meter.add({"exact_accuracy": ((~wrong).sum(), len(wrong))})
        voting.merge(self.world.gather(voting.state_dict()))
        return {"count": float(count), **meter.means(), **voting.scores()}
