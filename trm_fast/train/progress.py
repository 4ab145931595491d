"""``Progress``: a bar for a person, one line per interval for a file."""

import math
import sys
from collections.abc import Sequence
from typing import Any, TextIO, cast

import torch

from trm_fast.train.callbacks import Callback
from trm_fast.train.display import Display, is_terminal, show_line
from trm_fast.train.generators import fork_rng
from trm_fast.train.run import Record, Run, Step

_BYTES = 200  # of a line, with its end


class Progress(Callback):
    """Shows how a run goes: with rich on a terminal, else as lines of at most 200 bytes. A terminal
    that is closed, or whatever else cannot show it, changes nothing in the run.

    Args:
        metrics: names of the metrics that are shown, where there are any.
        every: updates between two lines at least; 0 shows every record.
        bar: whether to draw a bar; None means if the output is a terminal. Needs rich.
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("loss", "accuracy", "exact_accuracy"),
        every: int = 0,
        bar: bool | None = None,
    ) -> None:
        self.shown = tuple(metrics)
        self.bar = is_terminal() if bar is None else bar
        self.every = every
        self._last = 0
        self._display: Any = None
        self._task: Any = None

    def on_start(self, run: Run) -> None:
        if not self.bar or not run.world.is_main:
            return
        # rich draws from Python's generator when it is imported.
        with fork_rng(torch.device("cpu")):
            self._begin(run)

    def _begin(self, run: Run) -> None:
        from rich import progress
        from rich.console import Console

        self._display = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[shown]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(file=cast(TextIO, Display(sys.stdout))),
        )
        self._task = self._display.add_task(
            "steps", total=run.config.steps, completed=run.step, shown=""
        )
        self._display.start()

    def on_step(self, run: Run, step: Step) -> None:
        if self._display is not None:
            self._display.update(self._task, completed=run.step)

    def on_log(self, run: Run, record: Record) -> None:
        shown = self._shown(record)
        if self._display is not None:
            self._display.update(self._task, shown=shown)
        elif self._is_due(record):
            pace = f"{record['steps_per_second']:.3g} steps/s"
            self._line(run, f"step {record['step']}/{run.config.steps}  {shown}  {pace}")

    def on_evaluate(self, run: Run, record: Record) -> None:
        if self._is_due(record):
            self._line(run, f"step {record['step']}: evaluation  {self._shown(record)}")

    def on_event(self, run: Run, record: Record) -> None:
        self._line(run, f"step {record['step']}: {record['message']}")

    def close(self) -> None:
        """Gives the terminal back."""
        if self._display is not None:
            self._display.stop()
            self._display = None

    def _is_due(self, record: Record) -> bool:
        step: int = record["step"]
        if self.every and step != self._last and step // self.every == self._last // self.every:
            return False
        self._last = step
        return True

    def _shown(self, record: Record) -> str:
        return "  ".join(_shown_as(name, record[name]) for name in self.shown if name in record)

    def _line(self, run: Run, line: str) -> None:
        if not run.world.is_main:
            return
        line = _cut(line)
        if self._display is not None:
            self._display.console.print(line, highlight=False, markup=False)
        else:
            show_line(line)


def _shown_as(name: str, value: float) -> str:
    # A metric without anything to count, such as finished puzzles, is NaN; a NaN loss is a fault.
    nothing = math.isnan(value) and name != "loss"
    return f"{name} -" if nothing else f"{name} {value:.4g}"


def _cut(line: str) -> str:
    """Returns a line of at most 200 bytes with its end; events.jsonl has all of it."""
    data = " ".join(line.split()).encode()
    return line if len(data) < _BYTES else data[: _BYTES - 4].decode(errors="ignore") + "..."
