"""Kills processes that train the small recipe at random moments, and resumes until it has ended.

    python -m tests.kills [--kills 20] [--processes 1] [--seed 0]

Each life of the run is ended by SIGKILL, from a thread, at a random moment from a random step on:
inside of a step, an evaluation or a save. With two processes one of them is killed, and the other
one when the exchange of gradients fails. After so many kills the run is left alone. What it has
left at its end must be equal, to the bit, to what a run has left that was never killed; otherwise
the program exits with 1.
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

from trm_fast.train import Callback, Run, Step

from .train import small_recipe
from .train.processes import start
from .train.runs import differences, result

STEPS = 400


class Killer(Callback):
    """Kills its process some time after a step has begun, from a thread.

    Args:
        steps: of this life, before the one that is hit.
        part: of the time of a step, in [0, 1).
    """

    def __init__(self, steps: int, part: float) -> None:
        self.steps, self.part = steps, part
        self.began = 0.0

    def on_start(self, run: Run) -> None:
        self.began = time.perf_counter()

    def on_step(self, run: Run, step: Step) -> None:
        self.steps -= 1
        now = time.perf_counter()
        if self.steps == 0:
            threading.Timer(self.part * (now - self.began), self.kill).start()
        self.began = now

    @staticmethod
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def live(
    out: Path,
    rank: int = 0,
    size: int = 1,
    store: Path | None = None,
    steps: int = 0,
    part: float = 0,
) -> int:
    """Trains from the last checkpoint on; dies after ``steps`` if there are any."""
    if size > 1:
        import torch.distributed as dist

        # An error in one process leaves the other one waiting.
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
            timeout=timedelta(seconds=20),
        )  # fmt: skip
    killers = [Killer(steps, part)] if steps else []
    small_recipe.build(out, *killers, steps=STEPS).fit(resume=True)
    return 0


def train(out: Path, size: int, steps: int = 0, part: float = 0, victim: int = 0) -> bool:
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
        start(logs[rank], live, out, rank, size, store, steps if rank == victim else 0, part)
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


def kill_often(directory: Path, kills: int, size: int, seed: int) -> tuple[int, list[str]]:
    """Compares a run that is killed with one that is left alone.

    Returns:
        The kills, and what differs.
    """
    chance, died = random.Random(seed), 0
    whole, parts = directory / f"whole{size}", directory / f"parts{size}"
    train(whole, size)
    for _ in range(kills):
        # A checkpoint comes every seven steps, so that some lives save something and others do not.
        steps = chance.randrange(1, 11)
        died += train(parts, size, steps, chance.random(), chance.randrange(size))
    train(parts, size)
    return died, differences(result(whole), result(parts))


def main(kills: int, size: int, seed: int) -> int:
    with tempfile.TemporaryDirectory() as directory:
        died, found = kill_often(Path(directory), kills, size, seed)
    print(
        f"{died} kills of a run of {size} processes, seed {seed}; differs in: {found or 'nothing'}"
    )
    return int(bool(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.kills, options.processes, options.seed))
