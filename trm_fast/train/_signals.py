"""A polite stop: SIGINT, SIGTERM and SIGHUP end a run after the step that is under way."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Remembers the first signal.

    Attributes:
        signal: its number, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None


@contextmanager
def graceful_stop(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turns the first of these signals into a request; the second does what it always did. What the
    process ignores, as under nohup, stays ignored.

    Args:
        say: is given one line for the person who waits.

    Yields:
        The request. Outside the main thread, where Python handles no signals, it stays empty.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in _CAUGHT}
    # None belongs to a handler that is not Python's, which could not be given back.
    before = {number: old for number, old in before.items() if old not in (None, signal.SIG_IGN)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()
        name = signal.Signals(number).name
        say(f"{name}: stopping after this step and saving; once more stops at once")

    for number in before:
        signal.signal(number, catch)
    try:
        yield request
    finally:
        restore()
