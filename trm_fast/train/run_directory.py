"""The directory of a run: locked for one trainer, with files that are whole or as before.

    <out>/.lock           pid and host of the trainer that holds it
    <out>/config.json     what the run was started with, and other files of ``write_json``
    <out>/metrics.jsonl   one record per line, as events.jsonl
    <out>/ckpt/           see trm_fast/train/checkpoints/checkpoints.py

The lock belongs to the process: it goes with it, also when it is killed, and is not handed on to
processes that it forks. Numbers that JSON has not, NaN and infinities, are written as the strings
"NaN", "Infinity" and "-Infinity", which ``float`` reads.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from trm_fast._json import check_depth, load_object
from trm_fast.train import files

LOCK = ".lock"
FILES = ("config.json", "metrics.jsonl", "events.jsonl", "summary.json")
_CHECKPOINT = re.compile(r"step-\d{8,18}(?:-\d{1,9})?|LATEST|BEST")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

# A forked worker that outlives its killed trainer must not keep the run locked.
_locks: set[int] = set()


def _give_up_locks() -> None:
    for handle in _locks:
        os.close(handle)
    _locks.clear()


os.register_at_fork(after_in_child=_give_up_locks)


class RunDirectory:
    """Makes and locks the directory of a run for as long as the ``with`` block lasts.

    Args:
        out: the directory; missing parents are made.
        files: names of further files that the run writes, which ``existing`` and ``clear`` know.

    Entering it deletes what a crash left unfinished, and a torn last line of each JSONL file.

    Raises:
        OSError: on entering: the directory cannot be made or written, or another trainer has it;
            one line with the path, and in the second case with its pid and host.
    """

    def __init__(self, out: str | os.PathLike[str], *, files: Collection[str] = ()) -> None:
        self.path = Path(out)
        self.files = (*FILES, *(_plain(name) for name in files))
        self.lock: int | None = None
        self.opened: dict[str, int] = {}

    def __enter__(self) -> "RunDirectory":
        with files.explained("run directory", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = self._locked()
            try:
                os.ftruncate(self.lock, 0)
                os.pwrite(self.lock, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                files.remove_unfinished(self.path)
                files.remove_unfinished(self.path / "ckpt")
            except BaseException:
                self._unlock()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()
        self._unlock()

    def _locked(self) -> int:
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode("ascii", "replace").split()
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            pid, host = holder if len(holder) == 2 else ("?", "?")
            raise OSError(
                f"run directory: {self.path} must not be in use; got a trainer with pid {pid} "
                f"on host {host}"
            ) from None
        _locks.add(handle)
        return handle

    def _unlock(self) -> None:
        # The file stays: deleting it would let two processes lock two files of one name.
        if self.lock in _locks:
            _locks.discard(self.lock)
            os.close(self.lock)
        self.lock = None

    def _close(self) -> None:
        for handle in self.opened.values():
            os.close(handle)
        self.opened.clear()

    def require_space(self, needed: int) -> None:
        """Checks that the disk has room for what the run is about to write.

        Args:
            needed: bytes, three checkpoints for example.

        Raises:
            OSError: fewer are free.
        """
        with files.explained("run directory", self.path):
            free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OSError(
                f"run directory: {self.path} must have {needed / 1e6:.1f} MB free; "
                f"got {free / 1e6:.1f} MB"
            )

    def existing(self) -> list[str]:
        """Returns the names of what an earlier run left here."""
        found = [name for name in self.files if os.path.lexists(self.path / name)]
        return found + ["ckpt"] * bool(self._checkpoints())

    def clear(self) -> None:
        """Deletes what an earlier run left here, and nothing else."""
        self._close()
        with files.explained("run directory", self.path):
            for name in self._checkpoints():
                files.remove(self.path / "ckpt" / name)
            if (self.path / "ckpt").is_dir() and not os.listdir(self.path / "ckpt"):
                os.rmdir(self.path / "ckpt")
            for name in self.files:
                files.remove(self.path / name)
            files.sync_directory(self.path)
        left = self.existing()
        if left:
            raise OSError(f"run directory: {self.path / left[0]} cannot be deleted")

    def _checkpoints(self) -> list[str]:
        directory = self.path / "ckpt"
        if not directory.is_dir():
            return []
        return [name for name in os.listdir(directory) if _CHECKPOINT.fullmatch(name)]

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file of JSON: after a crash it is as before or complete.

        Raises:
            TypeError: the value is not of what JSON has.
            ValueError: it is nested deeper than readers allow.
            OSError: it cannot be written; the file is as before.
        """
        data = json.dumps(_strict(value, name), indent=2, allow_nan=False).encode() + b"\n"
        with files.explained("run directory", self.path / _plain(name)):
            files.replace(self.path / name, data)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Adds one line; it is with the kernel, and so survives a kill, when this returns.

        Raises:
            TypeError: the record is not of what JSON has.
            ValueError: it is nested deeper than readers allow.
            OSError: it cannot be written; the file is as before.
        """
        line = json.dumps(_strict(record, name), separators=(",", ":"), allow_nan=False)
        with files.explained("run directory", self.path / _plain(name)):
            if name not in self.opened:
                self.opened[name] = _opened(self.path / name)
            handle = self.opened[name]
            end = os.fstat(handle).st_size
            try:
                files.write_all(handle, line.encode() + b"\n")
            except OSError:
                os.ftruncate(handle, end)
                raise

    def truncate(self, name: str, step: int, most: int | None = None) -> None:
        """Drops the records with a "step" beyond ``step``, and a torn last line.

        Args:
            name: of the file.
            step: the last one that is kept.
            most: records that are kept at most, the first ones; None keeps all of these steps.

        Raises:
            ValueError: a whole line is no record; it is named.
        """
        path = self.path / _plain(name)
        with files.explained("run directory", path):
            if name in self.opened:
                os.close(self.opened.pop(name))
            if not path.exists():
                return
            kept = [line for line, record in _records(path) if not _beyond(record, step)]
            files.replace(path, b"".join(kept[:most]))

    def read(self, name: str) -> list[dict[str, Any]]:
        """Returns the records of a JSONL file, without a torn last line; none if it is missing.

        Raises:
            ValueError: a whole line is no record; it is named.
        """
        return read_records(self.path / _plain(name))


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of a JSONL file, as ``RunDirectory.read``, without locking anything."""
    path = Path(path)
    with files.explained("run directory", path):
        return [record for _, record in _records(path)] if path.exists() else []


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    # What follows the last line feed was torn, or is nothing.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        yield line + b"\n", load_object(line, f"{path}:{number}:")


def _beyond(record: Mapping[str, Any], step: int) -> bool:
    found = record.get("step")
    return isinstance(found, (int, float)) and found > step


def _opened(path: Path) -> int:
    """Opens a JSONL file for adding, behind its last whole line."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    end = os.fstat(handle).st_size
    while end and os.pread(handle, 1, end - 1) != b"\n":
        start = max(0, end - (1 << 16))
        end = start + os.pread(handle, end - start, start).rfind(b"\n") + 1
    os.ftruncate(handle, end)
    return handle


def _plain(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"run directory: a file must have a plain name; got {name!r}")
    return name


def _strict(value: Any, name: str, depth: int = 0) -> Any:
    """Replaces numbers that JSON has not; counts levels, as a cycle has no end."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if not isinstance(value, (Mapping, list, tuple)):
        return value
    check_depth(depth + 1, f"run directory: {name}")
    if isinstance(value, Mapping):
        return {key: _strict(item, name, depth + 1) for key, item in value.items()}
    return [_strict(item, name, depth + 1) for item in value]
