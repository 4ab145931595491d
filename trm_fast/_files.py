"""Files at paths from outside: ordinary ones only, opened without waiting, read to a bound.

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


def require_own(path: Path) -> None:
    """Checks that a name is free, or that of a file or a directory itself, before something is
    read, written or deleted there.

    Raises:
        OSError: it is a symbolic link, a pipe, a device or a socket.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # whoever opens it says why
    if stat.S_ISLNK(mode):
        raise OSError(
            f"{path} must not be a link, as what is written or deleted there would be elsewhere; "
            f"got one to {os.readlink(path)}. Remove the link, or put its target in its place"
        )
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(f"{path} must be a file or a directory; got {kind_of(mode)}. Remove it")


def open_in_place(path: Path, flags: int = 0) -> int:
    """Opens a file for reading and writing where it lies, and makes it if it is missing.

    Args:
        path: the file.
        flags: further ones of ``os.open``.

    Returns:
        A file descriptor.

    Raises:
        OSError: it is a link or no regular file, or has another name elsewhere.
    """
    flags |= os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o644)
    except OSError:
        require_own(path)
        raise
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return handle
    os.close(handle)
    found = "a hard link" if stat.S_ISREG(status.st_mode) else kind_of(status.st_mode)
    raise OSError(f"{path} must be a file of one name; got {found}. Put a copy in its place")


def memory_size() -> int:
    """Returns the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_hidden(path: Path) -> bool:
    """Returns whether a part of a relative path begins with ".", as what other systems leave."""
    return any(part.startswith(".") for part in path.parts)
