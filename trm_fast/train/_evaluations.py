"""Evaluations of a run, which a signal may leave."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from trm_fast.nn.evaluating import evaluating
from trm_fast.train._interval import check_names, numbers_of
from trm_fast.train._schedules import takes_metric
from trm_fast.train.callbacks import is_better, metric
from trm_fast.train.distributed import gathered
from trm_fast.train.generators import fork_rng
from trm_fast.train.run import Record, Run


class Evaluations:
    """Evaluates the model of a run.

    Args:
        run: the run.
        save: writes a checkpoint, unless there is one of what is now.
        leaving: returns what lets a signal end the work within it.
    """

    def __init__(
        self,
        run: Run,
        save: Callable[[], object],
        leaving: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.run, self.save, self.leaving = run, save, leaving

    def metrics(self, within: AbstractContextManager[None] | None = None) -> dict[str, float]:
        """Returns the metrics of the model with its averaged weights; see ``Trainer.evaluate``.

        Args:
            within: is entered around the evaluation alone, so that what is left by it still gives
                back generators and weights.
        """
        run = self.run
        if run.evaluator is None:
            raise ValueError("Trainer: evaluate() needs the argument evaluate; got None")
        averaged = nullcontext() if run.ema is None else run.ema.swapped()
        with evaluating(run.model), fork_rng(run.world.device), torch.no_grad(), averaged:
            with gathered(run.model), within or nullcontext():
                found = run.evaluator(run.model)
        return run.world.mean(numbers_of(found))

    def safe_metrics(self) -> dict[str, float]:
        """Returns the metrics for a record; a signal leaves the evaluation of one process."""
        alone = self.run.world.size == 1
        if not alone:
            # No process can leave the others alone, which may wait for it.
            self.save()
        found = self.metrics(self.leaving() if alone else None)
        check_names(found, "the evaluation")
        return found

    def judge(self, record: Record) -> bool:
        """Steps the schedules that take the monitored metric; returns whether it is the best."""
        monitor, mode = self.run.config.monitor, self.run.config.mode
        for schedule in self.run.schedules:
            if takes_metric(schedule):
                schedule.step(metric(record, monitor, "Trainer: monitor"))
        if not monitor:
            return False
        value = metric(record, monitor, "Trainer: monitor")
        best = self.run.best.get(monitor, math.nan)
        return math.isfinite(value) and is_better(value, best, mode)
