"""Mutations of files: of bytes, of text, of JSON; drawn from a seeded generator."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

# What has broken readers of numbers, text and sizes.
WORDS = (
    b"", b"-1", b"0", b"9" * 400, b"1e999", b"NaN", b"Infinity", b"-Infinity", b"null", b"true",
    b"[]", b"{}", b"[" * 100, b'{"a":' * 100, b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800",
    b"../..", b"'", b'"', b",", b"\n", b"\r", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\0" * 8,
    b"18446744073709551616", b"1" + b"0" * 18, b"&a [*a]", b"!!python/object:os.system", b"%s",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 1 << 31, 1 << 63, 10**20, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "\ud800", "NaN", "Infinity", "../x", "a\nb", "\x1b[31m", [], {}, [[]],
    {"$tensor": "x"}, {"$int": "0xf"}, {"a": []}, [1, "a"], list(range(50)),
)  # fmt: skip
_DIGIT = re.compile(rb"\d")


def mutated(data: bytes, chance: random.Random, suffix: str) -> bytes:
    """Returns a file that differs from ``data`` as a rule.

    Args:
        data: a valid file.
        chance: decides.
        suffix: of its name; JSON is mutated as such in three of four cases.
    """
    if suffix in (".json", ".jsonl") and chance.random() < 0.75:
        try:
            return _json_mutated(data, chance, suffix)
        except (ValueError, IndexError):  # mutated before, and no JSON any more
            pass
    return chance.choice(_OF_BYTES)(data, chance)


def _json_mutated(data: bytes, chance: random.Random, suffix: str) -> bytes:
    if suffix == ".json":
        return _dumped(_changed(json.loads(data), chance))
    lines = data.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = _dumped(_changed(json.loads(lines[at]), chance))
    return b"\n".join(lines) + b"\n"


def _dumped(value: Any) -> bytes:
    # Compact, as the manifests of checkpoints are.
    return json.dumps(value, separators=(",", ":")).encode()


def _changed(tree: Any, chance: random.Random) -> Any:
    """Returns JSON of which one value is another, missing, or there twice."""
    places = [*_places(tree)]
    if not places or chance.random() < 0.02:
        return chance.choice(VALUES)
    inside, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[str(chance.choice(VALUES))] = inside.pop(key)
    elif kind == 1:
        inside.append(inside[key])
    elif kind == 2:
        other, place = chance.choice(places)
        inside[key] = json.loads(json.dumps(other[place])) if place in _keys(other) else None
    else:
        inside[key] = chance.choice(VALUES)
    return tree


def _keys(inside: Any) -> Any:
    return inside if isinstance(inside, dict) else range(len(inside))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, (dict, list)):
        items = [*tree.items()] if isinstance(tree, dict) else [*enumerate(tree)]
        for key, value in items:
            yield tree, key
            yield from _places(value)


def _flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _spliced(data: bytes, chance: random.Random) -> bytes:
    """A part of the file is missing, or there twice."""
    start, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[start:end] * chance.choice((0, 2, 3)) + data[end:]


def _with_word(data: bytes, chance: random.Random) -> bytes:
    at, gone = chance.randrange(len(data) + 1), chance.choice((0, 0, 1, 2, 4, 8))
    return data[:at] + chance.choice(WORDS) + data[at + gone :]


def _with_number(data: bytes, chance: random.Random) -> bytes:
    """A number in text is another one."""
    found = _DIGIT.search(data, chance.randrange(len(data) + 1)) or _DIGIT.search(data)
    if found is None:
        return _with_word(data, chance)
    at = found.start()
    return data[:at] + chance.choice(WORDS[1:5]) + data[at + 1 :]


def _longer(data: bytes, chance: random.Random) -> bytes:
    return data + chance.choice((b"\0", data, chance.choice(WORDS)))


_OF_BYTES = (_flipped, _flipped, _cut, _spliced, _with_word, _with_word, _with_number, _longer)
