"""``Stateful``: what is saved with a checkpoint and comes back from it."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state of plain values and tensors: objectives, callbacks, batches, stages.

    A state is made of dicts, lists, tuples, tensors, None, booleans, numbers and strings; see
    docs/checkpoints.md.
    """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state; called once for each checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` returned."""
