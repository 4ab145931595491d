"""Processes that go through numbered inputs; one that an input ends is started again behind it."""

import faulthandler
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

# Not in the platform's own way: a process is to have what is imported already.
_FORK = multiprocessing.get_context("fork")
_NONE = -1

Work = Callable[[Iterator[int]], Counter[str]]
Numbers = Callable[[int, int | None], Iterator[int]]


def run_jobs(work: Work, numbers: Numbers, jobs: int, patience: float) -> Counter[str]:
    """Goes through the inputs of all jobs.

    Args:
        work: goes through inputs by their numbers; returns how often each outcome occurred.
        numbers: gives those of a job, all or those after one of them.
        jobs: processes.
        patience: seconds for one input, after which its process is ended.

    Returns:
        The outcomes of all. Of a process that ended within an input, that one is "!ended by" a
        signal; those before it are "not counted".
    """
    running = [_Job(work, numbers, job, None) for job in range(jobs)]
    total: Counter[str] = Counter()
    while running:
        wait([job.outcomes for job in running], timeout=min(patience, 1))
        for job in list(running):
            if job.outcomes.poll():
                running.remove(job)
                last = job.finish(total)
                if last is not None:
                    running.append(_Job(work, numbers, job.number, last))
            elif job.stalled(patience):
                assert job.process.pid is not None
                os.kill(job.process.pid, signal.SIGABRT)
    return total


class _Job:
    def __init__(self, work: Work, numbers: Numbers, number: int, after: int | None) -> None:
        self.number = number
        self.outcomes, sent = _FORK.Pipe(duplex=False)
        self.at: Any = _FORK.Value("q", _NONE, lock=False)
        self.done: Any = _FORK.Value("q", 0, lock=False)
        self.process = _FORK.Process(target=self._run, args=(work, numbers(number, after), sent))
        self.process.start()
        sent.close()
        self._seen, self._since = _NONE, time.monotonic()

    def _run(self, work: Work, numbers: Iterator[int], sent: Connection) -> None:
        faulthandler.enable()
        sent.send(work(self._noted(numbers)))

    def _noted(self, numbers: Iterator[int]) -> Iterator[int]:
        for number in numbers:
            self.at.value = number
            yield number
            self.done.value += 1

    def stalled(self, patience: float) -> bool:
        if self.at.value != self._seen:
            self._seen, self._since = self.at.value, time.monotonic()
        return time.monotonic() - self._since > patience

    def finish(self, total: Counter[str]) -> int | None:
        """Adds the outcomes; returns the number of the input that ended the process, if any."""
        try:
            total += self.outcomes.recv()
            return None
        except EOFError:
            last: int = self.at.value
        finally:
            self.process.join()
        if last == _NONE:
            raise RuntimeError("a process must reach its first input; see what it has printed")
        total["not counted"] += self.done.value
        total[f"!ended by {self.process.exitcode} (--start {last})"] += 1
        return last
