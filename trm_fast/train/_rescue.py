"""What an error leaves of a run: the steps that were finished before it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from trm_fast.train._guard import NonFiniteError
from trm_fast.train._saving import RunWithFiles, Saving
from trm_fast.train._update import Update


class Rescue:
    """Saves the finished steps before an error ends a run.

    The error may come in the next step, after its batches were drawn and before its weights move:
    the place in the data and torch's generators then go back to the end of the last step.

    Args:
        run: the run.
        update: of the run, which knows whether the weights are being moved.
        saving: writes its checkpoints.
        say: is given one line for the person who waits.
    """

    def __init__(
        self, run: RunWithFiles, update: Update, saving: Saving, say: Callable[[str], None]
    ) -> None:
        self.run, self.update, self.saving, self.say = run, update, saving, say
        self._generators = _generators(run.world.device)
        self._before: tuple[list[Tensor], Any] | None = None
        self._reported: Exception | None = None

    def begin_step(self) -> None:
        """Notes what the next step draws from; nothing of it has been drawn yet."""
        if not self._can_save:
            return
        stages = self.run.curriculum
        states = [generator.get_state() for generator in self._generators]
        self._before = states, stages.sources.mark(stages.index)

    def end_step(self) -> None:
        """Takes the step for finished: its weights have moved, or there was no batch for it."""
        self._before = None

    @contextmanager
    def saved_on_error(self) -> Iterator[None]:
        """Saves what is finished before an error ends the run, which is raised on."""
        try:
            yield
        except Exception as error:
            self.save_before(error)
            raise

    def _report(self, error: Exception) -> None:
        # One that stops a run for its steps has been reported.
        if isinstance(error, NonFiniteError) or error is self._reported:
            return
        self._reported = error
        with suppress(Exception):  # it may come from the disk that the event would be written to
            reason = " ".join(str(error).split())[:500]
            self.run.event("failed", f"{type(error).__name__}: {reason}")

    def save_before(self, error: Exception) -> None:
        """Records the error, and saves what is finished or says in one line why that cannot be."""
        self._report(error)
        run, saving = self.run, self.saving
        if not self._can_save:
            return
        # One that stops a run for its steps has saved before.
        if isinstance(error, NonFiniteError) or saving.is_done or run.step == run.extra.count == 0:
            return
        if self.update.is_moving:
            self._say("the error came in the middle of an update, half of which is in the weights")
            return
        try:
            self._give_back()
            with suppress(Exception):
                # It keeps its counts also where what it tells of them cannot be written.
                saving.check()
            saving.save()
        except Exception as reason:
            if not saving.is_done:
                self._say(" ".join(str(reason).split()) or type(reason).__name__)

    @property
    def _can_save(self) -> bool:
        # Of several processes only one may have met an error, and all must take part in saving.
        return self.run.world.size == 1 and self.run.files.checkpoints is not None

    def _give_back(self) -> None:
        if self._before is None:
            return
        (states, mark), self._before = self._before, None
        self.run.curriculum.sources.go_back(mark)
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def _say(self, reason: str) -> None:
        self.say(f"Trainer: step {self.run.step} is not saved: {reason}")


def _generators(device: torch.device) -> list[torch.Generator]:
    """Returns torch's generators; those of Python and NumPy take too long to be noted each step."""
    found = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        found.append(torch.cuda.default_generators[index])
    return found
