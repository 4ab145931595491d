"""The standard streams of a command, whatever stands in their place."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trm_fast.train.display import Display


def prepare() -> None:
    """Opens the standard streams that the process was started without, as nothing: else the next
    files get their numbers, and what is meant for stderr ends up in a checkpoint. An encoding that
    lacks characters shows question marks."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def display_only() -> Iterator[None]:
    """Has everything that is printed within only shown, if that is possible: the exit code of a
    training tells of the training."""
    stdout = sys.stdout
    sys.stdout = Display(stdout)
    try:
        yield
    finally:
        sys.stdout = stdout
        _written(stdout)


def settled(code: int) -> int:
    """Writes what the streams still hold, which the interpreter would try at its end with an exit
    code and words of its own.

    Returns:
        The exit code: another one if the output of a command that has succeeded is lost.
    """
    error = _written(sys.stdout)
    if error is not None and code == 0:
        code = code_of(error)
    _written(sys.stderr)
    return code


def code_of(error: Exception) -> int:
    """Returns the exit code of a command whose output cannot be written, and says why, unless it is
    that a reader such as head has seen enough."""
    if isinstance(error, BrokenPipeError):
        return 141
    reason = getattr(error, "strerror", None) or error
    print("trm-fast: stdout:", reason, file=Display(sys.stderr))
    return 2


def _written(stream: Any) -> Exception | None:
    """Flushes a stream; what it cannot take is thrown away, and the reason returned."""
    flush = getattr(stream, "flush", None)
    if flush is None:
        return None
    try:
        flush()
    except (OSError, ValueError) as error:  # ValueError: it is closed
        _discard(stream)
        return error
    return None


def _discard(stream: Any) -> None:
    try:
        number = stream.fileno()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, number)
        os.close(nothing)
        stream.flush()
    except (OSError, ValueError, AttributeError):
        pass  # it has no number, so the interpreter does not flush it either
