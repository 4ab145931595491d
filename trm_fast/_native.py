"""Opens the compiled libraries, and remembers why one of them cannot be used."""

from functools import cache
from pathlib import Path

import torch

# Raised, together with kRevision in csrc/common/revision.h, whenever a schema changes.
REVISION = 5

# Schemas live here and on the pages of the ops; the libraries only implement them.
LIBRARY = torch.library.Library("trm_fast", "DEF")
LIBRARY.define("_cpu_revision() -> int")
LIBRARY.define("_cuda_revision() -> int")

_FILES = {"cpp": ("_cpu.so", "_cpu_revision"), "cuda": ("_cuda.so", "_cuda_revision")}
_SWITCH = {"cpp": "TRM_FAST_CPU", "cuda": "TRM_FAST_CUDA"}


def path(backend: str) -> Path:
    """Returns where the library of ``backend`` ("cpp" or "cuda") lies once it is built."""
    return Path(__file__).parent / _FILES[backend][0]


@cache
def unusable(backend: str) -> str | None:
    """Opens the library of ``backend`` on first use; returns the reason if it cannot be used."""
    file, revision = path(backend), _FILES[backend][1]
    rebuild = f"build it with {_SWITCH[backend]}=1 pip install --no-build-isolation ."
    if not file.exists():
        return f"{file.name} is not built: {rebuild}"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"{file.name} cannot be opened: {error}"
    try:
        built_for = getattr(torch.ops.trm_fast, revision)()
    except NotImplementedError:
        return f"{file.name} does not tell its revision: re{rebuild}"
    if built_for != REVISION:
        return f"{file.name} has revision {built_for}, this source needs {REVISION}: re{rebuild}"
    return None
