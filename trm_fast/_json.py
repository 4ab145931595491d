"""JSON that comes from outside: bounded in its nesting, its numbers and its size.

The parser of the standard library calls itself for every level and stops at the recursion limit of
the interpreter only. Other code may raise that limit, as torch's compiler does, and a file of a few
kilobytes then overflows the stack and ends the process. It also reads integers of thousands of
digits, which become no float, and takes 1e999, NaN and Infinity, which are no JSON.
"""

import json
import math
import re
from itertools import accumulate
from typing import Any

from trm_fast._files import AnyPath, read_file

MAX_DEPTH = 64  # levels of nesting; what the package writes needs fewer than ten of its own
# Parsed, lists of small objects take up to 35 times their size (tests/test_reader_memory.py).
MAX_BYTES = 256 << 20

_BRACKETS = b"[]{}"
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))
# An index into _STEPS by which each bracket changes the depth.
_TABLE = bytes.maketrans(_BRACKETS, b"\2\0\2\0")
_STEPS = (-1, 0, 1)
# What may be a number beyond 64 bits or beyond float64; hooks for all numbers would take time.
_LARGE = re.compile(r"\d{20}|[eE]\+?\d{3}")


def loads(text: str | bytes, subject: str, *, max_depth: int = MAX_DEPTH, **hooks: Any) -> Any:
    """Parses JSON of bounded depth, with finite numbers and integers of at most 21 characters.

    Args:
        text: the JSON; bytes must be UTF-8, with or without a byte order mark.
        subject: begins the messages, as "config.json" or "/path/config.json:".
        max_depth: levels of arrays and objects, >= 0.
        hooks: further arguments of ``json.loads``. A ValueError that they raise says what came.

    Raises:
        ValueError: it is no JSON, nested deeper, or has a number that is too large.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ValueError(f"{subject} must be UTF-8; got invalid byte {error.start}") from None
    # A row has fewer brackets than may be open, wherever they stand.
    if text.count("[") + text.count("{") > max_depth:
        check_depth(depth_of(text), subject, max_depth)
    if _LARGE.search(text):
        hooks = {"parse_int": _bounded_int, "parse_float": _finite, **hooks}
    try:
        return json.loads(text, parse_constant=_no_constant, **hooks)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""  # most is a single line
        reason = f"{error.msg} at {line}column {error.colno}"
        raise ValueError(f"{subject} must be JSON; got {reason}") from None
    except ValueError as error:
        raise ValueError(f"{subject} must be JSON; got {error}") from None


def _bounded_int(text: str) -> int:
    # 20 digits and a sign hold 64 bits; more would take time that grows with their square.
    if len(text) > 21:
        raise ValueError(f"an integer of {len(text)} characters")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number that is too large")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(name)


def load_object(text: str | bytes, subject: str, **hooks: Any) -> dict[str, Any]:
    """Parses one JSON object as ``loads`` does.

    Raises:
        ValueError: as ``loads``, or it is something else.
    """
    found = loads(text, subject, **hooks)
    if not isinstance(found, dict):
        raise ValueError(f"{subject} must be a JSON object; got {type(found).__name__}")
    return found


def read(path: AnyPath, limit: int = MAX_BYTES) -> Any:
    """Parses a file of JSON as ``loads`` does; messages begin with its path.

    Args:
        path: the file.
        limit: bytes that it may have.

    Raises:
        OSError: it cannot be read.
        ValueError: as ``loads``, or it is larger or no ordinary file.
    """
    return loads(read_file(path, limit), f"{path}:")


def read_object(path: AnyPath, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Parses a file of one JSON object as ``read`` does.

    Raises:
        OSError, ValueError: as ``read``, or it is something else.
    """
    return load_object(read_file(path, limit), f"{path}:")


def check_depth(depth: int, subject: str, max_depth: int = MAX_DEPTH) -> None:
    """Refuses what is nested too deeply.

    Raises:
        ValueError: ``depth`` is larger than ``max_depth``.
    """
    if depth > max_depth:
        raise ValueError(f"{subject} must be nested at most {max_depth} deep; got {depth}")


def depth_of(text: str) -> int:
    """Returns the largest number of arrays and objects that are open at once.

    Of text that is no JSON it is at least as many as a parser opens before it notices.
    """
    # A backslash stands in strings only, or ends the parsing. Without escaped quotes, every second
    # piece between quotes is outside of strings.
    pieces = text.replace("\\\\", "").replace('\\"', "").split('"')
    outside = "".join(pieces[::2]).encode("ascii", "ignore")
    steps = map(_STEPS.__getitem__, outside.translate(_TABLE, _OTHERS))
    return max(accumulate(steps), default=0)
