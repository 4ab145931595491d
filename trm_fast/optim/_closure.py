"""The closure of a step."""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import torch
from torch.optim.optimizer import Optimizer


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Returns the loss of ``closure``, called with gradients enabled, or None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def check_closure(subject: str, optimizer: Optimizer, remedy: str) -> None:
    """Checks that an optimizer steps along gradients that are there.

    Args:
        subject: begins the message.
        optimizer: the optimizer.
        remedy: ends it.

    Raises:
        ValueError: its step needs a closure, which it calls as often as it likes.
    """
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise ValueError(
            f"{subject} must step without a closure, along gradients that are there; got "
            f"{type(optimizer).__name__}. {remedy}"
        )
