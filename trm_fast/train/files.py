"""File operations of a run: whole, synced, renamed into place; no link is followed.

New contents are written under a name of their own and renamed into place, which replaces a link and
leaves its target alone. What is written in place is opened by ``open_in_place``, and a directory in
which anything is made or deleted has passed ``require_own``; both are in
``trm_fast/_files.py``.
"""

import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trm_fast._files import kind_of, read_file, require_own

# What a crash has left unfinished is told by its name from what others have put there.
TEMPORARY = ".tmp-trm_fast-"
_UNFINISHED = re.compile(rf"{re.escape(TEMPORARY)}[0-9a-f]{{32}}")
# Small tensors are written together: one call per tensor would cost more than its bytes.
BLOCK = 1 << 20


@contextmanager
def explained(who: str, path: Path) -> Iterator[None]:
    """Turns an OSError into one line with the path; its errno stays.

    Args:
        who: the start of the message, such as "checkpoint".
        path: named when the error names no file itself.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            if str(error).startswith(who):
                raise
            raise OSError(f"{who}: {error}") from error
        explained_error = OSError(f"{who}: {error.filename or path}: {error.strerror}")
        explained_error.errno = error.errno
        raise explained_error from error


def temporary(directory: Path) -> Path:
    """Returns a name in ``directory`` that nothing has."""
    return directory / f"{TEMPORARY}{uuid.uuid4().hex}"


def write_new(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes and syncs a file that must not exist; returns its size and sha256."""
    size, digest = 0, hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for block in _blocks(pieces):
            digest.update(block)
            write_all(handle, block)
            size += len(block)
        os.fsync(handle)
    finally:
        os.close(handle)
    return size, digest.hexdigest()


def _blocks(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | bytearray | memoryview]:
    held = bytearray()
    for piece in pieces:
        if len(held) + len(piece) < BLOCK:
            held += piece
            continue
        yield held
        held = bytearray()
        yield piece
    yield held


def write_all(handle: int, block: bytes | bytearray | memoryview) -> None:
    """Writes all of ``block`` to an open file descriptor, however the system divides it."""
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(handle, rest) :]


def replace(path: Path, data: bytes) -> None:
    """Gives a file new contents: after a crash it has the old ones or all of the new ones."""
    beside = temporary(path.parent)
    try:
        write_new(beside, [data])
        os.replace(beside, path)
    except BaseException:
        unlink(beside)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Makes a directory, durably, unless it is there.

    Raises:
        OSError: it cannot be made, or a link has its name.
    """
    require_own(path)
    if not path.is_dir():
        os.mkdir(path)
        sync_directory(path.parent)


def remove(path: Path) -> None:
    """Deletes a file, a link or a directory with what is in it; what cannot go stays."""
    if path.is_symlink() or not path.is_dir():
        unlink(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def unlink(path: Path) -> None:
    """Deletes a file or a link; what cannot go, a directory among them, stays."""
    try:
        os.unlink(path)
    except OSError:
        pass


def renamed_back(path: Path, name: Path) -> Path:
    """Gives something its name again, and returns where it is then."""
    try:
        os.rename(path, name)
    except OSError:
        return path
    return name


def unfinished(directory: Path) -> list[Path]:
    """Returns what a crash of ours left in ``directory``."""
    if not directory.is_dir():
        return []
    return sorted(directory / name for name in os.listdir(directory) if _UNFINISHED.fullmatch(name))


def file_size(path: Path) -> int:
    """Returns the size of a regular file; anything else, also a link, is a ValueError."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise ValueError(f"{path.name} must exist; got no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} must be a regular file; got {kind_of(status.st_mode)}")
    return status.st_size


def read(path: Path, limit: int) -> bytes:
    """Returns the contents of a regular file of at most ``limit`` bytes.

    Raises:
        ValueError: there is no such file, it is a link or no file, or it is larger.
    """
    size = file_size(path)
    if size > limit:
        raise ValueError(f"{path.name} must have at most {limit} bytes; got {size}")
    # Looked at once more, for what may have come into its place since.
    return read_file(path, limit, links=False)


def sha256(data: bytes) -> str:
    """Returns the sha256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
