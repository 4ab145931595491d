"""The closure of a step."""

import traceback
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
        raise ValueError(_refused(subject, optimizer, remedy))


def step_without(subject: str, optimizer: Optimizer, remedy: str) -> None:
    """Takes a step along gradients that are there.

    An optimizer whose step has ``closure=None`` and then asks for one is known by its error only.

    Args:
        subject, optimizer, remedy: as for ``check_closure``.

    Raises:
        ValueError: the step needs a closure.
        Exception: what else the step raises.
    """
    try:
        optimizer.step()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if "closure" not in signature(optimizer.step).parameters or not _misses_closure(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        raise ValueError(
            f"{_refused(subject, optimizer, remedy)}; its step says {reason}"
        ) from error


def _misses_closure(error: Exception) -> bool:
    """Returns whether an error speaks of the closure, or comes from a line with it."""
    lines = traceback.extract_tb(error.__traceback__)
    return "closure" in str(error) or "closure" in (lines[-1].line or "")


def _refused(subject: str, optimizer: Optimizer, remedy: str) -> str:
    return (
        f"{subject} must step without a closure, along gradients that are there; got "
        f"{type(optimizer).__name__}. {remedy}"
    )
