"""Updates that are no steps: other losses on other batches, between the steps of a run."""

from collections.abc import Sequence
from typing import Any

from trm_fast.train._guard import NonFiniteGuard
from trm_fast.train._update import Update
from trm_fast.train.meter import Meter
from trm_fast.train.objective import Objective
from trm_fast.train.run import Step


class ExtraUpdates:
    """Makes them, counts them, and keeps the state of their objectives.

    Args:
        update: of the run.
        meter: of the run, to which their metrics are added.
        guard: of the run, which is given their verdicts.

    Attributes:
        count: extra updates so far.
    """

    def __init__(
        self, update: Update, meter: Meter, guard: NonFiniteGuard, objective: Objective
    ) -> None:
        self.update, self.meter, self.guard = update, meter, guard
        self.objective = objective
        self.count = 0
        self._objectives: dict[str, Objective] = {}
        self._states: dict[str, Any] = {}  # of a checkpoint, until their objectives come

    def update_once(
        self,
        objective: Objective,
        batches: Sequence[Any],
        name: str,
        clip_norm: float | None,
        step: int,
    ) -> Step:
        """See ``Trainer.extra_update``.

        Args:
            objective, name: see there.
            batches: on the device.
            clip_norm: as for a step.
            step: of the run.
        """
        if not batches:
            raise ValueError("Trainer: extra_update needs at least one batch; got none")
        self._register(objective, name)
        with self.update.set_aside():
            found = self.update.gradients(objective, batches, self.count + 1, clip_norm)
            self.update.move(found, objective)
            self.update.clear()
        for metrics in (*found.metrics, {"loss": (found.loss, 1.0)}):
            self.meter.add({f"{name}/{key}": value for key, value in metrics.items()})
        self.count += 1
        label = f"{name} update {self.count} after step {step}"
        self.guard.note(found.finite, label, found.overflow)
        return found

    def _register(self, objective: Objective, name: str) -> None:
        others = {key: part for key, part in self._objectives.items() if key != name}
        owner = next((key for key, part in others.items() if part is objective), None)
        if owner is not None or objective is self.objective:
            raise ValueError(
                f"Trainer: extra_update needs an objective of its own for each name; got that of "
                f"{'the run' if owner is None else repr(owner)} for {name!r}, whose state a resume "
                "could not tell apart"
            )
        known = self._objectives.setdefault(name, objective)
        if type(known) is not type(objective):
            raise ValueError(
                f"Trainer: extra_update needs a name for each objective; got {name!r} for "
                f"{type(known).__name__} and {type(objective).__name__}"
            )
        self._objectives[name] = objective
        if name in self._states:
            objective.load_state_dict(self._states.pop(name))

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the objectives in this process; the count is that of all."""
        states = {name: part.state_dict() for name, part in self._objectives.items()}
        return self._states | states

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` returned; an objective gets its state back when the name
        comes first."""
        self._states = dict(state)
        self._objectives.clear()
