"""Calls that take a slower path than they might: each way and reason is reported once."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from trm_fast._errors import BackendError

PAGE = "docs/performance.md"  # where the measured factors stand

_Way = tuple[str, str]  # how calls run instead, and why
_warned: set[_Way] = set()
_watching: list["SlowPaths"] = []
_quiet: list[bool] = []


class SlowPathWarning(UserWarning):
    """Calls of an op take a slower path than they might."""


class SlowPaths:
    """The slow paths that calls of this process take within ``watched``."""

    def __init__(self) -> None:
        self._reported: set[_Way] = set()
        self._found: dict[_Way, dict[str, str]] = {}

    def note(self, op: str, instead: str, reason: str, slower: str) -> None:
        """Keeps what ``report`` is given."""
        if (instead, reason) not in self._reported:
            self._found.setdefault((instead, reason), {})[op] = slower

    def new(self) -> list[str]:
        """Returns one line for each way and reason that this has not returned yet: the reason, what
        was measured of the path, and the ops that take it."""
        if not self._found:
            return []
        found, self._found = self._found, {}
        self._reported.update(found)
        return [_line(instead, reason, ops) for (instead, reason), ops in found.items()]


@contextmanager
def watched() -> Iterator[SlowPaths]:
    """Yields what is filled with the slow paths that are taken within."""
    found = SlowPaths()
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.remove(found)


def strict_in_environment() -> bool:
    """Returns whether TRM_FAST_STRICT asks for errors in place of slow paths.

    Raises:
        BackendError: it is neither 0 nor 1.
    """
    text = os.environ.get("TRM_FAST_STRICT", "") or "0"
    if text not in ("0", "1"):
        raise BackendError(f"TRM_FAST_STRICT must be 0 or 1; got {text!r}")
    return text == "1"


def report(op: str, instead: str, reason: str, slower: str = "", *, warns: bool = True) -> None:
    """Says that calls take a slow path: to all that watch, and by one warning in the process for
    each way and reason.

    Args:
        op: whose calls.
        instead: how they run, such as "on the reference".
        reason: why.
        slower: how much slower that was where it was measured; empty if it was not.
        warns: whether it is warned of: not where it was asked for.
    """
    for watcher in _watching:
        watcher.note(op, instead, reason, slower)
    if not warns or _quiet or (instead, reason) in _warned:
        return
    _warned.add((instead, reason))
    measured = f" ({slower}: {PAGE})" if slower else ""
    warnings.warn(
        f"trm_fast: {op} runs {instead}{measured}: {reason}. TRM_FAST_STRICT=1 makes this an "
        "error, and naming the reference as the backend silences it",
        SlowPathWarning,
        stacklevel=3,
    )


@contextmanager
def without_warnings() -> Iterator[None]:
    """Leaves the warnings out where something else shows what ``SlowPaths`` has found; they come
    with the next call elsewhere."""
    _quiet.append(True)
    try:
        yield
    finally:
        _quiet.pop()


def _line(instead: str, reason: str, ops: dict[str, str]) -> str:
    # What was measured comes last, as a terminal may show the beginning only.
    measured = [f"{op}: {slower}" for op, slower in ops.items() if slower]
    figures = f" ({'; '.join(measured)}; {PAGE})" if measured else ""
    return f"slow path: {', '.join(ops)} {_verb(len(ops))} {instead}: {reason}{figures}"


def _verb(count: int) -> str:
    return "runs" if count == 1 else "run"
