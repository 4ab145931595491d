"""Times many variants side by side in one run; the choices are explained in bench/README.md."""

import gc
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

# Timed seconds for one variant in one table: keeps four tables of 14 variants below three minutes.
SECONDS = 3.0
# A turn must outlast what the turn before has left behind in caches and clocks.
TURN_SECONDS = 0.01
LEAST_ROUNDS, LEAST_STEPS = 3, 3


def _nothing() -> None:
    pass


@dataclass(eq=False)
class Job:
    """What is timed: ``prepare()``, not timed, stands before every ``step()``.

    Args:
        name: how the row is called.
        step: the call that is timed.
        prepare: puts the inputs of the next step in place.
        seconds: timed steps; filled by ``interleave``.
    """

    name: str
    step: Callable[[], object]
    prepare: Callable[[], None] = _nothing
    seconds: list[float] = field(default_factory=list)


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Returns the first quartile, the median and the third quartile."""
    if len(seconds) == 1:
        return (seconds[0],) * 3
    return tuple(statistics.quantiles(seconds, n=4, method="inclusive"))


def interleave(jobs: Sequence[Job], rounds: int, device: str) -> None:
    """Gives every job its turns, one job after the other in each round, in an order that changes.

    Args:
        jobs: what is timed; each has taken a step before.
        rounds: rounds with all jobs; slow jobs take part in fewer of them, evenly spread.
        device: "cpu" or "cuda".
    """
    clock = _seconds_on_cuda if device == "cuda" else _seconds_on_cpu
    gc.collect()
    gc.disable()
    try:
        plans = {job: _plan(min(clock(job, 2)), rounds) for job in jobs}  # the warm-up
        for turn in range(rounds):
            # Another neighbour in each round, so that none is a burden to one job only.
            for job in random.Random(turn).sample(jobs, len(jobs)):
                turns, steps = plans[job]
                if turn * turns // rounds != (turn - 1) * turns // rounds:
                    # The first step of a turn brings caches and branch predictors to its own state.
                    job.seconds += clock(job, 1 + steps)[1:]
    finally:
        gc.enable()


def _plan(seconds: float, rounds: int) -> tuple[int, int]:
    """Returns the number of turns, and of timed steps in one turn, for a step of this length."""
    steps = max(LEAST_STEPS, round(TURN_SECONDS / seconds))
    affordable = round(SECONDS / (seconds * (1 + steps)))
    return min(rounds, max(LEAST_ROUNDS, affordable)), steps


def _seconds_on_cpu(job: Job, steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        job.prepare()
        start = perf_counter()
        job.step()
        seconds.append(perf_counter() - start)
    return seconds


def _seconds_on_cuda(job: Job, steps: int) -> list[float]:
    """Launches all steps before it waits, so that the host counts only where it is slower."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(steps)]
    torch.cuda.synchronize()
    for start, end in events:
        job.prepare()
        start.record()
        job.step()
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
