"""Kills trainers at random instants and counts what that costs.

    python -m tests.crash [--kills 1000] [--seed 0] [--naive]

A child saves in a loop into a run directory, and tells the parent of each save after it returned.
The parent kills it (SIGKILL) at a random instant, starts the next child on what it finds, and
counts runs that do not load, saves that were told of and are gone, states that are not what was
saved, and leftovers after a start. It exits with 1 if any of these counts is not 0. ``--naive``
overwrites one file instead, as many training loops do, for comparison.

SIGKILL leaves the page cache alone, so it says nothing about fsync: that is what
tests/train/test_crash.py replays.
"""

import argparse
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from trm_fast.train import Checkpoints, RunDirectory
from trm_fast.train.checkpoints.state import from_safetensors, to_safetensors

PHASES = ("elsewhere", "write", "publish", "prune")
PARAMETERS = 1 << 17  # half a megabyte, and as much again in the optimizer
SAVES_PER_RUN = 6  # expected number; kills fall evenly into as many saves


def state_at(step: int) -> dict:
    """A state from which its step can be told again, in every element."""
    weight = torch.full((PARAMETERS,), float(step))
    return {
        "model": {"weight": weight},
        "optim": {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": weight + 1}}},
        "trainer": {"step": step, "order": (step, step + 1)},
    }


def is_state_at(step: int, state: dict) -> bool:
    expected = state_at(step)
    first, second = state["optim"]["state"][0], expected["optim"]["state"][0]
    return (
        torch.equal(state["model"]["weight"], expected["model"]["weight"])
        and all(torch.equal(first[name], second[name]) for name in second)
        and state["trainer"] == expected["trainer"]
    )


class Phase:
    """Which part of a save a process is in, readable after its death."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 1)

    def wrap(self, owner: type, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def wrapped(*args: object) -> object:
            self.memory[0] = PHASES.index(name)
            return inner(*args)

        setattr(owner, method, wrapped)

    def set(self, name: str) -> None:
        self.memory[0] = PHASES.index(name)

    def get(self) -> str:
        return PHASES[self.memory[0]]


class Watched(Checkpoints):
    """Its own class, so that wrapping its methods leaves the real one as it is."""


def save_forever(run: Path, told: int, phase: Phase) -> None:
    with RunDirectory(run) as directory:
        directory.remove_unfinished()
        checkpoints = Watched(run)
        step = checkpoints.load().step if checkpoints.list() else 0
        while True:
            step += 1
            state = state_at(step)
            phase.set("write")
            checkpoints.save(step, state, score=float(step % 7))
            phase.set("elsewhere")
            os.write(told, step.to_bytes(8, "little"))


def overwrite_forever(run: Path, told: int, phase: Phase) -> None:
    run.mkdir(exist_ok=True)
    step = 0
    while True:
        step += 1
        data = b"".join(to_safetensors({"weight": state_at(step)["model"]["weight"]}))
        phase.set("write")
        (run / "model.safetensors").write_bytes(data)
        phase.set("elsewhere")
        os.write(told, step.to_bytes(8, "little"))


def killed(child: Callable[[], None], wait: float) -> None:
    """Runs ``child`` in a process of its own and kills that after ``wait`` seconds."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(3)  # it must not come back into the parent's code
    time.sleep(wait)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        raise RuntimeError("crash: a child must not end by itself; see its error above")


def kill_one(run: Path, save: Callable[..., None], wait: float, phase: Phase) -> int:
    """Kills one child and returns the last step that it told of, or 0."""
    phase.set("elsewhere")
    here, there = os.pipe()
    killed(lambda: save(run, there, phase), wait)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        steps = pipe.read()
    # A number of 8 bytes goes through a pipe whole.
    return int.from_bytes(steps[-8:], "little")


def look(run: Path, acknowledged: int) -> tuple[str | None, int]:
    """Starts again on what a kill left; returns what is wrong, or None, and the step."""
    with RunDirectory(run) as directory:
        directory.remove_unfinished()
        checkpoints = Checkpoints(run)
        infos = checkpoints.list()
        if not infos:
            return ("lost" if acknowledged else None), 0
        try:
            loaded = checkpoints.load()
        except ValueError as error:
            print(error, file=sys.stderr)
            return "unloadable", 0
        unfinished = [path.name for path in run.rglob(".tmp-*")]
        if loaded.step < acknowledged:
            return "lost", loaded.step
        if not is_state_at(loaded.step, loaded.state):
            return "wrong", loaded.step
        damaged = [info for info in infos if info.damage]
        return ("leftover" if unfinished or damaged else None), loaded.step


def look_naively(run: Path, acknowledged: int) -> tuple[str | None, int]:
    path = run / "model.safetensors"
    try:
        return None, int(from_safetensors(path.read_bytes())["weight"][0])
    except ValueError:
        return "unloadable", 0
    except FileNotFoundError:
        return ("lost" if acknowledged else None), 0


def seconds_per_save(save: Callable[..., None], directory: Path) -> float:
    """Measures on the spot, so that kills fall into saves on any machine."""
    told = kill_one(directory / "warm-up", save, 1.0, Phase())
    return 1.0 / max(told, 1)


def count(kills: int, seed: int, naive: bool, directory: Path) -> tuple[Counter, Counter, float]:
    """Kills so often; returns counts of what was wrong, of phases that were hit, and the seconds
    per save."""
    save, examine = (overwrite_forever, look_naively) if naive else (save_forever, look)
    phase, chance = Phase(), random.Random(seed)
    if not naive:
        phase.wrap(Watched, "_publish", "publish")
        phase.wrap(Watched, "_prune", "prune")
    pause = seconds_per_save(save, directory)
    wrong, hit, acknowledged, run = Counter(), Counter(), 0, directory / "run"
    for kill in range(kills):
        if kill % 50 == 0:
            # Anew from time to time, so that first saves are killed too.
            shutil.rmtree(run, ignore_errors=True)
            acknowledged = 0
        told = kill_one(run, save, chance.uniform(0, SAVES_PER_RUN * pause), phase)
        hit[phase.get()] += 1
        acknowledged = max(acknowledged, told) if not naive else told
        error, step = examine(run, acknowledged)
        if error:
            wrong[error] += 1
            shutil.rmtree(run, ignore_errors=True)
            acknowledged = 0
        elif step > acknowledged:
            acknowledged = step  # it was read, so it must stay
    return wrong, hit, pause


def report(kills: int, wrong: Counter, hit: Counter, pause: float, naive: bool) -> str:
    """The summary line."""
    during = kills - hit["elsewhere"]
    phases = ", ".join(f"{name} {hit[name]}" for name in PHASES[1:] if hit[name])
    kinds = ("unloadable",) if naive else ("unloadable", "lost", "wrong", "leftover")
    found = ", ".join(f"{wrong[kind]} {kind}" for kind in kinds)
    name = "one file overwritten" if naive else "checkpoints"
    return (
        f"{name}: {kills} kills, {during} ({during / kills:.0%}) during a save ({phases}): "
        f"{found}; {pause * 1e3:.0f} ms per save"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kills", type=int, default=1000, help="how many; default 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the instants; default 0")
    parser.add_argument("--naive", action="store_true", help="overwrite one file instead")
    parser.add_argument("--directory", help="where to work; default a temporary directory")
    args = parser.parse_args()
    # Children of a process with threads could wait forever for a lock that one of these held.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        wrong, hit, pause = count(args.kills, args.seed, args.naive, Path(directory))
    print(report(args.kills, wrong, hit, pause, args.naive))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
