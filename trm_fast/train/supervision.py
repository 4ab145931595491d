"""Deep supervision: one update for all supervision steps of a batch, or one for each step."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trm_fast.losses.halting import HaltingLoss
from trm_fast.losses.supervision import supervision_weights
from trm_fast.nn.carry import Batch, Carry
from trm_fast.nn.supervision import deep_supervision
from trm_fast.nn.tiny_recursive_model import TinyRecursiveModel
from trm_fast.train.distributed import call_with_state
from trm_fast.train.objective import Metrics, Objective, StepResult, result_of

# These are over all sequences; the others over those that halt.
_OVER_ALL = ("lm_loss", "q_halt_loss", "q_continue_loss")


class _Supervision(Objective):
    """One loss for each supervision step.

    Args:
        weights: of the steps.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = weights
        self.backwards = len(weights)

    @abstractmethod
    def start(self, model: Any, batch: Any) -> Any:
        """Returns the state before the first step."""

    def step(self, model: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        """Returns the state after a step, and its outputs."""
        found: tuple[Any, Any] = call_with_state(model, state, batch)
        return found

    @abstractmethod
    def result(self, state: Any, outputs: Any, batch: Any, is_last: bool) -> StepResult:
        """Returns the loss of a step, without its weight."""

    def losses(self, model: nn.Module, batch: Any) -> Iterator[StepResult]:
        steps = deep_supervision(
            lambda: self.start(model, batch),
            lambda state: self.step(model, state, batch),
            self.weights,
        )
        for number, (weight, state, outputs) in enumerate(steps, 1):
            is_last = number == len(self.weights)
            found = self.result(state, outputs, batch, is_last)
            loss = found.loss if weight == 1 else weight * found.loss
            yield found._replace(loss=loss) if is_last else StepResult(loss)
            del outputs, found, loss  # not kept for the next step


class DeepSupervision(_Supervision):
    """Deep supervision of any model: one update for all supervision steps of a batch.

        state <- model.start(batch)
        state, outputs <- model(state, batch)      for each weight
        loss = sum over steps of weight * loss(outputs, batch)

    The backward pass of each step runs at once and no gradient goes from one step to the one
    before, so memory does not grow with their number; see ``trm_fast.nn.deep_supervision`` for what
    ``start`` computes with a gradient. Metrics and samples are those of the last step.

    Args:
        loss: of outputs and batch: the loss, 0-d, or a ``StepResult``.
        steps: supervision steps, >= 1.
        weights: as for ``trm_fast.losses.supervision_weights``, which makes their sum 1.
        floor: likewise.

    Raises:
        ValueError: as ``supervision_weights``.

    Example:
        >>> class Model(torch.nn.Module):
        ...     def start(self, batch):
        ...         return self.embedding(batch["tokens"]), self.y_init
        ...     def forward(self, state, batch):
        ...         x, y = state
        ...         y = self.net(x + y)
        ...         return (x, y), self.head(y)
        >>> def loss(logits, batch):
        ...     return torch.nn.functional.cross_entropy(logits, batch["labels"])
        >>> objective = DeepSupervision(loss, steps=4)
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor | StepResult],
        steps: int,
        weights: str | Sequence[float] = "uniform",
        *,
        floor: float = 0.0,
    ) -> None:
        super().__init__(supervision_weights(steps, weights, floor=floor))
        self.loss = loss

    def start(self, model: Any, batch: Any) -> Any:
        return model.start(batch)

    def result(self, state: Any, outputs: Any, batch: Any, is_last: bool) -> StepResult:
        return result_of(self.loss(outputs, batch))


class PerStepSupervision(_Supervision):
    """One update per supervision step of a ``TinyRecursiveModel``, as in the official code:
    sequences stay in the carry until they halt, and then give way to those of the next batch.

    Args:
        model: the model.
        **options: of ``trm_fast.losses.halting_loss``.
    """

    def __init__(self, model: TinyRecursiveModel, **options: Any) -> None:
        super().__init__([1.0])
        self.model = model
        self.options = options
        # One for each of the accumulated batches, by the order of their calls since the last
        # commit.
        self.carries: list[Carry] = []
        self._next: list[Carry] = []  # of the batches since

    def start(self, model: Any, batch: Batch) -> Carry:
        slot = len(self._next)
        known = slot < len(self.carries)
        return self.carries[slot] if known else self.model.initial_carry(batch)

    def result(self, state: Carry, outputs: Any, batch: Batch, is_last: bool) -> StepResult:
        self._next.append(state)
        found = self.model.loss(state, outputs, **self.options)
        return StepResult(found.loss, _metrics(found))

    def commit(self, finite: Tensor) -> None:
        """After an update that was not taken lets all sequences give way: their states may not be
        finite."""
        self.carries[: len(self._next)], self._next = self._next, []
        if finite.device.type == "cpu" and finite:
            return
        self.carries = [
            carry._replace(halted=carry.halted | ~finite.to(carry.halted.device))
            for carry in self.carries
        ]

    def state_dict(self) -> dict[str, Any]:
        """Returns the carries."""
        return {str(slot): carry._asdict() for slot, carry in enumerate(self.carries)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over carries, on the device of the model."""
        device = self.model.y_init.device
        moved = tree_map(lambda leaf: leaf.to(device), state)
        self.carries = [Carry(**moved[str(slot)]) for slot in range(len(state))]
        self._next = []
        if self.model.puzzles is not None:
            for carry in self.carries:
                self.model.puzzles.prepare(len(carry.halted))


class JointSupervision(_Supervision):
    """One update for all supervision steps of a batch of a ``TinyRecursiveModel``, with weights, as
    ``trm_fast.nn.joint_supervision``. Each sequence starts anew with its batch and takes all steps.

    Args:
        model: the model.
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
        super().__init__(supervision_weights(steps, weights))
        self.model = model
        self.options = options

    def start(self, model: Any, batch: Batch) -> Carry:
        return self.model.initial_carry(batch)

    def step(self, model: Any, state: Carry, batch: Batch) -> tuple[Carry, Any]:
        carry, outputs = model(state, batch)
        # No sequence gives way to another one.
        return carry._replace(halted=torch.zeros_like(carry.halted)), outputs

    def result(self, state: Carry, outputs: Any, batch: Batch, is_last: bool) -> StepResult:
        # All are counted in the last step.
        counted = state._replace(halted=torch.full_like(state.halted, is_last))
        found = self.model.loss(counted, outputs, **self.options)
        return StepResult(found.loss, _metrics(found))


def _metrics(found: HaltingLoss) -> Metrics:
    count = found.metrics["count"]
    return {
        name: (value, 1.0 if name in _OVER_ALL else count)
        for name, value in found.metrics.items()
        if name != "count"
    }
