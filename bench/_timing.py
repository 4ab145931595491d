"""Times many rows in turns within one run; the choices are explained in bench/README.md."""

import gc
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from time import perf_counter

import torch

from ._tables import Row

# A turn must outlast what the turn before has left behind in caches and clocks.
TURN_SECONDS = 0.01
TURNS, STEPS_OF_A_TURN = 20, 3
# From here on a step itself outlasts that, and one of them is a turn.
SLOW_SECONDS = 0.05


@dataclass(frozen=True)
class Budget:
    """What a row may take: about ``seconds``, but never fewer than ``samples`` timed steps."""

    seconds: float
    samples: int


@dataclass(eq=False)
class _Job:
    row: Row
    seconds: list[float] = field(default_factory=list)
    error: Exception | None = None
    turns: int = 0
    untimed: int = 0
    steps: int = 0

    def run(self, clock: Callable[[Row, int], list[float]]) -> None:
        """Takes one turn. What it raises ends the job, and not the run."""
        try:
            found = clock(self.row, self.untimed + self.steps)
        except Exception as error:
            self.error = error
        else:
            self.seconds += [second / self.row.items for second in found[self.untimed :]]

    def plan(self, clock: Callable[[Row, int], list[float]], budget: Budget) -> None:
        """Takes two steps as a warm-up, and decides on turns by what the second takes."""
        try:
            clock(self.row, 1)
            start = perf_counter()
            clock(self.row, 1)
            whole = perf_counter() - start
        except Exception as error:
            self.error = error
            return
        if whole < SLOW_SECONDS:
            # The first step brings caches and branch predictors to where the row leaves them.
            self.untimed = 1
            self.steps = max(STEPS_OF_A_TURN, round(TURN_SECONDS / whole))
        else:
            self.steps = 1
        affordable = round(budget.seconds / (whole * (self.untimed + self.steps)))
        self.turns = max(min(TURNS, affordable), ceil(budget.samples / self.steps))


def interleave(
    rows: Mapping[str, Row], budget: Budget, device: str
) -> dict[str, list[float] | Exception]:
    """Gives every row its turns, one row after the other in each round, in an order that changes.

    Args:
        rows: what is timed; each has taken a step before.
        budget: what a row may take; slow rows get fewer turns, evenly spread.
        device: "cpu" or "cuda".

    Returns:
        The times of an item of each row, or what one of its steps has raised.
    """
    clock = _seconds_on_cuda if device == "cuda" else _seconds_on_cpu
    jobs = {name: _Job(row) for name, row in rows.items()}
    gc.collect()
    gc.disable()
    try:
        for job in jobs.values():
            job.plan(clock, budget)
        rounds = max(job.turns for job in jobs.values())
        for turn in range(rounds):
            # Another neighbour in each round, so that none is a burden to one row only.
            for job in random.Random(turn).sample([*jobs.values()], len(jobs)):
                its_turn = turn * job.turns // rounds != (turn - 1) * job.turns // rounds
                if its_turn and job.error is None:
                    job.run(clock)
    finally:
        gc.enable()
    return {name: job.error or job.seconds for name, job in jobs.items()}


def _seconds_on_cpu(row: Row, steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        row.prepare()
        start = perf_counter()
        row.step()
        seconds.append(perf_counter() - start)
    return seconds


def _seconds_on_cuda(row: Row, steps: int) -> list[float]:
    """Launches all steps before it waits, so that the host counts only where it is slower."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(steps)]
    torch.cuda.synchronize()
    for start, end in events:
        row.prepare()
        start.record()
        row.step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def extra_bytes(prepare: Callable[[], None], step: Callable[[], object], device: str) -> int:
    """Returns by how much the tensors of a step exceed, at their peak, those alive before it.

    Args:
        prepare: puts the inputs in place, and leaves it to the step to free them.
        step: what is measured; on the CPU it runs twice.
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        return _extra_bytes_on_cuda(prepare, step)
    return _extra_bytes_on_cpu(prepare, step)


def _extra_bytes_on_cuda(prepare: Callable[[], None], step: Callable[[], object]) -> int:
    prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _extra_bytes_on_cpu(prepare: Callable[[], None], step: Callable[[], object]) -> int:
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        # Only what was allocated under the profiler counts when it is freed: a step before the one
        # that is measured replaces whatever the steps replace.
        prepare()
        step()
        prepare()
        with torch.profiler.record_function("measured step"):
            step()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    names = [event.name() for event in events]
    sizes = [event.nbytes() if event.name() == "[memory]" else 0 for event in events]
    first = names.index("measured step")
    return max(itertools.accumulate(sizes[first:]))
