"""Mutates valid files of every reader, and counts what does not end in a declared error.

    python -m tests.fuzz [--reader NAME] [--count 1000 | --seconds 60] [--seed 0]

A reader may return, or raise a ValueError, TypeError or OSError of one line; on the command line it
may exit with 0, 1 or 2. Counted are other exceptions and longer messages, inputs that take more
than 20 seconds of processor time, and, with --memory, those that take more than the documented 100
times the size of all files. The program exits with 1 if there is any. Mutations are drawn from the
seed and the number of the input: ``--start N --count 1`` repeats one.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path

from .support.mutations import mutated
from .support.readers import READERS, Reader

MULTIPLE, FIXED = 100, 64 << 20  # bytes of memory by size, and those of every reader
SECONDS = 20.0


def fuzz(
    name: str, numbers: Iterator[int], seed: int, home: Path, measured: bool = False
) -> Counter[str]:
    """Reads mutated files.

    Args:
        name: of the reader.
        numbers: of the inputs.
        seed: of the mutations.
        home: an empty directory.
        measured: whether memory is watched, which takes several times as long.

    Returns:
        How often each outcome occurred; what is no declared one begins with "!".
    """
    reader = READERS[name]
    valid = home / "valid"
    valid.mkdir()
    reader.make(valid)
    files = sorted(path.relative_to(valid) for path in valid.rglob("*") if path.is_file())
    shutil.copytree(valid, home / "copy")
    assert outcome(reader, home / "copy") == "read", f"{name}: the files must be valid"
    found: Counter[str] = Counter()
    for number in numbers:
        chance = random.Random(f"{seed} {name} {number}")
        folder = home / "mutated"
        shutil.copytree(valid, folder, symlinks=True)
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            path = folder / chance.choice(files)
            path.write_bytes(mutated(path.read_bytes(), chance, path.suffix))
        if reader.seal is not None and chance.random() < 0.9:
            reader.seal(folder)
        said = (weighed if measured else timed)(reader, folder)
        if said.startswith("!"):
            said = f"{said} (--start {number})"
        found[said] += 1
        shutil.rmtree(folder)
    return found


def outcome(reader: Reader, folder: Path) -> str:
    """Returns "read", "refused", or "!" and what happened instead."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder)
    except (ValueError, TypeError, OSError) as error:
        text = str(error)
        if "\n" in text.strip() or len(text) > 2000:
            return f"!long message {text[:80]!r}"
        return "refused"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"!{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
    return "read"


def timed(reader: Reader, folder: Path) -> str:
    """Returns the outcome, "!" if it took too long."""
    began = time.process_time()
    said = outcome(reader, folder)
    took = time.process_time() - began
    return said if took < SECONDS or said.startswith("!") else f"!{took:.0f} s"


def weighed(reader: Reader, folder: Path) -> str:
    """Returns the outcome, "!" if it took too much memory."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    tracemalloc.start()
    try:
        said = timed(reader, folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > FIXED + MULTIPLE * size and not said.startswith("!"):
        return f"!{peak >> 20} MB for a file of {size} bytes"
    return said


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reader", choices=sorted(READERS), help="only this one")
    parser.add_argument("--count", type=int, default=1000, help="inputs of each reader")
    parser.add_argument("--seconds", type=float, help="of each reader, instead of a count")
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--memory", action="store_true", help="watch memory too, several times slower"
    )
    args = parser.parse_args(argv)
    wrong = 0
    for name in [args.reader] if args.reader else sorted(READERS):
        numbers: Iterator[int] = iter(range(args.start, args.start + args.count))
        if args.seconds is not None:
            numbers = within(args.seconds, args.start)
        with tempfile.TemporaryDirectory() as home:
            found = fuzz(name, numbers, args.seed, Path(home), args.memory)
        bad = {said: many for said, many in found.items() if said.startswith("!")}
        wrong += sum(bad.values())
        print(
            f"{name}: {found.total()} inputs, {found['read']} read, {found['refused']} refused, "
            f"{sum(bad.values())} wrong",
            flush=True,
        )
        for said in list(bad)[:10]:
            print(f"    {said[1:]}")
    return int(wrong > 0)


def within(seconds: float, start: int) -> Iterator[int]:
    """Yields numbers until the time is over."""
    end = time.monotonic() + seconds
    return takewhile(lambda _: time.monotonic() < end, count(start))


if __name__ == "__main__":
    sys.exit(main())
