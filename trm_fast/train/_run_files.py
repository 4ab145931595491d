"""The files of a run as a trainer uses them: none without ``out``, and written by one process."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from trm_fast._version import __version__
from trm_fast.train.checkpoints.checkpoints import Checkpoints, Loaded, size_of
from trm_fast.train.distributed import World, device_name
from trm_fast.train.run import Record, Run
from trm_fast.train.run_directory import RunDirectory

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
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

    @contextmanager
    def opened(self, resume: bool, overwrite: bool) -> Iterator[None]:
        """Locks the directory for a while, and removes the run that is there if that is asked for.

        Raises:
            FileExistsError: there is a run, and neither ``resume`` nor ``overwrite``.
            OSError: the directory cannot be written, or another process trains there.
        """
        if self.out is None:
            yield
            return
        with ExitStack() as stack:
            if self.world.is_main:
                directory = stack.enter_context(RunDirectory(self.out, files=self.names))
                if directory.existing() and not resume:
                    if not overwrite:
                        raise FileExistsError(
                            f"Trainer: out must be a directory without a run; got {self.out}, "
                            "which holds one. Choose another one, resume the run, or overwrite it"
                        )
                    directory.clear()
                self._directory = directory
                stack.callback(setattr, self, "_directory", None)
            self.world.barrier()
            yield

    def require_savable(self, state: Mapping[str, Any]) -> None:
        """Checks that a state can be saved, and that there is room for checkpoints of it; all
        processes must call it.

        Raises:
            TypeError, ValueError: it holds something that cannot be saved.
            OSError: there is no room.
        """
        refused: Exception | None = None
        try:
            if self._directory is not None:
                # Two are kept while the next one is written.
                self._directory.require_space(3 * size_of(state))
        except (TypeError, ValueError, OSError) as error:
            refused = error
        # The others would wait for the first process, which alone writes.
        for reason in self.world.gather(refused):
            if reason is not None:
                raise reason

    def load(self) -> Loaded | None:
        """Returns the last checkpoint that is whole, or None if there was never one.

        Raises:
            ValueError: all are damaged.
        """
        if self.checkpoints is None or not self.checkpoints.list():
            return None
        return self.checkpoints.load("latest")

    def rewind(self, step: int, records: int) -> list[Record]:
        """Drops what was written after a checkpoint.

        Args:
            step: of the checkpoint.
            records: metrics that there were: an evaluation may have followed at the same step.

        Returns:
            The records of the metrics that are left.
        """
        if self._directory is None:
            return []
        self._directory.truncate(METRICS, step, records)
        self._directory.truncate(EVENTS, step)
        return [
            {name: _WORDS.get(value, value) for name, value in record.items()}
            for record in self._directory.read(METRICS)
        ]

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
            "steps": run.config.steps,
            "monitor": run.config.monitor,
            "mode": run.config.mode,
            **run.report,
        },
    }
