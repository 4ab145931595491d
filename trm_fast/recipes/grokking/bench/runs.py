"""The grokking benchmark: many runs of the recipe, each once, and the time of their iterations.

Every finished run is one JSON file. A run that was interrupted leaves none and starts again, since
it takes minutes. Several processes may work on one directory: each takes the next run that is
neither finished nor locked by another one.
"""

import dataclasses
import fcntl
import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from trm_fast._files import open_in_place
from trm_fast._json import read_object
from trm_fast._version import __version__
from trm_fast.recipes.grokking.bench.plan import ROWS
from trm_fast.recipes.grokking.config import GrokkingConfig
from trm_fast.recipes.grokking.report import Evaluation
from trm_fast.recipes.grokking.trainer import grokking_epochs
from trm_fast.recipes.settings import from_json
from trm_fast.train import files
from trm_fast.train.distributed import World, device_name

# Timed epochs of each row, after one that is not; odd, so that the median is one of them.
_ROUNDS = 9
# A run stays what it is when these are different.
_NOT_SETTINGS = ("iterations", "stop_at_target", "device", "log_every", "save_every", "plot", "out")
_CURVE = ("iteration", "train_accuracy", "validation_accuracy")
_ENVIRONMENT = ("processor", "threads", "torch", "trm_fast")


@dataclass(frozen=True)
class Outcome:
    """What one run found; the content of its file.

    Args:
        row: name of the row.
        seed: seed of the run.
        config: settings of the recipe.
        reached: first evaluated iteration at or above the target, or None.
        diverged: the loss was not finite in the epoch after the last evaluation.
        iterations: weight updates at the last evaluation.
        wall_seconds: wall time of the run, whatever else the machine did meanwhile.
        cpu_seconds: processor time of the run, all threads together.
        environment: versions, processor and threads.
        curve: "iteration", "train_accuracy" and "validation_accuracy" of all evaluations.
    """

    row: str
    seed: int
    config: dict[str, Any]
    reached: int | None
    diverged: bool
    iterations: int
    wall_seconds: float
    cpu_seconds: float
    environment: dict[str, Any]
    curve: dict[str, list[float]]

    def check(self) -> None:
        """Checks what the report takes for granted.

        Raises:
            ValueError: it does not hold.
        """
        _check_environment(self.environment)
        least = 1 if self.reached is None else self.reached
        if least < 1 or self.iterations < 0:
            raise ValueError("iterations must be >= 0 and reached >= 1")
        if set(self.curve) != {*_CURVE} or len({len(each) for each in self.curve.values()}) != 1:
            raise ValueError(f"curve must have {', '.join(_CURVE)}, equally many of each")

    def finished(self, iterations: int) -> bool:
        """Whether more iterations, up to ``iterations``, could not change the outcome."""
        return self.reached is not None or self.diverged or self.iterations >= iterations

    def within(self, iterations: int) -> int | None:
        """Returns the iterations to the target, or None if they are more than ``iterations``."""
        return None if self.reached is None or self.reached > iterations else self.reached


@dataclass(frozen=True)
class Timing:
    """Measured time of the rows; the content of time.json.

    Args:
        seconds: per row, median seconds per iteration, its share of an evaluation included.
        rounds: timed epochs per row.
        environment: versions, processor and threads.
    """

    seconds: dict[str, float]
    rounds: int
    environment: dict[str, Any]

    def check(self) -> None:
        """Checks what the report takes for granted.

        Raises:
            ValueError: it does not hold.
        """
        _check_environment(self.environment)


Result = TypeVar("Result", Outcome, Timing)


def _check_environment(environment: dict[str, Any]) -> None:
    for name in _ENVIRONMENT:
        if not isinstance(environment.get(name), (str, int)):
            raise ValueError(f"environment must have {', '.join(_ENVIRONMENT)}")


@dataclass(frozen=True)
class Plan:
    """Which runs there are and where their files lie.

    Args:
        rows: names of rows.
        seeds: seeds, in the order in which they are run.
        base: settings of the recipe that are the same in every run.
        out: directory of the files.

    Raises:
        ValueError: there is no row or no seed, or one occurs twice.
    """

    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    base: GrokkingConfig
    out: Path

    def __post_init__(self) -> None:
        for name, values in (("rows", self.rows), ("seeds", self.seeds)):
            if not values or len({*values}) < len(values):
                raise ValueError(f"bench grokking: {name} must be different ones; got {values}")

    def runs(self) -> Iterator[tuple[str, int]]:
        """Yields rows and seeds, all rows of one seed before the next."""
        return ((row, seed) for seed in self.seeds for row in self.rows)

    def config(self, row: str, seed: int) -> GrokkingConfig:
        """Returns the settings of one run."""
        fields = ROWS[row].fields(self.base.lr, self.base.muon_lr)
        return dataclasses.replace(self.base, seed=seed, **fields)

    def path(self, row: str, seed: int) -> Path:
        """Returns the file of one run."""
        return self.out / f"{row}-seed{seed}.json"

    def read(self, row: str, seed: int) -> Outcome | None:
        """Returns a run if it is finished.

        Raises:
            ValueError: the file holds a run with other settings, or something else.
        """
        path = self.path(row, seed)
        try:
            outcome = _read(path, Outcome)
        except FileNotFoundError:
            return None
        for name, value in _as_json(self.config(row, seed)).items():
            if name not in _NOT_SETTINGS and outcome.config.get(name) != value:
                raise ValueError(
                    f"bench grokking: {path} must hold a run with {name} {value}; got "
                    f"{outcome.config.get(name)!r:.80}. Choose another --out"
                )
        return outcome if outcome.finished(self.base.iterations) else None

    def outcomes(self) -> dict[tuple[str, int], Outcome]:
        """Returns all finished runs."""
        found = {run: self.read(*run) for run in self.runs()}
        return {run: outcome for run, outcome in found.items() if outcome is not None}

    def timing(self) -> Timing | None:
        """Returns the measured times, or None if there are none.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            return _read(self.out / "time.json", Timing)
        except FileNotFoundError:
            return None


def train_missing(plan: Plan, jobs: int, threads: int) -> None:
    """Trains every run of the plan that is neither finished nor being trained by another process.

    Args:
        plan: the runs.
        jobs: processes, >= 1.
        threads: threads of each process, >= 1.

    Raises:
        ValueError: a setting cannot be used, or a file holds a run with other settings.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    plan.outcomes()  # files of other settings have to show now, not hours later
    if jobs == 1:
        return _work(plan, threads)
    # A fork would copy locks of torch's threads in whatever state they are.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        for done in [pool.submit(_work, plan, threads) for _ in range(jobs)]:
            done.result()


