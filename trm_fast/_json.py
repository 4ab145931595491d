"""JSON that comes from outside: its nesting is counted before it is parsed.

The parser of the standard library calls itself for every level and stops at the recursion limit of
the interpreter only. Other code may raise that limit, as torch's compiler does, and a file of a few
kilobytes then overflows the stack and ends the process.
"""

import json
from itertools import accumulate
from typing import Any

MAX_DEPTH = 64  # levels of nesting; what the package writes needs fewer than ten of its own

_BRACKETS = b"[]{}"
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))
# An index into _STEPS by which each bracket changes the depth.
_TABLE = bytes.maketrans(_BRACKETS, b"\2\0\2\0")
_STEPS = (-1, 0, 1)


def loads(text: str | bytes, subject: str, *, max_depth: int = MAX_DEPTH, **hooks: Any) -> Any:
    """Parses JSON of bounded depth.

    Args:
        text: the JSON; bytes must be UTF-8.
        subject: begins the messages, as "config.json" or "/path/config.json:".
        max_depth: levels of arrays and objects, >= 0.
        hooks: further arguments of ``json.loads``. A ValueError that they raise says what came.

    Raises:
        ValueError: it is no JSON, or nested deeper.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ValueError(f"{subject} must be UTF-8; got invalid byte {error.start}") from None
    # A row has fewer brackets than may be open, wherever they stand.
    if text.count("[") + text.count("{") > max_depth:
        check_depth(depth_of(text), subject, max_depth)
    try:
        return json.loads(text, **hooks)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""  # most is a single line
        reason = f"{error.msg} at {line}column {error.colno}"
        raise ValueError(f"{subject} must be JSON; got {reason}") from None
    except ValueError as error:
        raise ValueError(f"{subject} must be JSON; got {error}") from None


def load_object(text: str | bytes, subject: str, **hooks: Any) -> dict[str, Any]:
    """Parses one JSON object as ``loads`` does.

    Raises:
        ValueError: as ``loads``, or it is something else.
    """
    found = loads(text, subject, **hooks)
    if not isinstance(found, dict):
        raise ValueError(f"{subject} must be a JSON object; got {type(found).__name__}")
    return found


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
