"""Paths as people write them."""

import os
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