def _work(plan: Plan, threads: int) -> None:
    """Takes one run after the other until none is left."""
    parent = multiprocessing.parent_process()
    with _threads(threads):
        for row, seed in plan.runs():
            # A process whose parent was killed would otherwise train on for hours.
            if parent is not None and not parent.is_alive():
                return
            with _claim(plan.path(row, seed)) as mine:
                if mine and plan.read(row, seed) is None:
                    outcome = _train(plan, row, seed)
                    _write(plan.path(row, seed), outcome)
                    print(_line(plan, outcome), flush=True)


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Says whether this process alone may write ``path``. The claim of a process ends with it."""
    lock = path.with_suffix(".lock")
    with open(open_in_place(lock), "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        # Who has opened this file before gets the lock next, and then finds the run finished.
        lock.unlink(missing_ok=True)


def _train(plan: Plan, row: str, seed: int) -> Outcome:
    config = plan.config(row, seed)
    wall, cpu = time.perf_counter(), time.process_time()
    evaluations: list[Evaluation] = []
    diverged = False
    reached = None
    try:
        for evaluation in grokking_epochs(config):
            evaluations.append(evaluation)
            if evaluation.validation_accuracy >= config.target:
                reached = evaluation.iteration
                break
    except FloatingPointError:
        diverged = True
    return Outcome(
        row=row,
        seed=seed,
        config=_as_json(config),
        reached=reached,
        diverged=diverged,
        iterations=evaluations[-1].iteration if evaluations else 0,
        wall_seconds=round(time.perf_counter() - wall, 3),
        cpu_seconds=round(time.process_time() - cpu, 3),
        environment=_environment(config.device),
        curve={name: [round(getattr(e, name), 5) for e in evaluations] for name in _CURVE},
    )


def _line(plan: Plan, outcome: Outcome) -> str:
    """Returns one line of progress."""
    target = f"{100 * plan.base.target:.4g} %"
    if outcome.diverged:
        text = f"diverged after iteration {outcome.iterations:,}"
    elif outcome.reached is None:
        last = outcome.curve["validation_accuracy"][-1]
        text = f"not {target} within {outcome.iterations:,} iterations ({last:.1%})"
    else:
        text = f"{target} at iteration {outcome.reached:,}"
    done, all_runs = len(plan.outcomes()), len(plan.rows) * len(plan.seeds)
    seconds = outcome.wall_seconds
    return f"[{done}/{all_runs}] {outcome.row} seed {outcome.seed}: {text}, {seconds:.1f} s"


def measure_time(plan: Plan, threads: int) -> Timing:
    """Times the iterations of all rows in turns, in one process, and writes time.json.

    In each round every row trains one epoch, evaluation included, in an order drawn anew; the first
    round is not counted.

    Args:
        plan: the rows; their first seed is used.
        threads: threads, >= 1.

    Returns:
        What was written.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    base = dataclasses.replace(plan.base, iterations=GrokkingConfig.iterations)
    rows = dataclasses.replace(plan, base=base)
    times: dict[str, list[float]] = {row: [] for row in plan.rows}
    order = random.Random(0)
    with _threads(threads):
        epochs = {row: grokking_epochs(rows.config(row, plan.seeds[0])) for row in plan.rows}
        done = dict.fromkeys(plan.rows, 0)
        for turn in range(1 + _ROUNDS):
            for row in order.sample(plan.rows, len(plan.rows)):
                start = time.perf_counter()
                iteration = next(epochs[row]).iteration
                seconds = time.perf_counter() - start
                if turn:
                    times[row].append(seconds / (iteration - done[row]))
                done[row] = iteration
            print(f"timed {turn} of {_ROUNDS} rounds", flush=True)
        medians = {row: median(values) for row, values in times.items()}
        timing = Timing(medians, _ROUNDS, _environment(plan.base.device))
    _write(plan.out / "time.json", timing)
    return timing


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read(path: Path, kind: type[Result]) -> Result:
    """Reads a file of ``_write``.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    try:
        found = from_json(kind, read_object(path))
        found.check()
    except ValueError as error:
        raise ValueError(
            f"bench grokking: {path}: {str(error).removeprefix(f'{path}: ')}"
        ) from None
    return found


def _write(path: Path, value: Outcome | Timing) -> None:
    """Writes a file that is either whole or as before."""
    files.replace(path, f"{json.dumps(dataclasses.asdict(value))}\n".encode())


def _as_json(config: GrokkingConfig) -> dict[str, Any]:
    """Returns the settings as they come back from a file."""
    fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return fields


def _environment(device: str) -> dict[str, Any]:
    return {
        "processor": device_name(World(device).device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trm_fast": __version__,
    }
