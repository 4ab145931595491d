"""What lies between the steps of a run: records, evaluations, checkpoints, the change of stage."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from trm_fast.train._schedules import check_schedules
from trm_fast.train.callbacks import Callback
from trm_fast.train.curriculum import ENDED, Curriculum
from trm_fast.train.run import Record, Run


class StagedRun(Run, Protocol):
    """A run with the callbacks that are called between its steps."""

    callbacks: list[Callback]


class Actions(NamedTuple):
    """What a trainer can do between two steps.

    Args:
        check: looks for skipped steps.
        log: writes the record of the steps since the last one, if there are any.
        evaluate: returns the record of an evaluation, None if this step has had one, and whether
            it is the best of the stage.
        save: writes a checkpoint, unless there is one of what is now.
        pause: leaves some seconds out of the pace of the steps.
    """

    check: Callable[[], None]
    log: Callable[[], None]
    evaluate: Callable[[], tuple[Record | None, bool]]
    save: Callable[[], object]
    pause: Callable[[float], None]


class StageRunner:
    """Takes a run through its stages.

    Args:
        run: the run.
        curriculum: its stages.
        staged: whether it was given any; otherwise there is one stage of which nothing is said.
        actions: of the trainer.

    Attributes:
        wants_save: whether a hook has asked for a checkpoint, which is written when everything that
            belongs to the step is done.
    """

    def __init__(
        self, run: StagedRun, curriculum: Curriculum, staged: bool, actions: Actions
    ) -> None:
        self.run, self.curriculum, self.staged, self.actions = run, curriculum, staged, actions
        self.wants_save = False

    def begin(self) -> None:
        """Begins the first stage, or goes on after a resume. A checkpoint may be of the moment
        before a record, an evaluation or the end of a stage, and the stage may be another one now.
        """
        self.wants_save = False
        self.curriculum.sources.leave()
        if not self.curriculum.entered:
            self._begin_stage()
        self.curriculum.reopen()
        self._close_epochs()
        if self.curriculum.step > 0:
            if self._logs():
                self.actions.log()  # what an error has left out
            if self._evaluates() and self._last_evaluation() is None:
                self._between_steps(True, False)
            else:
                reason = self.curriculum.reason_to_end(self._last_evaluation())
                if reason is not None:
                    self._end_stage(reason)
        self._save_if_asked()

    def after_step(self, waits: bool) -> None:
        """After a step: check for skipped steps, log, evaluate, save, go on to another stage,
        whichever is due.

        Args:
            waits: whether looking for skipped steps would make the host wait for a GPU.
        """
        config = self.run.config
        epoch_ends = self._close_epochs()
        logs = self._logs()
        if logs or not waits:
            self.actions.check()
        if logs:
            self.actions.log()
        evaluates = self._evaluates()
        saves = self._is_due(config.save_every)
        if evaluates or saves or epoch_ends or self.curriculum.is_left or self.wants_save:
            self._between_steps(evaluates, saves)

    def after_batches(self) -> None:
        """Where no batch has come: an epoch is over, which shows only now, or all batches are."""
        epoch_ends = self._close_epochs()
        self._between_steps(False, False, None if epoch_ends else ENDED)

    def _between_steps(self, evaluates: bool, saves: bool, ended: str | None = None) -> None:
        began = self.run.elapsed()
        record, is_best = self.actions.evaluate() if evaluates else (None, False)
        reason = self.curriculum.reason_to_end(record) or ended
        if reason is not None and self.staged:
            self.actions.log()
        if is_best:
            # Before the stage ends: it is to be evaluated with the settings of its own stage.
            self.actions.save()
        if reason is not None:
            self._end_stage(reason)
        if saves:
            self.actions.save()
        self._save_if_asked()
        self.actions.pause(self.run.elapsed() - began)

    def _save_if_asked(self) -> None:
        if self.wants_save:
            self.wants_save = False
            self.actions.save()

    def _close_epochs(self) -> bool:
        """Calls callbacks for the epochs that are over; returns whether there are any."""
        found = False
        while self.curriculum.sources.new_epoch(self.curriculum.index):
            found = True
            for callback in self.run.callbacks:
                callback.on_epoch(self.run, self.run.epochs - 1)
        return found

    def _end_stage(self, reason: str) -> None:
        """Ends the stage and goes on with the next one, if there is one."""
        name = self.curriculum.stage.name
        over = f"stage {name!r} is over: {reason}" if self.staged else reason
        if self.curriculum.advance(self.run.step, reason):
            self._begin_stage(f"{over}; ")
        else:
            self.run.stop(over)

    def _begin_stage(self, before: str = "") -> None:
        """Begins the present stage.

        Args:
            before: what the event says first.
        """
        # Another stage has other data: its values are not to be compared.
        self.run.best = {}
        self.curriculum.enter(self.run)
        stage = self.curriculum.stage
        check_schedules(self.run.schedules, self.run.config, [stage], self.run.evaluator)
        if not self.staged:
            return
        self.run.event("stage", f"{before}stage {stage.name!r} begins")
        for callback in self.run.callbacks:
            callback.on_stage(self.run, stage.name)

    def _last_evaluation(self) -> Record | None:
        """Returns the record of an evaluation after the last step, if there was one."""
        if self.run.evaluated_at != self.run.step:
            return None
        seconds = round(self.run.elapsed(), 3)
        record: Record = {"kind": "evaluation", "step": self.run.step, "seconds": seconds}
        return record | self.run.metrics | self.place()

    def place(self) -> dict[str, float]:
        """Returns what records say of the stage."""
        found = self.curriculum
        return (
            {"curriculum/stage": found.index, "curriculum/step": found.step} if self.staged else {}
        )

    def _is_last(self) -> bool:
        steps = self.curriculum.stage.steps
        return steps is not None and self.curriculum.step >= steps

    def _logs(self) -> bool:
        """Returns whether a record of the steps belongs to this one."""
        return self._is_last() or self._is_due(self.run.config.log_every)

    def _evaluates(self) -> bool:
        """Returns whether an evaluation belongs to this step."""
        every, step = self.curriculum.stage.evaluate_every, self.curriculum.step
        if every is None:
            return self._is_last() or self._is_due(self.run.config.evaluate_every)
        return self._is_last() or (every > 0 and step % every == 0)

    def _is_due(self, every: int) -> bool:
        step = self.run.step
        return every > 0 and (step % every == 0 or step == self.run.config.steps)
