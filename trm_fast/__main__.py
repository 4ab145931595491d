"""The command ``trm-fast``, also as ``python -m trm_fast``."""

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn


def start(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and ends the process with its exit code. Ctrl-C shows no traceback, from the
    first import on.

    Args:
        argv: arguments without the program's name; those of the process if not given.
    """
    # Where SIGINT is ignored, as in the background of a shell, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from trm_fast.cli import main

        code = main(argv)
    except KeyboardInterrupt:
        code = 130  # before the command line could say so
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # A second one ends the process at once: a traceback from the middle of its end helps nobody.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


if __name__ == "__main__":
    start()
