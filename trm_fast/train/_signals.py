"""A polite stop: SIGINT, SIGTERM and SIGHUP end a run after the step that is under way."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """The signal has come during work that is left for later."""


class StopRequest:
    """Remembers the first signal.

    Attributes:
        signal: its number, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._leaves = False

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Lets the signal end what runs within, wherever it is, or at once if it has come.

        Raises:
            Interrupted: it has come.
        """
        try:
            self._leaves = True
            if self.signal is not None:
                raise Interrupted
            yield
        finally:
            self._leaves = False

    def caught(self, number: int) -> None:
        """Notes the signal.

        Raises:
            Interrupted: what runs is to be left.
        """
        self.signal = number
        if self._leaves:
            raise Interrupted


@contextmanager
def graceful_stop(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turns the first of these signals into a request; the second does what it always did. What the
    process ignores, as under nohup, stays ignored. A terminal that is closed says so more than
    once, through its shell and through the kernel: after SIGHUP, another SIGHUP asks nothing new.

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

    children: Any = signal.SIG_DFL

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def forget_workers() -> None:
        """Keeps torch from raising, wherever the run stands, for a worker of a loader that the same
        signal has ended; who waits for its batch is told by the loader."""
        nonlocal children
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "").startswith("torch.utils.data"):
            children = handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def catch(number: int, frame: FrameType | None) -> None:
        # A terminal that closes may send it twice, by the shell and by the kernel.
        if request.signal == number == signal.SIGHUP:
            return
        restore()
        forget_workers()
        if number == signal.SIGHUP:
            signal.signal(number, catch)
        name = signal.Signals(number).name
        say(f"{name}: stopping after this step and saving; once more stops at once")
        request.caught(number)

    for number in before:
        signal.signal(number, catch)
    try:
        yield request
    finally:
        restore()
        if children is not signal.SIG_DFL:
            signal.signal(signal.SIGCHLD, children)
