"""Checkpoints that survive a kill at any instant, and are read only if nothing in them is damaged.

    <run>/ckpt/step-00001200/  model.safetensors ...  one file for each part with tensors
                               state.json             step, score, summary, parts without tensors
                               config.json            that of the run, if it has one
                               MANIFEST.json          {"format":1,"files":{name:[bytes,sha256]}}
    <run>/ckpt/LATEST, BEST    the name of one of these directories

What is saved is gathered in a directory with a temporary name, every file synced, the manifest
last; then that directory is synced, renamed, its parent synced, and LATEST replaced by a synced
file, then BEST. ``save`` returns after that: what it returned is there after a crash, and what it
did not return is either not there or whole. Only after it has become the latest are older ones
deleted, also by renaming them first. No directory is ever written again.

Reading trusts nothing: names in the manifest are plain file names, links are not followed, sizes
and then sha256 are compared before a file is parsed, and nothing is executed. A checkpoint in which
anything is wrong is passed over for the next older one, and the reason is reported.
"""

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trm_fast._paths import expanded
from trm_fast.train import files
from trm_fast.train.checkpoint_files import (
    CONFIG,
    MANIFEST,
    MAX_JSON,
    STATE,
    STEP,
    names_in,
    remains,
    remove_checkpoint,
)
from trm_fast.train.checkpoints.reader import (
    FORMAT,
    CheckpointInfo,
    Loaded,
    damage_of,
    info_of,
    read_checkpoint,
)
from trm_fast.train.checkpoints.state import dumps, flatten, to_safetensors

__all__ = ["CheckpointInfo", "Checkpoints", "Loaded", "read_checkpoint", "size_of"]

FINITE = ("model", "ema", "optim")  # parts in which a NaN or infinity is never right
MAX_POINTER = 256  # bytes of LATEST and BEST
Infos = list[CheckpointInfo]
Reasons = list[str]

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


def size_of(state: Mapping[str, Any], infinite: Collection[str] = ()) -> int:
    """Returns the bytes of the tensors of a state, about the size of a checkpoint of it, after all
    that ``Checkpoints.save`` asks of it has been checked.

    Raises:
        TypeError, ValueError: it cannot be saved, as ``Checkpoints.save`` says.
    """
    tensors, trees = _parts_of(state, infinite)
    _described(trees)
    parts = tensors.values()
    return sum(t.numel() * t.element_size() for part in parts for t in part.values())


