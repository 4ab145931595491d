"""The directory of a run: locked for one trainer, with files that are whole or as before.

    <out>/.lock           pid and host of the trainer that holds it; that a run of ours is there
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
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from trm_fast._files import open_file, open_in_place, read_file, require_own
from trm_fast._json import check_depth, load_object
from trm_fast._paths import expanded
from trm_fast.train import files
from trm_fast.train.checkpoint_files import MANIFEST, names_in, remains, remove_checkpoint

LOCK = ".lock"
FILES = ("config.json", "metrics.jsonl", "events.jsonl", "summary.json")
MAX_JSON = 16 << 20  # bytes of each of its files of JSON
FOLDERS = ("ckpt", "tensorboard", "wandb")
_HOLDER = re.compile(rb"(\d+) (\S+)\n")
_MARK = b"holds a run of trm_fast\n"
_RUN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # the directory of one of several runs
_POINTERS = ("LATEST", "BEST")  # in ckpt, beside the checkpoints
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

    What a run writes and deletes lies in the directory itself: a link or a hard link in the place
    of one of its files is refused. The directory may be a link.

    Raises:
        OSError: on entering: the directory cannot be made or written, a file of a run is a link or
            a pipe, or another trainer has it; one line with the path, and then its pid and host.
    """

    def __init__(self, out: str | os.PathLike[str], *, files: Collection[str] = ()) -> None:
        self.path = expanded(out)
        self.files = (*FILES, *(_plain(name) for name in files))
        self.lock: int | None = None
        self.opened: dict[str, int] = {}
        self._marked = False

    def __enter__(self) -> "RunDirectory":
        with files.explained("run directory", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = self._locked()
            try:
                for name in (*self.files, *FOLDERS):
                    require_own(self.path / name)
                self._hold()
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
        handle = open_in_place(self.path / LOCK)
        found = os.pread(handle, 400, 0)
        holder = _HOLDER.match(found)
        try:
            if found and holder is None:
                raise OSError(
                    f"run directory: {self.path / LOCK} must be the lock of a run; got another "
                    "file. Choose another directory, or delete it"
                )
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            pid, host = (b"?", b"?") if holder is None else holder.groups()
            raise OSError(
                f"run directory: {self.path} must not be in use; got a trainer with pid "
                f"{pid.decode()} on host {host.decode('ascii', 'replace')}"
            ) from None
        _locks.add(handle)
        return handle

    def _hold(self) -> None:
        """Writes who has the lock; that a run of ours is here stays, also after a kill."""
        assert self.lock is not None
        self._marked = _MARK in os.pread(self.lock, 400, 0)
        self._write_lock()

    def _write_lock(self) -> None:
        assert self.lock is not None
        holder = f"{os.getpid()} {socket.gethostname()}\n".encode()
        size = os.pwrite(self.lock, holder + (_MARK if self._marked else b""), 0)
        os.ftruncate(self.lock, size)

    def _claim(self) -> None:
        """Marks what is here as a run of ours, before anything of it is written."""
        if not self._marked:
            self._marked = True
            self._write_lock()

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

    @property
    def is_ours(self) -> bool:
        """Whether what is here was written by a run of this package: by the mark in the lock, and
        for copies without it by run.json or a checkpoint."""
        manifests = (self.path / "ckpt" / name / MANIFEST for name in self._checkpoints())
        return (
            self._marked or "trm_fast" in self.said() or any(path.is_file() for path in manifests)
        )

    def said(self) -> dict[str, Any]:
        """Returns what run.json says, nothing if it is missing or is no JSON.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no ordinary file.
        """
        path = self.path / "run.json"
        if not os.path.lexists(path):
            return {}
        with files.explained("run directory", path):
            data = read_file(path, MAX_JSON, links=False)
        try:
            return load_object(data, "run.json")
        except ValueError:
            return {}

    def require_ours(self) -> None:
        """Checks that nothing else is taken for a run, to be written over or to go on.

        Raises:
            OSError: files with the names of those of a run are here, but not its mark.
        """
        found = self.existing()
        if found and not self.is_ours:
            raise OSError(
                f"run directory: {self.path} must hold a run of trm_fast; got {', '.join(found)} "
                "of something else. Choose another directory, or delete them"
            )

    def remove_unfinished(self) -> None:
        """Deletes what a crash of a run left unfinished here."""
        with files.explained("run directory", self.path):
            for path in files.unfinished(self.path):
                files.unlink(path)
            for path in files.unfinished(self.path / "ckpt"):
                remove_checkpoint(path)

    def clear(self) -> list[str]:
        """Deletes what an earlier run left here, and the runs below that it lists if it stands for
        several, and nothing else.

        Returns:
            For each checkpoint in which somebody else has put something, which stays, one line.

        Raises:
            OSError: what is here is not of a run, a directory of a run is a link, a trainer is at
                work in one, or something cannot be deleted.
        """
        self.require_ours()
        self._close()
        with ExitStack() as stack:
            runs = [stack.enter_context(run) for run in self._runs()]
            for run in runs:
                run.require_ours()
            left = [line for run in (*runs, self) for line in run._delete()]
        return left

    def _runs(self) -> Iterator["RunDirectory"]:
        """Yields the directories of the runs that run.json lists."""
        names = self.said().get("runs", ())
        for name in names if isinstance(names, list) else ():
            if isinstance(name, str) and _RUN.fullmatch(name) and (self.path / name).is_dir():
                require_own(self.path / name)
                yield RunDirectory(self.path / name, files=self.files[len(FILES) :])

    def _delete(self) -> list[str]:
        with files.explained("run directory", self.path):
            found = [self.path / "ckpt" / name for name in self._checkpoints()]
            kept = [(path, remove_checkpoint(path)) for path in found]
            self.remove_unfinished()
            if (self.path / "ckpt").is_dir() and not os.listdir(self.path / "ckpt"):
                os.rmdir(self.path / "ckpt")
            # That of the whole goes last: it says which files are those of runs.
            for name in sorted(self.files, key="run.json".__eq__):
                files.unlink(self.path / name)
            files.sync_directory(self.path)
            left = self.existing()
            if left:
                raise OSError(f"run directory: {self.path / left[0]} cannot be deleted")
            self._marked = False
            self._write_lock()
        return [remains(path, names) for path, names in kept if names]

    def _checkpoints(self) -> list[str]:
        directory = self.path / "ckpt"
        pointers = [name for name in _POINTERS if os.path.lexists(directory / name)]
        return names_in(directory) + pointers

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file of JSON: after a crash it is as before or complete.

        Raises:
            TypeError: the value is not of what JSON has.
            ValueError: it is nested deeper than readers allow.
            OSError: it cannot be written; the file is as before.
        """
        data = json.dumps(_strict(value, name), indent=2, allow_nan=False).encode() + b"\n"
        with files.explained("run directory", self.path / _plain(name)):
            self._claim()
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
                self._claim()
                self.opened[name] = _opened(self.path / name)
            handle = self.opened[name]
            end = os.fstat(handle).st_size
            try:
                files.write_all(handle, line.encode() + b"\n")
            except OSError:
                os.ftruncate(handle, end)
                raise

    def truncate(self, name: str, step: int, most: int | None = None) -> int:
        """Drops the records with a "step" beyond ``step``, and a torn last line.

        Args:
            name: of the file.
            step: the last one that is kept.
            most: records that are kept at most, the first ones; None keeps all of these steps.

        Returns:
            How many records were dropped.

        Raises:
            ValueError: a whole line is no record; it is named.
        """
        path = self.path / _plain(name)
        with files.explained("run directory", path):
            if name in self.opened:
                os.close(self.opened.pop(name))
            if not path.exists():
                return 0
            require_own(path)
            beyond = [(_beyond(record, step), line) for line, record in _records(path)]
            kept = [line for is_beyond, line in beyond if not is_beyond][:most]
            files.replace(path, b"".join(kept))
        return len(beyond) - len(kept)

    def read(self, name: str) -> list[dict[str, Any]]:
        """Returns the records of a JSONL file, without a torn last line; none if it is missing.

        Raises:
            ValueError: a whole line is no record; it is named.
        """
        return read_records(self.path / _plain(name))


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of a JSONL file, as ``RunDirectory.read``, without locking anything."""
    path = expanded(path)
    with files.explained("run directory", path):
        return [record for _, record in _records(path)] if path.exists() else []


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with open_file(path, links=False) as file:
        for number, line in enumerate(file, 1):
            # What follows the last line feed was torn, or is nothing.
            if line.endswith(b"\n"):
                yield line, load_object(line, f"{path}:{number}:")


def _beyond(record: Mapping[str, Any], step: int) -> bool:
    found = record.get("step")
    return isinstance(found, (int, float)) and found > step


def _opened(path: Path) -> int:
    """Opens a JSONL file for adding, behind its last whole line."""
    handle = open_in_place(path, os.O_APPEND)
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
