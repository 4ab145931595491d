"""The guard against non-finite steps: counts them and stops a run that takes none any more."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class NonFiniteError(FloatingPointError):
    """Too many steps in a row were skipped because a loss or a gradient was not finite."""


class NonFiniteGuard:
    """Keeps the verdicts of the steps on the device until the host looks at them.

    Args:
        device: of the verdicts.
        policy: "stop" or "skip".
        limit: skipped steps in a row after which "stop" stops.
    """

    def __init__(self, device: torch.device, policy: str, limit: int) -> None:
        self.device = device
        self.policy = policy
        self.limit = limit
        self.skipped = 0
        self._row: list[str] = []
        self._verdicts: list[Tensor] = []
        self._names: list[str] = []

    def note(self, finite: Tensor, name: str, overflow: Tensor | None = None) -> None:
        """Remembers the verdict of a step and the name of its batches.

        Args:
            finite: whether it was, 0-d, bool.
            name: of its batches.
            overflow: whether it was not for a reason that the next scale of the loss mends: such a
                step is skipped, and neither adds to a row nor ends one.
        """
        # 1 finite, 0 not, 2 overflow
        self._verdicts.append(finite if overflow is None else finite + 2 * overflow.int())
        self._names.append(name)

    def check(self, report: Callable[[str], None]) -> None:
        """Looks at the steps since the last call; on a GPU the host waits for them.

        Args:
            report: is given one line per skipped step.

        Raises:
            NonFiniteError: there are too many in a row.
        """
        if not self._verdicts:
            return
        found = torch.stack(self._verdicts).tolist()
        names, self._verdicts, self._names = self._names, [], []
        full, lines = "", []
        for verdict, name in zip(found, names, strict=True):
            if verdict == 1:
                self._row.clear()
                continue
            self.skipped += 1
            if verdict == 2:
                lines.append(f"float16 has overflowed, scaling the loss less: {name}")
                continue
            self._row.append(name)
            lines.append(f"loss or gradient is not finite; batch: {name}")
            if len(self._row) == self.limit:
                full = full or "; ".join(self._row)
                # A run that is taken up again is given as many once more.
                self._row.clear()
        # After all of them are counted: what is told may not be writable.
        for line in lines:
            report(f"skipped a step: {line}")
        if full and self.policy == "stop":
            raise NonFiniteError(
                f"Trainer: the loss and gradients must be finite; got {self.limit} steps in a row "
                f"where they are not, with the batches: {full}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts; call ``check`` before."""
        return {"skipped": self.skipped, "row": list(self._row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting."""
        self.skipped, self._row = state["skipped"], list(state["row"])
