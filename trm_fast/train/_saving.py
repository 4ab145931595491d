"""When a run writes a checkpoint: at most one of each place that it comes to."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from trm_fast.train._run_files import RunFiles
from trm_fast.train.checkpoints.resumable import Resumable
from trm_fast.train.checkpoints.snapshot import own_buffers, snapshot


class RunWithFiles(Resumable, Protocol):
    """A run that is saved."""

    files: RunFiles


class Saving:
    """Writes the checkpoints of a run.

    Args:
        run: the run.
        check: looks for skipped steps; a verdict that is still open would be lost.
    """

    def __init__(self, run: RunWithFiles, check: Callable[[], None]) -> None:
        self.run, self.check = run, check
        self._last: tuple[tuple[int, ...], Path] | None = None
        self._rehearses = False

    @property
    def is_done(self) -> bool:
        """Whether there is a checkpoint of what is now."""
        return self._last is not None and self._last[0] == self._place()

    def go_on_from(self, path: Path) -> None:
        """Takes a checkpoint for that of what is now."""
        self._last = self._place(), path

    def require_savable(self) -> None:
        """Refuses, before the first step, what the first checkpoint could not hold; see
        ``RunFiles.require_savable``."""
        if self.run.files.checkpoints is not None:
            self.run.files.require_savable(snapshot(self.run), own_buffers(self.run))
        self._rehearses = True

    def rehearse(self) -> None:
        """Does so again, once, after the first step: it may have brought states that were not there
        before, as those of optimizers."""
        if self._rehearses:
            self.require_savable()
            self._rehearses = False

    def save(self) -> Path | None:
        """Writes a checkpoint, unless there is one of what is now; see ``Trainer.save``."""
        run, checkpoints = self.run, self.run.files.checkpoints
        if checkpoints is None:
            return None
        if self._last is not None and self.is_done:
            return self._last[1]
        self.check()
        now, state = self._place(), snapshot(run)
        if run.world.is_main:
            stages = run.curriculum
            path = run.files.save(
                run.step,
                state,
                score=self._score(),
                summary=dict(run.metrics),
                best_after=max(run.best_after, run.step - stages.step if stages.history else -1),
                infinite=own_buffers(run),
            )
            self._last = now, path
            for left in checkpoints.left:
                run.event("left", left)
            for callback in run.callbacks:
                callback.on_save(run, path)
        else:
            self._last = now, checkpoints.directory
        run.world.barrier()
        return self._last[1]

    def _place(self) -> tuple[int, ...]:
        """Returns what differs where another checkpoint is worth writing."""
        run, stages = self.run, self.run.curriculum
        return run.step, run.evaluated_at, run.extra.count, len(stages.history), stages.is_left

    def _score(self) -> float | None:
        """Returns the monitored metric, larger where better, if it is of what is now."""
        run, monitor = self.run, self.run.config.monitor
        if monitor not in run.metrics or run.evaluated_at != run.step:
            return None
        if run.curriculum.step == 0 and run.curriculum.history:
            return None  # the evaluation was of the stage before
        score = run.metrics[monitor] * (1.0 if run.config.mode == "max" else -1.0)
        return score if math.isfinite(score) else None
