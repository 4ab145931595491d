"""Interrupts small runs at random places, resumes them, and compares with runs left alone.

    python -m tests.interruptions [--count 40] [--seed 0]

Each round takes one of the runs of tests/train/runs.py and ends it two times at random: by a signal
that it catches, or like a kill, from inside of a step, a log, an evaluation or a save. Each time a
new trainer takes the run up. What is left at the end must be equal to the bit: weights, averages,
states of optimizers and filters, carry, random generators, place in the data, callbacks, schedules
and metrics. It exits with 1 if anything differs.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trm_fast.train import Callback, Run, Step, StepResult

from .train.runs import CASES, STEPS, differences, result

PLACES = ("forward", "on_gradients", "on_step", "on_log", "on_evaluate", "on_save", "signal")


class Killed(BaseException):
    """Ends a run where it stands, as a kill would: nothing is saved any more."""


class Interruption(Callback):
    """Ends a run at the first call at one place from a step on.

    Args:
        place: one of ``PLACES``.
        step: the step.
        passes: forward passes of the step before the one that is interrupted.
    """

    def __init__(self, place: str, step: int, passes: int = 0) -> None:
        self.place, self.step, self.passes = place, step, passes
        self.happened = False

    def on_start(self, run: Run) -> None:
        if self.place != "forward":
            return
        objective = run.objective
        losses, left = objective.losses, self.passes

        def forward(*args: Any) -> Iterator[StepResult]:
            nonlocal left
            for found in losses(*args):
                if run.step >= self.step:
                    left -= 1
                    if left < 0:
                        self.happened = True
                        raise Killed
                yield found

        objective.losses = forward  # type: ignore[method-assign]

    def _end(self, place: str, run: Run) -> None:
        if self.happened or run.step < self.step:
            return
        if self.place == "signal" and place == "on_step":
            self.happened = True
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.place == place:
            self.happened = True
            raise Killed

    def on_gradients(self, run: Run, step: Step) -> None:
        self._end("on_gradients", run)

    def on_step(self, run: Run, step: Step) -> None:
        self._end("on_step", run)

    def on_log(self, run: Run, record: Any) -> None:
        self._end("on_log", run)

    def on_evaluate(self, run: Run, record: Any) -> None:
        self._end("on_evaluate", run)

    def on_save(self, run: Run, path: Path) -> None:
        self._end("on_save", run)


def interrupted(case: str, out: Path, chance: random.Random, times: int = 2) -> str:
    """Takes a run to its end with interruptions; returns where they were."""
    told = []
    for _ in range(times):
        place = chance.choice(PLACES)
        stop = Interruption(place, chance.randrange(STEPS + 1), chance.randrange(3))
        # What the process has drawn before must not matter.
        torch.manual_seed(chance.randrange(1000))
        try:
            CASES[case](out, (stop,)).fit(resume=True)
        except Killed:
            pass
        told.append(f"{place} from step {stop.step}" if stop.happened else "nothing")
    CASES[case](out).fit(resume=True)
    return ", ".join(told)


def main(count: int, seed: int) -> int:
    chance = random.Random(seed)
    wanted: dict[str, dict[str, Any]] = {}
    places: Counter[str] = Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        names = list(CASES)
        for number in range(count):
            case = names[number % len(names)]
            if case not in wanted:
                CASES[case](Path(directory) / case).fit()
                wanted[case] = result(Path(directory) / case)
            out = Path(directory) / f"run{number}"
            told = interrupted(case, out, chance)
            places.update(part.partition(" from ")[0] for part in told.split(", "))
            found = differences(wanted[case], result(out))
            if found:
                failed += 1
                print(f"{case}; {told}: differs in {', '.join(found)}")
    where = ", ".join(f"{name} {places[name]}" for name in sorted(places))
    print(f"{count} runs of {len(wanted)} kinds, seed {seed}; interruptions: {where}")
    print(f"not equal to the run left alone: {failed}")
    return int(failed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.exit(main(options.count, options.seed))
