"""What a reader of files from outside is, for the programs and tests that give it such files."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trm_fast.cli import main


class Reader(NamedTuple):
    """One reader.

    Args:
        make: writes valid files into an empty directory.
        read: reads them.
        seal: makes sums in the directory fit again, so that reading goes on behind them.
        multiple: of the size of all files that reading them may take of memory.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    seal: Callable[[Path], object] | None = None
    multiple: int = 100


def command(*argv: object) -> None:
    """Runs ``trm-fast``, which may exit with 0, and with 1 or 2, a ValueError here."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([*map(str, argv)])
    assert code in (0, 1, 2), code
    if code == 1:
        raise ValueError("something is wrong")
    if code == 2:
        raise ValueError(said.getvalue().rstrip("\n"))
