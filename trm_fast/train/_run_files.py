"""The files of a run as a trainer uses them: none without ``out``, and written by one process."""

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from trm_fast._files import read_file
from trm_fast._json import load_object
from trm_fast._version import __version__
from trm_fast.train.checkpoint_files import CONFIG, MAX_JSON
from trm_fast.train.checkpoints.checkpoints import Checkpoints, Loaded, size_of
from trm_fast.train.distributed import World, device_name
from trm_fast.train.run import Record, Run
from trm_fast.train.run_directory import RunDirectory

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
# In run.json until the first save, so that checkpoints which are missing later are missed.
_UNSAVED = {"checkpoints": "none yet"}
# Numbers that JSON has not are written as words.
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunFiles:
    """Directory and checkpoints of a run.

    Args:
        out: the directory, or None.
        world: the processes, of which the first one writes.
        names: of further files that belong to the run.
        keep_last: checkpoints that are kept at least.
    """

    def __init__(
        self, out: Path | None, world: World, names: Sequence[str], keep_last: int
    ) -> None:
        self.out, self.world, self.names = out, world, names
        self.checkpoints = None if out is None else Checkpoints(out, keep_last=keep_last)
        self._directory: RunDirectory | None = None
        self._overwrites = False
        self._said: dict[str, Any] = {}  # in run.json

    @contextmanager
    def opened(self, resume: bool, overwrite: bool) -> Iterator[None]:
        """Locks the directory for a while. What is in it stays as it is until ``begin``.

        Raises:
            FileExistsError: there is a run, and neither ``resume`` nor ``overwrite``.
            OSError: the directory cannot be written, a file of the run is a link or belongs to
                something else, or another process trains there.
        """
        if self.out is None:
            yield
            return
        with ExitStack() as stack:
            if self.world.is_main:
                directory = stack.enter_context(RunDirectory(self.out, files=self.names))
                if directory.existing() and not resume and not overwrite:
                    raise FileExistsError(
                        f"Trainer: out must be a directory without a run; got {self.out}, "
                        "which holds one. Choose another one, resume the run, or overwrite it"
                    )
                directory.require_ours()
                self._directory, self._overwrites = directory, overwrite and not resume
                stack.callback(setattr, self, "_directory", None)
            self.world.barrier()
            yield

    def require_savable(self, state: Mapping[str, Any], infinite: Collection[str] = ()) -> None:
        """Checks that a state can be saved, and that there is room for checkpoints of it; all
        processes must call it.

        Raises:
            TypeError, ValueError: it holds something that cannot be saved.
            OSError: there is no room.
        """
        refused: Exception | None = None
        try:
            if self._directory is not None:
                assert self.checkpoints is not None
                replaced = self.checkpoints.list() if self._overwrites else []
                freed = sum(old.size for old in replaced)
                # Two are kept while the next one is written.
                self._directory.require_space(3 * size_of(state, infinite) - freed)
        except (TypeError, ValueError, OSError) as error:
            refused = error
        # The others would wait for the first process, which alone writes.
        for reason in self.world.gather(None if refused is None else str(refused)):
            if reason is not None:
                raise refused or ValueError(reason)

    def begin(self, settings: Any, said: Mapping[str, Any]) -> list[str]:
        """Deletes the run that is overwritten and what a crash has left, and writes what the run
        is. It comes after all checks.

        Args:
            settings: for config.json.
            said: for run.json.

        Returns:
            What ``RunDirectory.clear`` has left.

        Raises:
            OSError: a file cannot be deleted or written.
        """
        if self._directory is None:
            return []
        assert self.checkpoints is not None
        left = self._directory.clear() if self._overwrites else []
        self._directory.remove_unfinished()
        # The settings come first: what has them can be resumed.
        self._directory.write_json("config.json", settings)
        self._said = {**said, **({} if self.checkpoints.list() else _UNSAVED)}
        self._directory.write_json("run.json", self._said)
        self._directory.write_json("summary.json", {})  # until the run ends
        return left

    def save(self, step: int, state: Mapping[str, Any], **options: Any) -> Path:
        """Saves a checkpoint as ``Checkpoints.save``; there must be an ``out``."""
        assert self.checkpoints is not None
        path = self.checkpoints.save(step, state, **options)
        if self._directory is not None and self._said.keys() & _UNSAVED.keys():
            self._said = {k: v for k, v in self._said.items() if k not in _UNSAVED}
            self._directory.write_json("run.json", self._said)
        return path

    def load(self) -> Loaded | None:
        """Returns the last checkpoint that is whole, or None if there was never one.

        Raises:
            ValueError: all are damaged, or those of the run are missing.
        """
        if self.checkpoints is None:
            return None
        if self.checkpoints.list():
            return self.checkpoints.load("latest")
        if self._directory is not None:
            self._require_unsaved(self._directory)
        return None

    def settings_of(self, loaded: Loaded) -> dict[str, Any]:
        """Returns the settings with which a checkpoint was made, as config.json has them; nothing
        if it lacks them."""
        path = loaded.path / CONFIG
        if not os.path.lexists(path):
            return {}
        return load_object(read_file(path, MAX_JSON, links=False), f"{path}:")

    def _require_unsaved(self, directory: RunDirectory) -> None:
        """Refuses to start at the beginning where checkpoints have been."""
        found = [name for name in (METRICS, EVENTS, "run.json") if (directory.path / name).exists()]
        if not found or directory.said().items() >= _UNSAVED.items():
            return
        records = [record for name in (METRICS, EVENTS) for record in directory.read(name)]
        last = max((r["step"] for r in records if type(r.get("step")) is int), default=0)
        raise ValueError(
            f"Trainer: {directory.path / 'ckpt'} must have a checkpoint to resume the run; got "
            f"none beside {', '.join(found)}, which goes to step {last}. Put the checkpoints back "
            "(is a disk not mounted?), or overwrite the run to start again"
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is no run yet; True in processes that write nothing."""
        return self._directory is None or not self._directory.existing()

    def rewind(self, step: int, records: int) -> tuple[list[Record], int]:
        """Drops what was written after a checkpoint.

        Args:
            step: of the checkpoint.
            records: metrics that there were: an evaluation may have followed at the same step.

        Returns:
            The records of the metrics that are left, and how many of all files were dropped.
        """
        if self._directory is None:
            return [], 0
        dropped = self._directory.truncate(METRICS, step, records)
        dropped += self._directory.truncate(EVENTS, step)
        left = [
            {name: _WORDS.get(value, value) for name, value in record.items()}
            for record in self._directory.read(METRICS)
        ]
        return left, dropped

    def append(self, name: str, record: Record) -> None:
        """Adds a record to a JSONL file."""
        if self._directory is not None:
            self._directory.append(name, record)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file."""
        if self._directory is not None:
            self._directory.write_json(name, value)


def describe(run: Run) -> dict[str, Any]:
    """Returns what run.json says: the name of the run, versions, device, sizes, and how a report
    shows it."""
    return {
        "name": run.name,
        "trm_fast": __version__,
        "torch": torch.__version__,
        "device": device_name(run.world.device),
        "threads": torch.get_num_threads(),
        "processes": run.world.size,
        "parameters": sum(param.numel() for param in run.model.parameters()),
        "report": {
            "steps": max(run.config.steps, run.step),
            "monitor": run.config.monitor,
            "mode": run.config.mode,
            **run.report,
        },
    }
