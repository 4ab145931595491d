"""Mutates valid files of every reader, and counts what does not end in a declared error.

    python -m tests.fuzz [--reader NAME ...] [--count 1000 | --seconds 60] [--seed 0] [--jobs 1]

A reader may return, or raise a ValueError, TypeError or OSError of one line; on the command line it
may exit with 0, 1 or 2. Counted are other exceptions and longer messages, inputs that take more
than 20 seconds of processor time or wait for something, those that take more memory than the
multiple of their size that the reader states, and those that end the process. The program exits
with 1 if there is any. Mutations are drawn from the seed and the number of the input: ``--start N
--count 1`` repeats one.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path
from types import FrameType

from .support.fuzz_jobs import run_jobs
from .support.mutations import mutated
from .support.readers import READERS, Reader
from .support.restorable import MEMORY, Restorable

FIXED = 64 << 20  # bytes of memory that every reader may take
SECONDS = 20.0  # of processor time for one input
WAITING = 300.0  # seconds after which an input hangs, whatever takes the processor meanwhile


def fuzz(
    name: str, numbers: Iterable[int], seed: int, home: Path, traced: bool = False
) -> Counter[str]:
    """Reads mutated files.

    Args:
        name: of the reader.
        numbers: of the inputs.
        seed: of the mutations.
        home: an empty directory.
        traced: whether each allocation is counted, which takes several times as long; otherwise
            memory is that which the system gave to the process.

    Returns:
        How often each outcome occurred; what is no declared one begins with "!".
    """
    reader = READERS[name]
    reader.make(home)
    files = Restorable(home)
    with warnings.catch_warnings(), _interrupting():
        warnings.simplefilter("ignore")
        assert outcome(reader, home) == "read", f"{name}: the files must be valid"
        found: Counter[str] = Counter()
        for number in numbers:
            files.restore()
            size = mutate(reader, files, random.Random(f"{seed} {name} {number}"))
            said = (_traced if traced else _watched)(reader, home, size)
            found[f"{said} (--start {number})" if said.startswith("!") else said] += 1
    return found


def mutate(reader: Reader, files: Restorable, chance: random.Random) -> int:
    """Mutates some of the files in place; returns the bytes of all of them."""
    names = sorted(files.contents)
    changed = dict(files.contents)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        name = chance.choice(names)
        changed[name] = mutated(changed[name], chance, os.path.splitext(name)[1])
    for name, data in changed.items():
        if data is not files.contents[name]:
            (files.folder / name).write_bytes(data)
    if reader.seal is not None and chance.random() < 0.9:
        reader.seal(files.folder)
    return sum(map(len, changed.values()))


def outcome(reader: Reader, folder: Path) -> str:
    """Returns "read", "refused", or "!" and what happened instead."""
    try:
        reader.read(folder)
    except (ValueError, TypeError, OSError) as error:
        text = str(error)
        if "\n" in text.strip() or len(text) > 2000:
            return f"!long message {text[:80]!r}"
        return "refused"
    except Exception as error:
        return f"!{type(error).__name__} in {_place(error)}"
    return "read"


def _place(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(place.filename).name}:{place.lineno}"


class Hang(BaseException):
    """Ends a reader that does not end; no ``except Exception`` catches it."""


@contextmanager
def _interrupting() -> Iterator[None]:
    """Makes timers raise ``Hang``."""

    def interrupt(*_: int | FrameType | None) -> None:
        raise Hang

    kinds = (signal.SIGPROF, signal.SIGALRM)
    before = [signal.signal(kind, interrupt) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _timed(reader: Reader, folder: Path) -> str:
    """Returns the outcome, "!" if it took too long."""
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAITING)
        try:
            return outcome(reader, folder)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Hang as error:
        return f"!hang in {_place(error)}"


def _watched(reader: Reader, folder: Path, size: int) -> str:
    """Returns the outcome, "!" if the process had more memory than it may take."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    bound = _peak() + FIXED + reader.multiple * size
    said = _timed(reader, folder)
    peak = _peak()
    return said if said.startswith("!") or peak <= bound else _large(peak, size)


def _peak() -> int:
    # getrusage would also count what the process had before it became a Python.
    status = Path("/proc/self/status").read_bytes().partition(b"VmHWM:")[2]
    return int(status.split(None, 1)[0]) << 10


def _traced(reader: Reader, folder: Path, size: int) -> str:
    """Returns the outcome, "!" if it allocated more memory than it may."""
    tracemalloc.start()
    try:
        said = _timed(reader, folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if said.startswith("!") or peak <= FIXED + reader.multiple * size:
        return said
    return _large(peak, size)


def _large(peak: int, size: int) -> str:
    return f"!{peak >> 20} MB for files of {size} bytes"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reader", nargs="+", choices=sorted(READERS), help="only these")
    parser.add_argument("--count", type=int, default=1000, help="inputs of each reader")
    parser.add_argument("--seconds", type=float, help="of each reader, instead of a count")
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--memory", action="store_true", help="count each allocation, several times slower"
    )
    args = parser.parse_args(argv)
    total: Counter[str] = Counter()
    for name in args.reader or sorted(READERS):
        total += _all_jobs(name, args)
    print(_line("all", total))
    return int(any(said.startswith("!") for said in total))


def _all_jobs(name: str, args: argparse.Namespace) -> Counter[str]:
    """Reads the inputs of one reader in several processes, and prints what they found."""

    def work(numbers: Iterator[int]) -> Counter[str]:
        place = MEMORY if MEMORY.is_dir() else None
        with tempfile.TemporaryDirectory(dir=place) as home:
            return fuzz(name, numbers, args.seed, Path(home), args.memory)

    def numbers(job: int, after: int | None) -> Iterator[int]:
        every = count(args.start + job if after is None else after + args.jobs, args.jobs)
        if args.seconds is None:
            return takewhile((args.start + args.count).__gt__, every)
        return takewhile(lambda _: time.monotonic() < end, every)

    began = time.monotonic()
    end = began + (args.seconds or 0)
    found = run_jobs(work, numbers, args.jobs, 2 * WAITING)
    pace = found.total() / (time.monotonic() - began)
    print(f"{_line(name, found)}, {pace:.0f} a second", flush=True)
    for said in [said for said in found if said.startswith("!")][:10]:
        print(f"    {said[1:]}", flush=True)
    return found


def _line(name: str, found: Counter[str]) -> str:
    wrong = sum(many for said, many in found.items() if said.startswith("!"))
    return (
        f"{name}: {found.total()} inputs, {found['read']} read, {found['refused']} refused, "
        f"{wrong} wrong"
    )


if __name__ == "__main__":
    sys.exit(main())
