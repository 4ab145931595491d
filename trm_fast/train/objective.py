"""``Objective``: what one forward pass of a training step computes, and what it keeps."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

Metrics = Mapping[str, tuple[Tensor | float, Tensor | float]]


class StepResult(NamedTuple):
    """What a forward pass gives the trainer.

    Args:
        loss: what is minimised, 0-d, with a gradient: the mean over the batch.
        metrics: by name, a sum and the count it is to be divided by, as tensors on the device or
            numbers. The trainer adds them up and divides when it logs, so no batch counts more than
            its size, and nothing waits for a GPU.
    """

    loss: Tensor
    metrics: Metrics = MappingProxyType({})


class Objective(ABC):
    """What a training step computes. The trainer runs the backward pass and the optimizers.

    Attributes:
        passes: forward and backward passes of one batch before the weights move; more than one for
            joint supervision.
    """

    passes: int = 1

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Any, slot: int, index: int) -> StepResult:
        """Computes one forward pass.

        Args:
            model: what to call: the model, wrapped if there are several processes.
            batch: on the device of the model.
            slot: which batch of the accumulated ones it is, from 0.
            index: which pass over the batch it is, from 0.
        """

    def skipped(self, finite: Tensor) -> None:  # noqa: B027
        """Is told about a step whose loss or gradient was not finite, and may start anew.

        Args:
            finite: 0-d, bool; on a GPU the trainer calls this after each step, and only where it is
                False something may change.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next step needs, such as the carry; empty if nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Takes over what ``state_dict`` returned."""


class FunctionObjective(Objective):
    """An objective that keeps nothing: ``function(model, batch)`` returns the loss or a
    ``StepResult``."""

    def __init__(self, function: Callable[[nn.Module, Any], Tensor | StepResult]) -> None:
        self.function = function

    def __call__(self, model: nn.Module, batch: Any, slot: int, index: int) -> StepResult:
        found = self.function(model, batch)
        return found if isinstance(found, StepResult) else StepResult(found)
