"""Sums of metrics on the device, read by the host once per interval."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trm_fast.train.distributed import World
from trm_fast.train.objective import Metrics

_SEPARATOR = "\0"  # of the names that are counted together


class Meter:
    """Adds up sums and counts of metrics; a mean is their quotient.

    Args:
        device: of the sums.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # MPS has no float64.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.totals: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, metrics: Metrics) -> None:
        """Adds sums and counts; the names may differ from call to call.

        Raises:
            TypeError: a metric is no pair of numbers.
        """
        try:
            numbers = [number for total, count in metrics.values() for number in (total, count)]
            if not numbers:
                return
            values = torch.stack([self._scalar(number) for number in numbers]).view(-1, 2)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise _wrong_metrics(metrics) from error
        key = _SEPARATOR.join(metrics)
        self.totals[key] = self.totals[key] + values if key in self.totals else values

    def _scalar(self, number: Tensor | float) -> Tensor:
        if isinstance(number, Tensor):
            return number.detach().to(self.dtype)
        # Unlike torch.tensor, this copies nothing from the host.
        return torch.full((), number, dtype=self.dtype, device=self.device)

    def means(self, world: World | None = None) -> dict[str, float]:
        """Returns the means, NaN where nothing was counted.

        Args:
            world: the processes to take the means over; all of them must call it, and what only
                some have counted is theirs alone. None for this one.
        """
        sums: dict[str, list[float]] = {}
        keys = {*self.totals}
        if world is not None and world.size > 1:
            # Each exchange is of one key, so all processes must go through the same ones.
            keys = keys.union(*world.gather([*keys]))
        for key in sorted(keys):
            values = self.totals[key].clone() if key in self.totals else self._nothing(key)
            if world is not None:
                world.add_up(values)
            for name, (total, count) in zip(key.split(_SEPARATOR), values.tolist(), strict=True):
                old = sums.get(name, [0.0, 0.0])
                sums[name] = [old[0] + total, old[1] + count]
        return {
            name: total / count if count else float("nan") for name, (total, count) in sums.items()
        }

    def _nothing(self, key: str) -> Tensor:
        return torch.zeros(len(key.split(_SEPARATOR)), 2, dtype=self.dtype, device=self.device)

    def clear(self) -> None:
        """Starts a new interval."""
        self.totals = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums of the interval."""
        return dict(self.totals)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the sums of an interval."""
        self.totals = {key: values.to(self.device) for key, values in state.items()}


def _wrong_metrics(metrics: Any) -> TypeError:
    """Returns the error for the first metric that is no pair of numbers."""
    got = type(metrics).__name__
    if isinstance(metrics, Mapping):
        wrong = ((name, value) for name, value in metrics.items() if not _is_pair(value))
        got = next((f"{name!r}: {value!r}" for name, value in wrong), got)
    return TypeError(
        "Trainer: metrics must give for each name a pair, a sum and the count that it is divided "
        f"by, each a number or a tensor of one; got {got}"
    )


def _is_pair(value: Any) -> bool:
    def is_number(part: Any) -> bool:
        return part.numel() == 1 if isinstance(part, Tensor) else isinstance(part, (int, float))

    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_number, value))
