"""Opens the compiled libraries, and remembers why one of them cannot be used."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trm_fast._paths import shadowed

# Raised, together with kRevision in csrc/common/revision.h, whenever a schema changes.
REVISION = 5

# Schemas live here and on the pages of the ops; the libraries only implement them.
LIBRARY = torch.library.Library("trm_fast", "DEF")
LIBRARY.define("_cpu_revision() -> int")
LIBRARY.define("_cuda_revision() -> int")
LIBRARY.define("_cuda_architectures() -> str")


def register_fake(name: str, fake: Callable[..., Any] = lambda *_, **__: None) -> None:
    """Registers what an op of ``LIBRARY`` returns for tensors without values.

    Args:
        name: of the op.
        fake: a function of its arguments that returns tensors of the right shapes; by default one
            of an op that returns nothing.
    """

    def checked(*args: Any, **kwargs: Any) -> Any:
        # One tensor without values among others leads here too, and would leave the rest as it is.
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = sorted({str(tensor.device) for tensor in tensors})
        if len(devices) > 1:
            raise ValueError(f"{name}: tensors must be on one device; got {' and '.join(devices)}")
        return fake(*args, **kwargs)

    torch.library.register_fake(f"trm_fast::{name}", checked, lib=LIBRARY)


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
        hidden = shadowed(file.name)
        return f"{file.name} is not built{hidden or ':'} {rebuild}"
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


def gpu_unusable(capability: tuple[int, int]) -> str | None:
    """Returns why a GPU of this compute capability runs nothing of the library of "cuda", which can
    be opened, or None."""
    rebuild = "rebuild it with TRM_FAST_CUDA=1 pip install --no-build-isolation ."
    try:
        built_for: str = torch.ops.trm_fast._cuda_architectures()
    except NotImplementedError:
        return f"{path('cuda').name} does not tell its GPUs: {rebuild}"
    architectures = built_for.split("_")
    if any(_runs_on(capability, architecture) for architecture in architectures):
        return None
    return (
        f"{path('cuda').name} is built for compute capability {', '.join(architectures)}; got "
        f"{capability[0]}.{capability[1]}: {rebuild}, with TORCH_CUDA_ARCH_LIST set"
    )


def _runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """Returns whether code for an architecture, as TORCH_CUDA_ARCH_LIST names it, runs on a GPU:
    on later minors of one major, with "a" on that GPU alone, as PTX on all later ones."""
    found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture)
    if found is None:
        return True  # a name such as "Hopper", of which torch knows the number
    built_for = int(found[1]), int(found[2])
    if capability == built_for or (found[4] and capability > built_for):
        return True
    return found[3] != "a" and capability[0] == built_for[0] and capability > built_for
