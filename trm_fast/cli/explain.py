"""``trm-fast explain``: which implementation runs one call, and what the others would take."""

import argparse
import os
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from trm_fast.cli import COMMANDS, suggest

if TYPE_CHECKING:
    import torch

    from trm_fast._dispatch import Example

HELP = COMMANDS["explain"]

_ROUNDS = 21  # odd, so that the median is a time that was measured
_WARM_UP = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the call that is explained."""
    parser.add_argument("op", metavar="OP", help="name of the op, as `trm-fast info` lists it")
    parser.add_argument("shape", metavar="SHAPE", help="sizes joined by x, such as 1536x512")
    parser.add_argument("dtype", metavar="DTYPE", help="float32, bfloat16, float16 or float64")
    parser.add_argument("--call", help="one of the op's example calls; default: the first")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")


def run(args: argparse.Namespace) -> int:
    """Prints the choice, and time and error of each usable backend.

    Raises:
        ValueError: the op, shape, dtype, call or device is unknown.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import torch

    from trm_fast._dispatch import BACKENDS, without
    from trm_fast.ops import OPS

    if args.op not in OPS:
        raise ValueError(f"explain: unknown op {args.op!r}{suggest(args.op, OPS)}")
    op, shape, dtype = OPS[args.op], _shape(args.shape), _dtype(args.dtype)
    device = _device(args.device)
    dtypes = frozenset({dtype})
    name, example = _example(op.examples(shape, dtype, device), args.call)
    choice = op.choose(device.type, dtypes, None, example.details)
    print(f"{op.name} {args.shape} {args.dtype} on {device}: {choice.backend} runs")
    print(f"measured on the call {name!r}, median of {_ROUNDS}, {torch.get_num_threads()} threads")
    for backend in BACKENDS:
        reason = op.reason(backend, device.type, dtypes, example.details)
        if reason:
            print(f"  {backend:10} cannot run: {reason}")
            continue
        seconds = _seconds(example.prepare(backend, None)[0], device)
        error = max(example.errors(backend).values())
        note = "  (interpreter: says nothing about speed)" if _interpreted(backend) else ""
        note = without(op, backend) + note
        print(f"  {backend:10} {1e6 * seconds:10.1f} us, largest relative error {error:.1e}{note}")
    return 0


def _example(examples: "dict[str, Example]", name: str | None) -> "tuple[str, Example]":
    if name is None:
        return next(iter(examples.items()))
    if name not in examples:
        raise ValueError(
            f"explain: --call must be one of {', '.join(map(repr, examples))}; got {name!r}"
        )
    return name, examples[name]


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not all(size.isdecimal() for size in sizes):
        raise ValueError(
            f"explain: SHAPE must be sizes joined by x, such as 1536x512; got {text!r}"
        )
    return tuple(map(int, sizes))


def _dtype(text: str) -> "torch.dtype":
    import torch

    names = ("float32", "bfloat16", "float16", "float64")
    if text not in names:
        raise ValueError(f"explain: unknown DTYPE {text!r}{suggest(text, names)}")
    dtype: torch.dtype = getattr(torch, text)
    return dtype


def _device(text: str) -> "torch.device":
    import torch

    if text not in ("cpu", "cuda"):
        raise ValueError(f"explain: --device must be cpu or cuda; got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "explain: --device must be one that torch finds; got cuda, and it finds none"
        )
    return torch.device(text)


def _interpreted(backend: str) -> bool:
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def _seconds(call: Callable[[], None], device: "torch.device") -> float:
    import torch

    times = []
    for _ in range(_WARM_UP + _ROUNDS):
        start = perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return median(times[_WARM_UP:])
