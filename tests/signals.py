"""Sends signals to small runs at random moments, and resumes them.

    python -m tests.signals [--count 200] [--seed 0]

Each run is a process of its own, which sends itself SIGTERM, SIGINT or SIGHUP from a thread: at its
start, in a step, in an evaluation that would last for an hour, while it saves, or at its end. It is
killed if it has not ended after a grace. What it leaves must be a checkpoint of its last finished
step, and the run that is resumed from it must end with the bits of one that was left alone;
otherwise the program exits with 1.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from trm_fast.train import Callback, Checkpoints, Run, Step, Summary

from .support.processes import start
from .train.runs import STEPS, differences, function_run, result

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOMENTS = ("start", "step", "evaluation", "saving", "end")
# Only ends what hangs.
GRACE_S = 60.0
CONFIG = {"evaluate_every": 2, "save_every": 3, "ema": 0.9}


class Sender(Callback):
    """Sends a signal to its process, once, and writes down each step that is finished.

    Args:
        steps: file of the last finished step.
        number: of the signal.
        moment: one of ``MOMENTS``.
        step: of the run, from which on the moment counts.
        delay: seconds from the moment on.
    """

    def __init__(self, steps: Path, number: int, moment: str, step: int, delay: float) -> None:
        self.steps, self.number, self.moment = steps, number, moment
        self.step, self.delay, self.sent = step, delay, False

    def reach(self, moment: str, step: int) -> bool:
        """Sends the signal if this is the moment; returns whether it is."""
        if self.sent or moment != self.moment or step < self.step:
            return False
        self.sent = True
        threading.Timer(self.delay, os.kill, (os.getpid(), self.number)).start()
        return True

    def on_start(self, run: Run) -> None:
        self.reach("start", self.step)

    def on_gradients(self, run: Run, step: Step) -> None:
        self.reach("step", step.index)

    def on_step(self, run: Run, step: Step) -> None:
        self.steps.write_text(str(run.step))

    def on_end(self, run: Run, summary: Summary) -> None:
        self.reach("end", self.step)


class Outcome(NamedTuple):
    """What has come of the signals.

    Args:
        moments: how many of each kind of moment.
        failures: what was wrong, one line each.
    """

    moments: Counter[str]
    failures: list[str]


def live(out: Path, number: int, moment: str, step: int, delay: float) -> int:
    """Trains until the signal ends the run; the exit code is 0 then."""
    for each in NUMBERS:  # a shell may have had them ignored
        signal.signal(each, signal.SIG_DFL)
    sender = Sender(out.with_suffix(".steps"), number, moment, step, delay)
    trainer = function_run(out, (sender,), **CONFIG)
    evaluate, save = trainer.evaluator, trainer.files.checkpoints.save

    def evaluator(model):
        if sender.reach("evaluation", trainer.step):
            time.sleep(3600)
        return evaluate(model)

    def saved(step, *args, **options):
        sender.reach("saving", step)
        return save(step, *args, **options)

    trainer.evaluator, trainer.files.checkpoints.save = evaluator, saved
    trainer.fit()
    # What comes after the run would end the process, as it would any other.
    os._exit(0)


def signal_once(out: Path, whole: dict, chance: random.Random) -> tuple[str, str]:
    """Returns the moment of one signal, and what was wrong after it, or nothing."""
    number, moment = chance.choice(NUMBERS), chance.choice(MOMENTS)
    last = STEPS - 2 if moment in ("evaluation", "saving") else STEPS
    step = chance.randint(1, last)
    delay = chance.choice((0.0, chance.uniform(0.0, 0.02)))
    log = out.with_suffix(".log")
    process = start(log, live, out, number, moment, step, delay)
    process.join(GRACE_S)
    told = f"{number.name} in {moment} {step}, {delay:.4f} s: "
    if process.exitcode is None:
        process.kill()
        process.join()
    # The end of a process may come before the end of its run has given the handlers back.
    late = moment in ("end", "start", "step", "saving") and process.exitcode == -number
    if process.exitcode != 0 and not late:
        return moment, f"{told}ended with {process.exitcode}\n{log.read_text()}"
    steps = out.with_suffix(".steps")
    finished = int(steps.read_text()) if steps.exists() else 0
    found = Checkpoints(out).load().step
    if found != finished:
        return moment, f"{told}a checkpoint of step {found} after step {finished}"
    function_run(out, **CONFIG).fit(resume=True)
    differs = differences(whole, result(out))
    return moment, f"{told}differs in {differs}" if differs else ""


def signal_often(directory: Path, count: int, seed: int) -> Outcome:
    """Compares runs that are ended by a signal, and resumed, with one that is left alone."""
    chance, moments, failures = random.Random(seed), Counter(), []
    function_run(directory / "whole", **CONFIG).fit()
    whole = result(directory / "whole")
    for index in range(count):
        moment, wrong = signal_once(directory / f"run{index}", whole, chance)
        moments[moment] += 1
        failures += [wrong] if wrong else []
    return Outcome(moments, failures)


def main(count: int, seed: int) -> int:
    with tempfile.TemporaryDirectory() as directory:
        found = signal_often(Path(directory), count, seed)
    for line in found.failures:
        print(line)
    print(f"{count} signals, seed {seed}: {dict(found.moments)}; {len(found.failures)} went wrong")
    return int(bool(found.failures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.count, options.seed))
