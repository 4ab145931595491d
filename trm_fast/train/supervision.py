"""Deep supervision of a ``TinyRecursiveModel``: one update per step, or one for all steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trm_fast.losses.halting import HaltingLoss
from trm_fast.losses.supervision import supervision_weights
from trm_fast.nn.carry import Batch, Carry
from trm_fast.nn.tiny_recursive_model import TinyRecursiveModel
from trm_fast.train.objective import Metrics, Objective, StepResult

# These are over all sequences; the others over those that halt.
_OVER_ALL = ("lm_loss", "q_halt_loss", "q_continue_loss")


class PerStepSupervision(Objective):
    """One update per supervision step, as in the official code: sequences stay in the carry until
    they halt, and then give way to those of the next batch.

    Args:
        model: the model itself, without wrappers.
        **options: of ``trm_fast.losses.halting_loss``.
    """

    def __init__(self, model: TinyRecursiveModel, **options: Any) -> None:
        self.model = model
        self.options = options
        # One for each of the accumulated batches.
        self.carries: dict[int, Carry] = {}

    def __call__(self, model: nn.Module, batch: Batch, slot: int, index: int) -> StepResult:
        carry = self.carries.get(slot) or self.model.initial_carry(batch)
        carry, outputs = model(carry, batch)
        self.carries[slot] = carry
        found = self.model.loss(carry, outputs, **self.options)
        return StepResult(found.loss, _metrics(found))

    def skipped(self, finite: Tensor) -> None:
        """Lets all sequences give way: their states may not be finite."""
        for slot, carry in self.carries.items():
            self.carries[slot] = carry._replace(halted=carry.halted | ~finite)

    def state_dict(self) -> dict[str, Any]:
        """Returns the carries."""
        return {str(slot): carry._asdict() for slot, carry in self.carries.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over carries; they go to the device of the model with the first step."""
        device = self.model.y_init.device
        self.carries = {
            int(slot): Carry(**{name: _moved(value, device) for name, value in carry.items()})
            for slot, carry in state.items()
        }
        if self.model.puzzles is not None:
            for carry in self.carries.values():
                self.model.puzzles.prepare(len(carry.halted))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: tensor.to(device) for name, tensor in value.items()}
    return value.to(device)


class JointSupervision(Objective):
    """One update for all supervision steps of a batch, with weights; see
    ``trm_fast.nn.joint_supervision``. Each sequence starts anew with its batch and takes all steps.

    Args:
        model: the model itself, without wrappers.
        steps: supervision steps, >= 1.
        weights: as for ``trm_fast.losses.supervision_weights``.
        **options: of ``trm_fast.losses.halting_loss``.

    Raises:
        ValueError: as ``supervision_weights``.
    """

    def __init__(
        self,
        model: TinyRecursiveModel,
        steps: int,
        weights: str | Sequence[float] = "uniform",
        **options: Any,
    ) -> None:
        self.model = model
        self.passes = steps
        self.weights = supervision_weights(steps, weights)
        self.options = options
        self._carry: Carry | None = None

    def __call__(self, model: nn.Module, batch: Batch, slot: int, index: int) -> StepResult:
        if index == 0 or self._carry is None:
            self._carry = self.model.initial_carry(batch)
        carry, outputs = model(self._carry, batch)
        # No sequence gives way before the last step, and in that one all are counted.
        self._carry = carry._replace(halted=torch.zeros_like(carry.halted))
        is_last = index == self.passes - 1
        counted = carry._replace(halted=torch.full_like(carry.halted, is_last))
        found = self.model.loss(counted, outputs, **self.options)
        if is_last:
            self._carry = None
        return StepResult(self.weights[index] * found.loss, _metrics(found) if is_last else {})


def _metrics(found: HaltingLoss) -> Metrics:
    count = found.metrics["count"]
    return {
        name: (value, 1.0 if name in _OVER_ALL else count)
        for name, value in found.metrics.items()
        if name != "count"
    }
