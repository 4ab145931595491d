"""Makes items by number, each unlike all others, and checks the arguments that generators share.

An item is its first attempt that is accepted and equals no item before it. So it depends neither on
how many items are made nor on how the work is shared out. An interrupt gets through at any time;
the C++ form looks for one 20 times in a second.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trm_fast.data import _reference

Arrays = tuple[NDArray[np.uint8], ...]

# Attempts at an item in one call: more cost less per attempt, fewer are interrupted sooner.
_TRIES = 8
_REFERENCE_PIECE = 8


def number(who: str, name: str, value: int, least: int, most: int) -> int:
    """Returns ``value`` if it is a whole number from ``least`` to ``most``.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{who}: {name} must be a whole number; got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{who}: {name} must be from {least} to {most}; got {value}")
    return int(value)


def number_range(
    who: str, name: str, value: int | tuple[int, int], least: int, most: int
) -> tuple[int, int]:
    """Returns ``value`` as the ends of a range; a single number is both.

    Raises:
        TypeError: it is neither a whole number nor two of them.
        ValueError: an end is out of range, or the second is less than the first.
    """
    ends = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(ends) != 2:
        raise TypeError(f"{who}: {name} must be a whole number or (least, most); got {value!r}")
    low, high = (number(who, name, end, least, most) for end in ends)
    if low > high:
        raise ValueError(f"{who}: {name} must be (least, most); got {value!r}")
    return low, high


def grids(
    who: str, name: str, array: Any, most: int, width: int | None = None
) -> NDArray[np.uint8]:
    """Returns an integer array of two dimensions as bytes.

    Raises:
        TypeError: it does not hold integers.
        ValueError: it has another shape, or holds values outside of [0, most].
    """
    array = np.asarray(array)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{who}: {name} must hold integers; got {array.dtype}")
    if array.ndim != 2 or width not in (None, array.shape[1]):
        shape = f"[count, {'length' if width is None else width}]"
        raise ValueError(f"{who}: {name} must be {shape}; got {list(array.shape)}")
    if array.size and (array.min() < 0 or array.max() > most):
        found = f"{array.min()} to {array.max()}"
        raise ValueError(f"{who}: {name} must hold values from 0 to {most}; got {found}")
    return np.ascontiguousarray(array, np.uint8)


def thread_count(who: str, threads: int | None) -> int:
    """Returns how many threads to use: ``threads``, or one per core of this process."""
    if threads is not None:
        return number(who, "threads", threads, 1, 1024)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pieces(array: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    """Yields ``size`` rows at a time; one empty piece of an empty array."""
    for first in range(0, max(len(array), 1), size):
        yield array[first : first + size]


def joined(parts: list[tuple[NDArray[Any], ...]]) -> list[NDArray[Any]]:
    """Joins the pieces of each result."""
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def distinct_items(
    who: str,
    module: ModuleType,
    generate: Callable[[Any], Sequence[NDArray[Any]]],
    count: int,
    seed: int,
    threads: int | None,
    attempts: int,
    piece: int,
) -> Arrays:
    """Returns ``count`` items, one row of each result, that differ in their first result.

    Args:
        who: function that asks; it begins the message of an error.
        module: ``trm_fast._data`` or its form in Python.
        generate: makes the attempts that an ``Items`` of the module describes; returns the results,
            and last which attempt was accepted, -1 for none.
        count: number of items, >= 0.
        seed: in [0, 2^64).
        threads: see ``thread_count``.
        attempts: attempts at one item before an error, >= 1.
        piece: items in one call of the C++ form.

    Raises:
        TypeError: an argument is not a whole number.
        ValueError: an argument is out of range, or an item has used up its attempts.
    """
    number(who, "count", count, 0, 2**40)
    number(who, "attempts", attempts, 1, 2**40)
    seed = number(who, "seed", seed, 0, 2**64 - 1)
    threads = thread_count(who, threads)

    def next_accepted(indices: NDArray[np.int64], first: int) -> tuple[NDArray[Any], ...]:
        """Returns results and accepted attempts of items, whose attempts begin with ``first``."""
        results: tuple[NDArray[Any], ...] = ()
        pending = np.arange(len(indices))
        while len(pending) or not results:
            tries = min(_TRIES, attempts - first)
            if tries == 0:
                raise ValueError(
                    f"{who}: each item must be found, unlike those before, in {attempts} attempts; "
                    f"got none for item {indices[pending[0]]}: ask for less, or for more attempts"
                )
            made = generate(module.Items(seed, indices[pending], first, tries, threads))
            results = results or tuple(made)
            for result, new in zip(results, made, strict=True):
                result[pending] = new
            pending = pending[made[-1] < 0]
            first += tries
        return results

    seen: set[bytes] = set()
    parts = []
    # Python is interrupted anywhere, so there only the wait for an error grows with the piece.
    piece = _REFERENCE_PIECE if module is _reference else piece
    for start in range(0, max(count, 1), piece):
        results = next_accepted(np.arange(start, min(start + piece, count)), 0)
        for i, row in enumerate(results[0]):
            while row.tobytes() in seen:
                again = next_accepted(np.array([start + i]), int(results[-1][i]) + 1)
                for result, new in zip(results, again, strict=True):
                    result[i] = new[0]
            seen.add(row.tobytes())
        parts.append(results[:-1])
    return tuple(joined(parts))
