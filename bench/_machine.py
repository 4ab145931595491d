"""Says on what a run was measured, beyond what pytest-benchmark finds out itself."""

import os
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import trm_fast

# The measured code, which may be another checkout than that of the bench.
ROOT = Path(trm_fast.__file__).parents[1]
PACKAGES = ("triton", "grokfast-pytorch", "pytorch-optimizer")


def machine() -> dict[str, Any]:
    """Returns what two runs must share if their times are to be compared."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def commit() -> dict[str, Any]:
    """Returns what was measured, and how busy the machine was when the run began."""
    return {
        "trm_fast": trm_fast.__version__,
        "trm_fast_commit": _commit(),
        "compiler": _compiler(Path(trm_fast.__file__).parent / "_cpu.so"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def heading(machine: dict[str, Any], commit: dict[str, Any]) -> str:
    gpu = f"{machine['gpu']}, CUDA {machine['cuda']}; " if machine["gpu"] else ""
    return (
        f"{gpu}{machine['cores']} cores, threads: {machine['threads']}, "
        f"{machine['cpu_capability']}, load average {commit['load_average']} at the start; "
        f"trm_fast {commit['trm_fast']} ({commit['compiler'] or 'cpp not built'}), torch "
        f"{machine['torch']}, commit {commit['trm_fast_commit'] or 'unknown'}"
    )


def _compiler(library: Path) -> str | None:
    """Returns what the compiler has written of itself into the library."""
    if not library.exists():
        return None
    found = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", library.read_bytes())
    return found[0].decode() if found else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    found = _git("rev-parse", "HEAD")
    if found is None:
        return None
    return f"{found}, changed" if _git("status", "--porcelain", "-uno") else found


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
