"""The closure of a step."""

from collections.abc import Callable
from typing import Any

import torch


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Returns the loss of ``closure``, called with gradients enabled, or None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
