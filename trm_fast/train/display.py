"""What is shown of a run. Showing it may fail in any way, and the run goes on."""

import io
import os
import sys
from typing import Any


class Display(io.TextIOBase):
    """A stream that hands text on to another one and drops what that cannot take: a terminal that
    was closed, a reader that has left, a full disk, an encoding without the characters.

    Args:
        stream: a file for text, whatever stands in the place of ``sys.stdout``, or None, which
            Python has there where the process was started without one.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream; UTF-8 if it has none."""
        name = getattr(self._stream, "encoding", None)
        return name if isinstance(name, str) else "utf-8"

    def isatty(self) -> bool:
        """Returns whether a person looks, as far as the stream can tell."""
        try:
            return bool(self._stream.isatty())
        except Exception:  # a stream of the user's may lack it, or be closed
            return False

    def fileno(self) -> int:
        """Returns the stream's number.

        Raises:
            OSError: it has none.
        """
        if not hasattr(self._stream, "fileno"):
            raise io.UnsupportedOperation("fileno")
        number: int = self._stream.fileno()
        return number

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Writes a text, with question marks for the characters that the stream does not have."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                known = text.encode(self.encoding, "replace").decode(self.encoding)
                self._stream.write(known)
        except Exception:  # whatever the stream does wrong, it must not end a run
            pass
        return len(text)

    def flush(self) -> None:
        """Has the stream show what it holds, if it can."""
        try:
            self._stream.flush()
        except Exception:  # as above
            pass


def show_line(line: str) -> None:
    """Prints a line at once, if that is possible."""
    print(line, file=Display(sys.stdout), flush=True)


def is_terminal() -> bool:
    """Returns whether a person looks at what is printed."""
    return Display(sys.stdout).isatty()


def warn_from_handler(line: str) -> None:
    """Writes a line to stderr from a handler of signals, which may have interrupted a print: that
    must not be entered twice."""
    # Without a stderr of the process its number may be that of a file of the run.
    if sys.__stderr__ is None:
        return
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:
        pass
