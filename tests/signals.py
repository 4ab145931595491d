"""Sends signals to small runs at random moments, and resumes them.

    python -m tests.signals [--count 200] [--seed 0]

Each run is a process of its own, in a session of its own, with or without processes of its loader.
It is sent SIGTERM, SIGINT or SIGHUP, alone or with its whole group: at its start (before there are
data, while they are made, before there is a trainer, in its first hook), while a batch is drawn, in
a step, in an evaluation that would last for an hour, while it saves, or at its end. It is killed if
it has not ended after a grace. What it leaves must be a checkpoint of its last finished step, and
the run that is resumed from it must end with the bits of one that was left alone; otherwise the
program exits with 1.
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
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trm_fast.train import Callback, Checkpoints, Run, Step, Summary, Trainer

from .support.processes import start
from .train.runs import STEPS, differences, function_run, result

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOMENTS = ("start", "data", "step", "evaluation", "saving", "end")
# Only ends what hangs.
GRACE_S = 60.0
CONFIG = {"evaluate_every": 2, "save_every": 3, "ema": 0.9}


class Plan(NamedTuple):
    """Which signal is sent, and when.

    Args:
        number: of the signal.
        moment: one of ``MOMENTS``.
        step: of the run, from which on the moment counts; of the start, which place of it.
        delay: seconds from the moment on.
        group: whether all processes of the group get it.
        workers: processes of the loader.
    """

    number: signal.Signals
    moment: str
    step: int
    delay: float
    group: bool
    workers: int

    def __str__(self) -> str:
        to = "a group" if self.group else "one process"
        return (
            f"{self.number.name} to {to} in {self.moment} {self.step}, {self.delay:.4f} s, "
            f"{self.workers} workers"
        )


class Sender(Callback):
    """Sends a signal to a run, once, and writes down each step that is finished.

    Args:
        steps: file of the last finished step.
        plan: what to send.
    """

    def __init__(self, steps: Path, plan: Plan) -> None:
        self.steps, self.plan, self.run = steps, plan, os.getpid()

    def reach(self, moment: str, step: int) -> bool:
        """Sends the signal if this is the moment; returns whether it is. A process of a loader may
        be the one that sends it."""
        if moment != self.plan.moment or step < self.plan.step:
            return False
        try:
            self.steps.with_suffix(".sent").touch(exist_ok=False)
        except FileExistsError:
            return False
        if not self.plan.group:  # for a group it comes from outside
            threading.Timer(self.plan.delay, os.kill, (self.run, self.plan.number)).start()
        return True

    def finished(self) -> int:
        """Returns the last finished step."""
        return int(self.steps.read_text() or 0) if self.steps.exists() else 0

    def on_start(self, run: Run) -> None:
        self.reach("start", 4)

    def on_gradients(self, run: Run, step: Step) -> None:
        self.reach("step", step.index)

    def on_step(self, run: Run, step: Step) -> None:
        self.steps.write_text(str(run.step))

    def on_end(self, run: Run, summary: Summary) -> None:
        self.reach("end", STEPS)


class Examples(Dataset):
    """Examples of which some come with a signal, and then take their time."""

    def __init__(self, sender: Sender | None) -> None:
        self.sender = sender
        generator = torch.Generator().manual_seed(1)
        self.features = torch.randn(26, 6, generator=generator)
        self.targets = torch.randint(3, (26,), generator=generator)
        if sender is not None:
            sender.reach("start", 2)

    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.sender is not None and self.sender.reach("data", self.sender.finished()):
            time.sleep(0.05)
        return self.features[index], self.targets[index]


def small_run(out: Path, sender: Sender | None = None, workers: int = 0) -> Trainer:
    """The run that is sent signals, or one like it that is left alone."""
    # By fork, as these processes would otherwise load torch anew.
    options = {"prefetch_factor": 1, "multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(Examples(sender), 7, shuffle=True, num_workers=workers, **options)
    return function_run(out, () if sender is None else (sender,), batches=loader, **CONFIG)


class Outcome(NamedTuple):
    """What has come of the signals.

    Args:
        moments: how many of each kind of moment.
        failures: what was wrong, one line each.
    """

    moments: Counter[str]
    failures: list[str]


def live(out: Path, plan: Plan) -> int:
    """Trains until the signal ends the run; the exit code is 0 then."""
    os.setsid()
    for each in NUMBERS:  # a shell may have had them ignored
        signal.signal(each, signal.SIG_DFL)
    sender = Sender(out.with_suffix(".steps"), plan)
    sender.reach("start", 1)
    trainer = small_run(out, sender, plan.workers)
    sender.reach("start", 3)
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


def planned(chance: random.Random) -> Plan:
    """Draws a signal."""
    moment = chance.choice(MOMENTS)
    first, last = {
        "start": (1, 4), "data": (0, STEPS - 4), "evaluation": (1, STEPS - 2),
        "saving": (1, STEPS - 2),
    }.get(moment, (1, STEPS))  # fmt: skip
    delay = chance.choice((0.0, chance.uniform(0.0, 0.02)))
    return Plan(
        chance.choice(NUMBERS), moment, chance.randint(first, last), delay,
        group=chance.random() < 0.5, workers=chance.choice((0, 2)),
    )  # fmt: skip


def signal_once(out: Path, whole: dict, plan: Plan) -> str:
    """Returns what was wrong after a signal, or nothing."""
    log = out.with_suffix(".log")
    process = start(log, live, out, plan, daemon=False)
    if plan.group:
        sent = out.with_suffix(".sent")
        while process.is_alive() and not sent.exists():
            time.sleep(0.001)
        time.sleep(plan.delay)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, plan.number)
    process.join(GRACE_S)
    if process.exitcode is None:
        process.kill()
        process.join()
    # The end of a process may come before the end of its run has given the handlers back, and
    # before a run there is none that could catch the signal.
    late = plan.moment not in ("evaluation", "data") and process.exitcode == -plan.number
    if process.exitcode != 0 and not late:
        return f"{plan}: ended with {process.exitcode}\n{log.read_text()}"
    finished = Sender(out.with_suffix(".steps"), plan).finished()
    if late and finished == 0 and not Checkpoints(out).list():
        found = 0
    else:
        found = Checkpoints(out).load().step
    if found != finished:
        return f"{plan}: a checkpoint of step {found} after step {finished}"
    small_run(out).fit(resume=True)
    differs = differences(whole, result(out))
    return f"{plan}: differs in {differs}" if differs else ""


def signal_often(directory: Path, count: int, seed: int) -> Outcome:
    """Compares runs that are ended by a signal, and resumed, with one that is left alone."""
    chance, moments, failures = random.Random(seed), Counter(), []
    small_run(directory / "whole").fit()
    whole = result(directory / "whole")
    for index in range(count):
        plan = planned(chance)
        wrong = signal_once(directory / f"run{index}", whole, plan)
        moments[plan.moment] += 1
        failures += [wrong] if wrong else []
    return Outcome(moments, failures)


def main(count: int, seed: int) -> int:
    torch.set_num_threads(1)  # as in the processes
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
