"""Records what a program does to a directory, and rebuilds what a crash may leave of any prefix.

The rule of the rebuilt disk is what POSIX promises and no more: contents of a file are there for
sure after its fsync, names in a directory after the fsync of that directory, and a rename happens
whole or not at all. Everything else may be there, or not, each for itself.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PAGE = 4096


@dataclass(eq=False)
class File:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


@dataclass(eq=False)
class Directory:
    names: dict[str, "Node"] = field(default_factory=dict)
    durable: dict[str, "Node"] = field(default_factory=dict)
    changes: list[dict[str, "Node | None"]] = field(default_factory=list)  # since the last fsync

    def change(self, changed: dict[str, "Node | None"]) -> None:
        self.names = applied(self.names, changed)
        self.changes.append(changed)


Node = File | Directory
Call = tuple


def applied(names: dict[str, Node], changed: dict[str, Node | None]) -> dict[str, Node]:
    merged = {**names, **changed}
    return {name: node for name, node in merged.items() if node is not None}


def record(root: Path, action: Callable[[], object]) -> list[Call]:
    """Runs ``action`` and returns its calls that change something below ``root``, in order."""
    calls, handles = [], {}
    real = {name: getattr(os, name) for name in (
        "open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir",
        "ftruncate",
    )}  # fmt: skip

    def place(path, dir_fd=None) -> Path:
        path = Path(os.fspath(path))
        return (handles[dir_fd] / path if dir_fd is not None else path).relative_to(root)

    def opened(path, flags, mode=0o777, *, dir_fd=None):
        handle = real["open"](path, flags, mode, dir_fd=dir_fd)
        handles[handle] = handles[dir_fd] / path if dir_fd is not None else Path(path)
        if flags & os.O_CREAT:
            calls.append(("create", place(path, dir_fd)))
        return handle

    def written(handle, data):
        count = real["write"](handle, data)
        calls.append(("write", place(handles[handle]), bytes(data[:count])))
        return count

    def synced(handle):
        real["fsync"](handle)
        calls.append(("fsync", place(handles[handle])))

    def moved(source, target):
        real["rename"](source, target)
        calls.append(("rename", place(source), place(target)))

    def on_name(name):
        def call(path, *args, dir_fd=None, **options):
            real[name](path, *args, dir_fd=dir_fd, **options)
            calls.append((name, place(path, dir_fd)))

        return call

    def refused(*_):
        raise AssertionError("replay knows no ftruncate")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opened)
        patch.setattr(os, "write", written)
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "rename", moved)
        patch.setattr(os, "replace", moved)
        patch.setattr(os, "ftruncate", refused)
        for name in ("mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, on_name(name))
        action()
    return calls


def snapshot(path: Path) -> Directory:
    """A directory as it is, all of it durable."""
    names: dict[str, Node] = {}
    for entry in sorted(path.iterdir()):
        if entry.is_dir():
            names[entry.name] = snapshot(entry)
        else:
            data = entry.read_bytes()
            names[entry.name] = File(bytearray(data), data)
    return Directory(dict(names), dict(names))


def at(root: Directory, path: Path) -> Node:
    node: Node = root
    for name in path.parts:
        node = node.names[name]
    return node


def apply(root: Directory, call: Call) -> None:
    kind, path, *rest = call
    parent = at(root, path.parent)
    if kind == "create":
        parent.change({path.name: File()})
    elif kind == "write":
        at(root, path).data.extend(rest[0])
    elif kind == "fsync":
        node = at(root, path)
        if isinstance(node, File):
            node.durable = bytes(node.data)
        else:
            node.durable, node.changes = dict(node.names), []
    elif kind == "mkdir":
        parent.change({path.name: Directory()})
    elif kind == "rename":
        assert rest[0].parent == path.parent  # one directory, so it is one change
        parent.change({path.name: None, rest[0].name: at(root, path)})
    else:
        parent.change({path.name: None})


def after(before: Directory, calls: list[Call], torn: bool = False) -> Directory:
    """The disk after these calls; with ``torn`` the last write stops within a page."""
    root = copied(before)
    for number, call in enumerate(calls):
        if torn and number == len(calls) - 1 and call[0] == "write":
            call = (*call[:2], call[2][: len(call[2]) // 2 // PAGE * PAGE])
        apply(root, call)
    return root


def copied(directory: Directory) -> Directory:
    """A copy of a directory that is all durable."""
    names = {
        name: copied(node)
        if isinstance(node, Directory)
        else File(bytearray(node.data), node.durable)
        for name, node in directory.names.items()
    }
    return Directory(dict(names), dict(names))


class Fate:
    """What a crash leaves of a file that was not synced, and of names that were not."""

    def __init__(self, data: str, names: str, seed: int = 0) -> None:
        self.data, self.names, self.chance = data, names, random.Random(seed)

    def contents(self, file: File) -> bytes:
        data, durable = bytes(file.data), file.durable
        kind = self.data
        if kind == "any":
            kind = self.chance.choice(["kept", "lost", "zeros", "torn"])
        if data == durable or kind == "kept":
            return data
        if kind == "lost":
            return durable
        if kind == "zeros":
            return durable + bytes(len(data) - len(durable))
        return data[: self.chance.randrange(len(data) + 1) // PAGE * PAGE]

    def entries(self, directory: Directory) -> dict[str, Node]:
        if self.names == "kept":
            return directory.names
        names = directory.durable
        for changed in directory.changes:
            if self.names == "any" and self.chance.random() < 0.5:
                names = applied(names, changed)
        return names


def fates(seed: int, draws: int) -> Iterator[Fate]:
    """The plain ones, and some in which everything is drawn for itself."""
    for names in ("kept", "lost"):
        for data in ("kept", "lost", "zeros", "torn"):
            yield Fate(data, names, seed)
    for draw in range(draws):
        yield Fate("any", "any", seed * draws + draw)


def rebuild(directory: Directory, path: Path, fate: Fate) -> None:
    """Writes a disk as a crash left it."""
    path.mkdir()
    for name, node in fate.entries(directory).items():
        if isinstance(node, Directory):
            rebuild(node, path / name, fate)
        else:
            (path / name).write_bytes(fate.contents(node))
