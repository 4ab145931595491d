"""Paths as people write them."""

import os
import sys
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """Returns a path in which a leading "~" or "~user" is the home directory, also where no shell
    has read it: behind "--out=", in a settings file, in Python.

    Raises:
        ValueError: there is no such home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"path: ~ must stand for a home directory; got {os.fspath(path)!r}"
        ) from None


def shadowed(pattern: str) -> str:
    """Returns what to say where a compiled file of the package is missing in this source tree and
    there in an installed package, which the tree hides; else nothing.

    Args:
        pattern: of the file's name.
    """
    own = Path(__file__).parent
    for entry in sys.path:
        other = Path(entry or ".") / "trm_fast"
        if other.resolve() != own.resolve() and any(other.glob(pattern)):
            return (
                f" in {own}, which hides the installed {other}: leave the folder of the clone, or"
            )
    return ""
