"""``trm-fast doctor``: runs every op on every usable backend against float64."""

import argparse
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trm_fast.cli import COMMANDS

if TYPE_CHECKING:
    import torch

    from trm_fast._dispatch import Op

HELP = COMMANDS["doctor"]

# A scalar, less than a block, a block and a bit, several blocks: small enough for the interpreter.
_SHAPES = ((), (7,), (33, 32), (5, 1000))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the command has no options."""


def run(args: argparse.Namespace) -> int:
    """Prints one line per op, device and backend; returns 1 if a result is outside its bound."""
    # One setting for all measured and checked numbers, whatever the default of Triton.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import torch

    from trm_fast._dispatch import BACKENDS, unusable, without
    from trm_fast.ops import OPS

    failures = 0
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for op in OPS.values():
        for device in devices:
            for backend in BACKENDS:
                if backend not in op.implementations:
                    continue
                reason = unusable(backend, device)
                if reason:
                    print(f"skip  {op.name} {device} {backend}: {reason}")
                    continue
                found = list(_faults(op, torch.device(device), backend))
                failures += len(found)
                verdict = "FAIL" if found else "ok  "
                print(f"{verdict}  {op.name} {device} {backend}{without(op, backend)}")
                for fault in found:
                    print(f"      {fault}")
    print(f"{failures} failures" if failures else "every usable backend agrees with float64")
    return 1 if failures else 0


def _faults(op: "Op", device: "torch.device", backend: str) -> Iterator[str]:
    import torch

    from trm_fast._dispatch import Call

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        call = Call(device.type, frozenset({dtype}))
        if op.refuses(backend, call):
            continue
        for shape in _SHAPES:
            for name, example in op.examples(shape, dtype, device).items():
                if op.refuses(backend, call._replace(details=example.details)):
                    continue
                for tensor, error in example.errors(backend).items():
                    bound = example.tolerance[tensor]
                    if not error <= bound:
                        failed = f"{name}, shape {shape}, {dtype}"
                        yield f"{failed}: error of {tensor} must be <= {bound:.2g}; got {error:.2g}"
