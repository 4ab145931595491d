"""Reading a checkpoint directory; nothing in it is trusted. See checkpoints.py for its layout."""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trm_fast._paths import expanded
from trm_fast.train import files
from trm_fast.train.checkpoint_files import CONFIG, FILE, MANIFEST, MAX_JSON, STATE, STEP
from trm_fast.train.checkpoints.state import dumps, from_safetensors, loads, unflatten

FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Args:
        step: finished steps when it was saved.
        state: what was saved, part by part.
        summary: the plain values given to ``save``.
        score: what BEST goes by, or None.
        path: its directory.
        skipped: for each newer or better one that was passed over, which file and why.
    """

    step: int
    state: dict[str, Any]
    summary: dict[str, Any]
    score: float | None
    path: Path
    skipped: list[str]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself, read without its tensors.

    Args:
        path: its directory.
        step: finished steps when it was saved.
        serial: 1 for the first save into this run, 2 for the next; 0 if that cannot be read.
        size: bytes of all its files.
        score: what BEST goes by, or None.
        summary: the plain values given to ``save``.
        parts: names of its parts.
        damage: why it cannot be used, as far as sizes and JSON show, or None.
    """

    path: Path
    step: int
    serial: int
    size: int
    score: float | None
    summary: dict[str, Any]
    parts: tuple[str, ...]
    damage: str | None = None


def read_checkpoint(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    parts: Collection[str] | None = None,
) -> Loaded:
    """Reads one checkpoint directory, of any run, after everything in it was found whole.

    Args:
        path: the directory.
        device: where the tensors shall be.
        parts: those to read, and only their files; None for all.

    Raises:
        ValueError: a file is missing, damaged or no file of ours, or a part is not there.
        OSError: a file cannot be read.
    """
    path = expanded(path)
    with _located(path):
        manifest = _manifest(path)
        described = _described(path, manifest)
        wanted = described["parts"]
        if parts is not None:
            missing = [name for name in parts if name not in wanted]
            if missing:
                raise ValueError(f"parts must be among {', '.join(wanted)}; got {missing[0]!r}")
            wanted = {name: wanted[name] for name in parts}
        elif CONFIG in manifest:
            _contents(path, CONFIG, manifest)
        state = {
            name: unflatten(tree, _tensors(path, name, manifest, device))
            for name, tree in wanted.items()
        }
    return Loaded(
        described["step"], state, described["summary"], described["score"], path, skipped=[]
    )


@contextmanager
def _located(path: Path) -> Iterator[None]:
    """Puts the checkpoint's path in front of the reason why it cannot be read."""
    try:
        with files.explained("checkpoint", path):
            yield
    except ValueError as error:
        raise ValueError(f"checkpoint: {path}: {error}") from None


def _tensors(
    path: Path, part: str, manifest: Mapping[str, tuple[int, str]], device: str | torch.device
) -> dict[str, Tensor]:
    name = f"{part}.safetensors"
    if name not in manifest:
        return {}
    try:
        found = from_safetensors(_contents(path, name, manifest))
    except ValueError as error:
        reason = str(error)
        raise ValueError(reason if reason.startswith(name) else f"{name} {reason}") from None
    return {key: tensor.to(device) for key, tensor in found.items()}


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Returns size and sha256 by name, after all files were found in these sizes."""
    if path.is_symlink() or not path.is_dir():
        raise ValueError("must be a directory")
    data = files.read(path / MANIFEST, MAX_JSON)
    manifest = loads(data, MANIFEST)
    # A changed byte that means the same is a change too.
    if not isinstance(manifest, dict) or dumps(manifest) != data:
        raise ValueError(f"{MANIFEST} must be JSON as it was written")
    if set(manifest) != {"format", "files"} or not isinstance(manifest["files"], dict):
        raise ValueError(f"{MANIFEST} must have format and files")
    if type(manifest["format"]) is not int or manifest["format"] != FORMAT:
        raise ValueError(f"{MANIFEST} must have format {FORMAT}; got {manifest['format']!r:.40}")
    if STATE not in manifest["files"]:
        raise ValueError(f"{MANIFEST} must list {STATE}")
    listed = {name: _entry(name, entry) for name, entry in manifest["files"].items()}
    for name, (size, _) in listed.items():
        found = files.file_size(path / name)
        if found != size:
            raise ValueError(f"{name} must have {size} bytes; got {found}")
    return listed


def _entry(name: str, entry: Any) -> tuple[int, str]:
    if not FILE.fullmatch(name):
        raise ValueError(f"{MANIFEST} must list plain names of ours; got {name!r:.80}")
    if not (isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int):
        raise ValueError(f"{MANIFEST} must give bytes and sha256 of {name}")
    size, digest = entry
    if size < 0 or type(digest) is not str or not _SHA256.fullmatch(digest):
        raise ValueError(f"{MANIFEST} must give bytes and sha256 of {name}")
    return size, digest


def _contents(path: Path, name: str, manifest: Mapping[str, tuple[int, str]]) -> bytes:
    """Returns what is in a file, after its sha256 was found right."""
    size, digest = manifest[name]
    # A sparse file may claim any size.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(f"{name} must fit into {memory} bytes of memory; got {size}")
    data = files.read(path / name, size)
    if len(data) != size or files.sha256(data) != digest:
        raise ValueError(f"{name} must have the sha256 of {MANIFEST}; got other contents")
    return data


def _described(path: Path, manifest: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """Returns what state.json says, with the summary put together."""
    if manifest[STATE][0] > MAX_JSON:
        raise ValueError(f"{STATE} must have at most {MAX_JSON} bytes; got {manifest[STATE][0]}")
    described = loads(_contents(path, STATE, manifest), STATE)
    kinds = {
        "format": int, "step": int, "serial": int, "score": (float, type(None)),
        "summary": dict, "parts": dict,
    }  # fmt: skip
    if not isinstance(described, dict) or set(described) != set(kinds):
        raise ValueError(f"{STATE} must have {', '.join(kinds)}")
    for key, kind in kinds.items():
        if not isinstance(described[key], kind) or isinstance(described[key], bool):  # type: ignore[arg-type]
            raise ValueError(f"{STATE} must have a right {key}; got {described[key]!r:.40}")
    if described["format"] != FORMAT or described["step"] < 0 or described["serial"] < 1:
        raise ValueError(f"{STATE} must be of format {FORMAT}, with a step and serial")
    named = STEP.fullmatch(path.name)
    if named and int(named[1]) != described["step"]:
        raise ValueError(f"{STATE} must be of step {int(named[1])}; got {described['step']}")
    described["summary"] = unflatten(described["summary"], {})
    if not isinstance(described["summary"], dict):
        raise ValueError(f"{STATE} must have a right summary; got no dict")
    return described


def info_of(path: Path) -> CheckpointInfo:
    try:
        with _located(path):
            manifest = _manifest(path)
            described = _described(path, manifest)
    except (ValueError, OSError) as error:
        named = STEP.fullmatch(path.name)
        return CheckpointInfo(path, int(named[1]) if named else 0, 0, 0, None, {}, (), str(error))
    return CheckpointInfo(
        path,
        described["step"],
        described["serial"],
        sum(size for size, _ in manifest.values()) + files.file_size(path / MANIFEST),
        described["score"],
        described["summary"],
        tuple(described["parts"]),
    )


def damage_of(path: Path) -> str | None:
    """Returns which file is not what the manifest says, or None."""
    try:
        with _located(path):
            manifest = _manifest(path)
            for name in manifest:
                _contents(path, name, manifest)
    except (ValueError, OSError) as error:
        return str(error)
    return None
