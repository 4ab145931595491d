"""Files that come from outside: ordinary ones only, opened without waiting, read to a bound.

A pipe in place of a file may never end, a device may have no end, and opening either can wait for
ever. What a name leads to is therefore looked at on the descriptor that is then read.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

AnyPath = str | os.PathLike[str]

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def kind_of(mode: int) -> str:
    """Returns what has this mode, as messages call it."""
    return _KINDS.get(stat.S_IFMT(mode), "a special file")


@contextmanager
def open_file(path: AnyPath, *, links: bool = True) -> Iterator[BufferedReader]:
    """Opens an ordinary file for reading in binary, for a ``with`` block.

    Args:
        path: the file.
        links: whether a symbolic link is followed.

    Raises:
        OSError: it cannot be opened or read; also if it is a link that shall not be followed.
        ValueError: it is a pipe, a device, a directory or a socket.
    """
    name = os.fspath(path)
    # A pipe does not block, a terminal does not become ours.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    handle = os.open(name, flags if links else flags | os.O_NOFOLLOW)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise ValueError(f"{name}: an ordinary file is required; got {kind_of(mode)}")
    with open(handle, "rb") as file:
        try:
            yield file
        except OSError as error:
            # A failing disk names no file.
            if error.errno is not None and error.filename is None:
                error.filename = name
            raise


def read_file(path: AnyPath, limit: int | None = None, *, links: bool = True) -> bytes:
    """Returns the contents of an ordinary file.

    Args:
        path: the file.
        limit: bytes that it may have; None for the memory of this machine.
        links: whether a symbolic link is followed.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no ordinary file, or larger.
    """
    with open_file(path, links=links) as file:
        size = os.fstat(file.fileno()).st_size
        # A sparse file may claim any size.
        most = memory_size() if limit is None else limit
        if size > most:
            raise ValueError(f"{os.fspath(path)}: at most {most} bytes are read; got {size}")
        return file.read(size)


def memory_size() -> int:
    """Returns the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_hidden(path: Path) -> bool:
    """Returns whether a part of a relative path begins with ".", as what other systems leave."""
    return any(part.startswith(".") for part in path.parts)
