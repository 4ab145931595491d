"""Processes of their own in which torch is loaded already: forks of one that has done nothing."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# The children find what they run by its name.
sys.path.append(str(Path(__file__).parents[2]))
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["trm_fast.recipes.puzzle", "trm_fast.cli.train", "jsonargparse"])


def start(log: Path, function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Starts a function of a module, which returns the exit code; what it prints goes into a file
    of this name."""
    process = CONTEXT.Process(target=_run, args=(log, function, args), daemon=True)
    process.start()
    return process


def _run(log: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    sys.exit(function(*args))
