"""``Objective``: the losses of a batch, and what is kept from one update to the next."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

Metrics = Mapping[str, tuple[Tensor | float, Tensor | float]]


class StepResult(NamedTuple):
    """A loss, and what is to be known of it.

    Args:
        loss: what is minimised, 0-d, with a gradient: the mean over the batch.
        metrics: by name, a sum and the count it is to be divided by, as tensors on the device or
            numbers. The trainer adds them up and divides when it logs, so no batch counts more than
            its size, and nothing waits for a GPU.
        samples: by name, a number for each sample of the batch, [batch], on the device; callbacks
            find them in ``Step.samples``.
    """

    loss: Tensor
    metrics: Metrics = MappingProxyType({})
    samples: Mapping[str, Tensor] = MappingProxyType({})


class Objective(ABC):
    """The losses of a batch. The trainer runs the backward passes and the optimizers.

    Attributes:
        backwards: how many losses a batch has, where that is known. Sharded weights (FSDP2) then
            exchange their gradients with the last of them only; with None, with each.
    """

    backwards: int | None = None

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> Iterator[StepResult]:
        """Yields the losses of a batch, at least one; their gradients add up.

        The backward pass of a loss runs before the next one is asked for. What follows the last
        ``yield`` is the end of the batch, before the weights move: here a backward pass of its own
        may go on from gradients that those of the losses have left, as in a leaf for an embedding.

        Args:
            model: what to call.
            batch: on the device of the model. With accumulated batches there is one call for each,
                in order, between two calls of ``commit``.
        """

    def commit(self, finite: Tensor) -> None:  # noqa: B027
        """Ends an update, whether it was taken or not: keeps or drops carries and memories.

        Args:
            finite: whether the update was taken, 0-d, bool, on the device. Reading it as a bool
                makes the host wait for a GPU; ``torch.where`` does not.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next update needs, such as a carry; empty if nothing. Each process has a
        state of its own."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Goes on from what ``state_dict`` returned."""


def result_of(found: Any) -> StepResult:
    """Returns what a function of a loss has returned as a ``StepResult``.

    Raises:
        TypeError: it is neither a tensor nor a ``StepResult``.
    """
    if isinstance(found, StepResult):
        return found
    if not isinstance(found, Tensor):
        raise TypeError(
            "Trainer: the function of the loss must return the loss, a tensor, or a StepResult; "
            f"got {type(found).__name__}"
        )
    return StepResult(found)


class FunctionObjective(Objective):
    """An objective that keeps nothing: ``function(model, batch)`` returns the loss or a
    ``StepResult``."""

    backwards = 1

    def __init__(self, function: Callable[[nn.Module, Any], Tensor | StepResult]) -> None:
        self.function = function

    def losses(self, model: nn.Module, batch: Any) -> Iterator[StepResult]:
        yield result_of(self.function(model, batch))


def objective_of(given: "Objective | Callable[[nn.Module, Any], Any]") -> Objective:
    """Returns an objective as it is, and a function as a ``FunctionObjective``."""
    return given if isinstance(given, Objective) else FunctionObjective(given)