class Checkpoints:
    """The checkpoints of one run; one process at a time may save.

    Args:
        run_directory: directory of the run, which must exist to save; its config.json is kept with
            each checkpoint.
        keep_last: newest checkpoints that are kept, >= 2, so that one may be damaged.
        keep_best: checkpoints of highest score that are kept too, >= 0; with 0 there is no BEST.

    Attributes:
        left: of each checkpoint that the last ``save`` has deleted and in which somebody else had
            put something, which then stays, one line with its name.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self, run_directory: str | os.PathLike[str], *, keep_last: int = 2, keep_best: int = 1
    ) -> None:
        if keep_last < 2:
            raise ValueError(f"checkpoint: keep_last must be >= 2; got {keep_last}")
        if keep_best < 0:
            raise ValueError(f"checkpoint: keep_best must be >= 0; got {keep_best}")
        self.run = expanded(run_directory)
        self.directory = self.run / "ckpt"
        self.keep_last, self.keep_best = keep_last, keep_best
        self.left: list[str] = []

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        summary: Mapping[str, Any] | None = None,
        best_after: int = -1,
        infinite: Collection[str] = (),
    ) -> Path:
        """Saves a state and returns its directory as soon as that survives any crash.

        A step that was saved before gets a directory of its own, as "step-00001200-2"; the newer
        one counts. A step smaller than those saved before says that the run was taken up from
        there: this one becomes LATEST, and those beyond it are deleted like the oldest.

        Args:
            step: finished steps, >= 0.
            state: parts by name, "model" for example; each as state.py in this folder says. The
                parts "model", "ema" and "optim" must be finite.
            score: finite, higher is better; None if this one was not scored.
            summary: plain values that ``list`` shows.
            best_after: the best is looked for among checkpoints of later steps than this one, if
                any of them has a score: those before it are scored by another measure.
            infinite: names in the part "model" that may be infinite, though not NaN, such as
                buffers that mask.

        Raises:
            TypeError: the state holds something that is no state; nothing was written.
            ValueError: a tensor is not finite, a name is no plain name or a number out of range;
                nothing was written.
            OSError: it could not be written; LATEST and BEST name whole checkpoints, as before.
        """
        _require(type(step) is int and 0 <= step < 10**18, "step must be an int >= 0", step)
        _require(score is None or math.isfinite(score), "score must be finite or None", score)
        tensors, trees = _parts_of(state, infinite)
        extra, described_summary = flatten(dict(summary or {}), "summary")
        _require(not extra, "summary must hold plain values only", ", ".join(extra))
        serial = 1 + max((info.serial for info in self.list()), default=0)
        described = _described(
            {
                "format": FORMAT,
                "step": step,
                "serial": serial,
                "score": None if score is None else float(score),
                "summary": described_summary,
                "parts": trees,
            }
        )
        with files.explained("checkpoint", self.directory):
            path = self._publish(self._write(tensors, described), step)
            infos = self.list()
            saved = next(info for info in infos if info.path == path)
            if saved.damage:
                raise OSError(f"{saved.damage}; just after it was written")
            self._point("LATEST", path)
            later = [info for info in infos if info.step > best_after]
            best = (_best_first(later) or _best_first(infos))[: self.keep_best]
            if best and best[0].path.name != self._pointed("BEST", []):
                self._point("BEST", best[0].path)
        self._prune(saved, infos, best)
        return path

    def _write(self, tensors: Mapping[str, Mapping[str, Tensor]], described: bytes) -> Path:
        """Writes a whole checkpoint under a temporary name and syncs it."""
        files.make_directory(self.directory)
        unfinished = files.temporary(self.directory)
        try:
            os.mkdir(unfinished)
            written = {
                f"{part}.safetensors": files.write_new(
                    unfinished / f"{part}.safetensors", to_safetensors(named)
                )
                for part, named in tensors.items()
                if named
            }
            written[STATE] = files.write_new(unfinished / STATE, [described])
            if (self.run / CONFIG).is_file():
                config = files.read(self.run / CONFIG, MAX_JSON)
                written[CONFIG] = files.write_new(unfinished / CONFIG, [config])
            manifest = dumps({"format": FORMAT, "files": written})
            files.write_new(unfinished / MANIFEST, [manifest])
            files.sync_directory(unfinished)
        except BaseException:
            remove_checkpoint(unfinished)
            raise
        return unfinished

    def _publish(self, unfinished: Path, step: int) -> Path:
        """Gives a written checkpoint its name, which nothing has yet."""
        path, again = self.directory / f"step-{step:08}", 1
        while os.path.lexists(path):
            again += 1
            path = self.directory / f"step-{step:08}-{again}"
        try:
            os.rename(unfinished, path)
        except BaseException:
            remove_checkpoint(unfinished)
            raise
        files.sync_directory(self.directory)
        return path

    def _point(self, pointer: str, path: Path) -> None:
        files.replace(self.directory / pointer, f"{path.name}\n".encode())

    def _prune(self, latest: CheckpointInfo, infos: Infos, best: Infos) -> None:
        """Deletes what is neither among the last nor among the best; what is damaged stays, and so
        does what somebody else has put into one, under its name."""
        self.left = []
        complete = [info for info in infos if info.damage is None]
        # What lies beyond the latest step was left behind by a run that was taken up before it.
        complete.sort(key=lambda info: (info.step <= latest.step, info.serial), reverse=True)
        kept = {info.path for info in (*complete[: self.keep_last], *best)}
        gone = [info.path for info in complete if info.path not in kept]
        if not gone:
            return
        try:
            renamed = [files.temporary(self.directory) for _ in gone]
            for path, unfinished in zip(gone, renamed, strict=True):
                os.rename(path, unfinished)
            # Else a crash could bring back the directory, but not the files deleted from it.
            files.sync_directory(self.directory)
        except OSError as error:
            # The save itself is done and durable.
            message = f"checkpoint: old ones in {self.directory} are not deleted: {error.strerror}"
            warnings.warn(message, stacklevel=3)
            return
        for path, unfinished in zip(gone, renamed, strict=True):
            left = remove_checkpoint(unfinished)
            if left:
                self.left.append(remains(files.renamed_back(unfinished, path), left))

    def list(self) -> Infos:
        """Returns all checkpoints, in the order of their saving, without reading tensors."""
        with files.explained("checkpoint", self.directory):
            names = names_in(self.directory)
        found = [info_of(self.directory / name) for name in names]
        return sorted(found, key=lambda info: (info.serial, info.step, info.path.name))

    def verify(self) -> dict[Path, str | None]:
        """Reads every file of every checkpoint; returns which one is damaged and how, else None."""
        return {info.path: info.damage or damage_of(info.path) for info in self.list()}

    def load(
        self,
        which: str | int | os.PathLike[str] = "latest",
        device: str | torch.device = "cpu",
        *,
        parts: Collection[str] | None = None,
    ) -> Loaded:
        """Reads a checkpoint after everything in it was found whole.

        Args:
            which: "latest" or "best", or the next one if that is damaged: older ones first, then
                those beyond; lower scores. Or one step, or the name or path of a directory, and no
                other one.
            device: where the tensors shall be.
            parts: those to read; None for all.

        Raises:
            ValueError: there is none that is whole; one line with the reason of each.
        """
        skipped: Reasons = []
        for path in self._candidates(which, skipped):
            try:
                loaded = read_checkpoint(path, device, parts=parts)
            except (ValueError, OSError) as error:
                skipped.append(str(error))
                continue
            return dataclasses.replace(loaded, skipped=skipped)
        reasons = "; ".join(reason.removeprefix("checkpoint: ") for reason in skipped) or "none"
        asked = f"step {which}" if type(which) is int else which
        raise ValueError(f"checkpoint: {asked} of {self.directory} must be whole; got {reasons}")

    def _candidates(self, which: str | int | os.PathLike[str], skipped: Reasons) -> Iterator[Path]:
        if type(which) is int:
            found = [info for info in self.list() if info.step == which]
            yield from (info.path for info in reversed(found))
        elif which == "latest":
            yield from self._latest_first(skipped)
        elif which == "best":
            yield from self._best_first(skipped)
        else:
            inside = STEP.fullmatch(str(which)) is not None
            yield self.directory / str(which) if inside else expanded(which)  # type: ignore[arg-type]

    def _latest_first(self, skipped: Reasons) -> Iterator[Path]:
        infos = self.list()
        if not infos:
            return
        name = self._pointed("LATEST", skipped)
        latest = next((info for info in infos if info.path.name == name), None)
        if latest is None:
            yield from (info.path for info in reversed(infos))
            return
        for info in infos:
            if info.damage is None and info.serial > latest.serial > 0:
                skipped.append(f"{info.path}: is whole, but LATEST does not name it")
        yield latest.path
        others = [info for info in infos if info is not latest]
        others.sort(key=lambda i: (i.step <= latest.step, i.serial), reverse=True)
        yield from (info.path for info in others)

    def _best_first(self, skipped: Reasons) -> Iterator[Path]:
        infos = self.list()
        if not infos:
            return
        scored = _best_first(infos)
        name = self._pointed("BEST", skipped)
        named = [info for info in infos if info.path.name == name]
        skipped += [info.damage for info in named if info.damage]
        # Higher scores beside it are of another measure, as of an earlier stage.
        first = [info for info in named if info in scored]
        if named and not first and not named[0].damage:
            skipped.append(f"{self.directory / 'BEST'}: names {name}, which has no score")
        yield from (info.path for info in (*first, *(i for i in scored if i not in first)))

    def _pointed(self, pointer: str, skipped: Reasons) -> str | None:
        """Returns the name in LATEST or BEST, or None and why not."""
        path = self.directory / pointer
        try:
            name = files.read(path, MAX_POINTER).decode("ascii").removesuffix("\n")
            if not STEP.fullmatch(name):
                raise ValueError(f"{pointer} must hold the name of a checkpoint; got {name!r}")
            if not (self.directory / name).is_dir():
                raise ValueError(f"{pointer} must name a checkpoint that is there; got {name!r}")
        except (ValueError, OSError) as error:
            skipped.append(f"{path}: {error}")
            return None
        return name


def _best_first(infos: Sequence[CheckpointInfo]) -> Infos:
    """The scored ones; of equals the earlier one first."""
    scored = [(-info.score, info.serial, info) for info in infos if info.score is not None]
    return [info for *_, info in sorted(scored, key=lambda entry: entry[:2])]


def _parts_of(
    state: Mapping[str, Any], infinite: Collection[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    tensors, trees = {}, {}
    for name, part in state.items():
        plain = type(name) is str and _PART.fullmatch(name)
        _require(bool(plain), "a part must have a plain name (letters, digits, _ and -)", name)
        tensors[name], trees[name] = flatten(part, name)
    _require_finite(tensors, infinite)
    return tensors, trees


def _described(tree: Mapping[str, Any]) -> bytes:
    """Returns what is no tensor as JSON."""
    found = dumps(tree)
    _require(
        len(found) <= MAX_JSON,
        f"values that are no tensors must take at most {MAX_JSON} bytes",
        len(found),
    )
    return found


def _require(holds: bool, what: str, value: object) -> None:
    if not holds:
        raise ValueError(f"checkpoint: {what}; got {value!r}")


def _require_finite(tensors: Mapping[str, Mapping[str, Tensor]], infinite: Collection[str]) -> None:
    for part in FINITE:
        for name, tensor in tensors.get(part, {}).items():
            may_be = part == "model" and name in infinite and not bool(tensor.isnan().any())
            if not may_be and not _finite(tensor):
                wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
                count = int((~torch.isfinite(wide)).sum())
                required = "finite"
                if part == "model" and name in infinite:
                    required, count = "without NaN", int(wide.isnan().sum())
                raise ValueError(
                    f"checkpoint: {part}.{name} must be {required}; got NaN or infinity in {count} "
                    f"of {tensor.numel()} elements"
                )


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    tensor = tensor.detach()
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch sums no 8-bit floats
    # A sum is an order of magnitude faster than isfinite; it may overflow, but hides nothing.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
