"""Functions run by processes of their own: one, or several that are joined by gloo.

    def work(rank, factor):  # in a module under tests/, which the processes import by its name
        return factor * rank

    def test_work():
        assert run_ranks(work, 2.0) == [0.0, 2.0]

The processes are forks of a server that has loaded torch, so a start takes a fraction of a second.
They meet by a file in a folder of their own, so runs beside each other do not collide.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

ROOT = str(Path(__file__).parents[2])
# The processes find functions by the names of their modules. At the end, as kernels/ in the root
# is no package.
if ROOT not in sys.path:
    sys.path.append(ROOT)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.tensor", "trm_fast.cli.train",
     "trm_fast.recipes.puzzle", "jsonargparse"]
)  # fmt: skip
# Only ends what hangs.
TIMEOUT_S = 600.0

needs_gloo = pytest.mark.skipif(
    not dist.is_gloo_available(), reason="this torch is built without gloo"
)


def start(log: Path, function: Callable[..., Any], *args: Any, daemon: bool = True) -> BaseProcess:
    """Starts a function in a process of its own.

    Args:
        log: gets what it prints.
        function: a function of a module, which returns the exit code.
        args: what it gets; pickled.
        daemon: whether it ends with this process; only others may start processes.
    """
    process = CONTEXT.Process(target=_run, args=(log, function, args), daemon=daemon)
    process.start()
    return process


def run_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """Runs ``function(rank, *args)`` in each of several processes, which form the default group.

    Args:
        function: a function of a module; it and its result are pickled.
        args: what it gets behind its rank.
        ranks: number of processes.

    Returns:
        What it returned, by rank.

    Raises:
        AssertionError: a process failed, with its traceback and what it printed; the others are
            ended then.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        processes: list[BaseProcess] = []
        try:
            for rank in range(ranks):
                log = folder / f"{rank}.log"
                processes.append(start(log, _join_ranks, rank, ranks, folder, function, args))
            _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
        found = [_result(folder, rank) for rank in range(ranks)]
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error]
        assert not errors, "\n".join(errors)
    return [value for value, _ in found]


def _wait(processes: Sequence[BaseProcess]) -> None:
    """Waits until all have ended, or one has failed, or the time is up."""
    running = {process.sentinel: process for process in processes}
    while running:
        ended = wait(list(running), TIMEOUT_S)
        if not ended or any(running.pop(sentinel).exitcode for sentinel in ended):
            return


def _run(log: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    torch.set_num_threads(1)
    sys.exit(function(*args))


def _join_ranks(
    rank: int, ranks: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> bool:
    """Joins the group and leaves the result, or the error, in the folder; returns if it failed."""
    try:
        dist.init_process_group(
            "gloo", f"file://{folder}/store", timedelta(seconds=TIMEOUT_S / 2), ranks, rank
        )
        value, error = function(rank, *args), None
        dist.destroy_process_group()
    except Exception:
        value, error = None, traceback.format_exc()
    torch.save((value, error), folder / f"{rank}.pt")
    return error is not None


def _result(folder: Path, rank: int) -> tuple[Any, str | None]:
    path, log = folder / f"{rank}.pt", folder / f"{rank}.log"
    printed = log.read_text() if log.exists() else ""
    if not path.exists():
        return None, f"ended without a result\n{printed}"
    value, error = torch.load(path, weights_only=False)
    return value, error and f"{error}\n{printed}"


# Many cases in one start


class Failure(NamedTuple):
    """What a case returns that raised."""

    traceback: str


def run_cases(cases: Mapping[str, Callable[..., Any]], *args: Any) -> dict[str, Any]:
    """Returns what each case returned, or its ``Failure``; to be called by each rank."""
    results: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            results[name] = case(*args)
        except Exception:
            results[name] = Failure(traceback.format_exc())
    return results


def returned(results: Sequence[Mapping[str, Any]], case: str) -> list[Any]:
    """What a case returned on each rank; a failure shows its traceback."""
    values = [result[case] for result in results]
    for value in values:
        assert not isinstance(value, Failure), value.traceback
    return values
