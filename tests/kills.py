"""Kills processes that train the small recipe at random moments, and resumes until it has ended.

    python -m tests.kills [--kills 20] [--processes 1] [--seed 0]

Each life of the run is ended by SIGKILL, from a thread, at a random moment from a step on: inside
of a step, an evaluation or a save. The steps are drawn over the whole run, one from each part of
equal length, and from those around each end of a stage. With two processes one of them is killed,
and the other one when the exchange of gradients fails. After so many kills the run is left alone.
What it has left at its end must be equal, to the bit, to what a run has left that was never killed;
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
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from trm_fast.train import Callback, Checkpoints, Run, Step

from .support.processes import start
from .train import small_recipe
from .train.runs import differences, result

CONFIG = {
    "steps": 400, "evaluate_every": 12, "save_every": 7, "log_every": 5, "monitor": "nats",
    "mode": "min",
}  # fmt: skip


class Killer(Callback):
    """Kills its process some time after a step, from a thread.

    Args:
        step: of the run, after which it happens.
        part: of the time of the shortest step of this life, in [0, 1).
    """

    def __init__(self, step: int, part: float) -> None:
        self.step, self.part = step, part
        self.began, self.shortest = 0.0, float("inf")

    def on_start(self, run: Run) -> None:
        self.began = time.perf_counter()

    def on_step(self, run: Run, step: Step) -> None:
        now = time.perf_counter()
        self.shortest = min(self.shortest, now - self.began)
        if run.step >= self.step:
            self.step = sys.maxsize
            threading.Timer(self.part * self.shortest, self.kill).start()
        self.began = now

    @staticmethod
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def state_dict(self) -> dict[str, Any]:
        return {}


class Outcome(NamedTuple):
    """What has come of a run that was killed again and again.

    Args:
        kills: how many lives were ended by one.
        steps: after which that was.
        differs: names of what differs from the run that was left alone.
        stages: those that are over, with the reasons.
        extra_updates: updates that are no steps.
        length: steps of the run.
    """

    kills: int
    steps: list[int]
    differs: list[str]
    stages: list[dict[str, Any]]
    extra_updates: int
    length: int


def steps_to_kill(kills: int, ends: list[int], chance: random.Random) -> list[int]:
    """Returns steps in order: at most half of them around the ends of stages, the others over all.

    Args:
        kills: how many.
        ends: the last steps of the stages, the last one that of the run.
        chance: draws.
    """
    length = ends[-1]
    # The step before an end, the one in which everything at the end happens, the one after it.
    around = [step for shift in (0, -1, 1) for step in (end + shift for end in ends)]
    found = [step for step in around if step <= length][: kills // 2]
    rest = kills - len(found)
    for part in range(rest):
        found.append(chance.randint(1 + part * length // rest, (part + 1) * length // rest))
    return sorted(found)


def live(
    out: Path,
    rank: int = 0,
    size: int = 1,
    store: Path | None = None,
    step: int = 0,
    part: float = 0,
) -> int:
    """Trains from the last checkpoint on; dies after ``step`` if there is one."""
    if size > 1:
        import torch.distributed as dist

        # An error in one process leaves the other one waiting.
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
            timeout=timedelta(seconds=20),
        )  # fmt: skip
    killers = [Killer(step, part)] if step else []
    small_recipe.build(out, *killers, **CONFIG).fit(resume=True)
    return 0


def train(out: Path, size: int, step: int = 0, part: float = 0, victim: int = 0) -> bool:
    """Gives a run one life; returns whether it was ended by a kill.

    Raises:
        RuntimeError: a process has failed by itself.
    """
    out.parent.mkdir(exist_ok=True)
    store = Path(tempfile.mkdtemp()) / "store"
    logs = [out.parent / f"{out.name}-log{rank}" for rank in range(size)]
    for log in logs:
        log.unlink(missing_ok=True)
    lives = [
        start(logs[rank], live, out, rank, size, store, step if rank == victim else 0, part)
        for rank in range(size)
    ]
    lives[victim].join()
    killed = lives[victim].exitcode == -signal.SIGKILL
    for process in lives:
        if killed and process is not lives[victim]:
            process.kill()
        process.join()
    failed = [process for process in lives if process.exitcode not in (0, -signal.SIGKILL)]
    if failed and not killed:
        raise RuntimeError("\n".join(log.read_text() for log in logs))
    return killed


def kill_often(directory: Path, kills: int, size: int, seed: int) -> Outcome:
    """Compares a run that is killed with one that is left alone."""
    chance, died = random.Random(seed), 0
    whole, parts = directory / f"whole{size}", directory / f"parts{size}"
    train(whole, size)
    stages = Checkpoints(whole).load().state["trainer"]["curriculum"]["history"]
    steps = steps_to_kill(kills, [stage["step"] for stage in stages], chance)
    for step in steps:
        died += train(parts, size, step, chance.random(), chance.randrange(size))
    train(parts, size)
    left = Checkpoints(parts).load().state["trainer"]
    return Outcome(
        died, steps, differences(result(whole), result(parts)), left["curriculum"]["history"],
        left["extra_updates"], left["step"],
    )  # fmt: skip


def main(kills: int, size: int, seed: int) -> int:
    with tempfile.TemporaryDirectory() as directory:
        found = kill_often(Path(directory), kills, size, seed)
    for stage in found.stages:
        print(f"stage {stage['stage']} ended at step {stage['step']}: {stage['reason']}")
    print(f"{found.extra_updates} extra updates; killed after steps {found.steps}")
    print(
        f"{found.kills} kills of a run of {size} processes, seed {seed}; differs in: "
        f"{found.differs or 'nothing'}"
    )
    return int(bool(found.differs) or found.kills < kills)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.kills, options.processes, options.seed))
