"""What a test needs, read from its code: the compiler, other processes, Triton's interpreter."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any
from zlib import crc32

import pytest

# Names by which code reaches what costs seconds.
COMPILE = {"torch.compile", "opcheck"}
PROCESSES = {
    "subprocess", "Popen", "Process", "multiprocessing", "ProcessPoolExecutor", "fork",
    "forkserver",
}  # fmt: skip
PACKAGE = __name__.partition(".")[0]
COSTLY = {"long", "slow", "compile", "processes", "interpreter"}
# A test with more cases leaves half of them to the long lane.
MANY = 6


def test_of(item: pytest.Item) -> str:
    """Returns the name of a test without that of its case."""
    return item.nodeid.partition("[")[0]


def second_halves(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """Yields about half of the cases of each test that has many, always the same ones. Their names
    decide, and not their numbers, so that every value of a parameter stays in both halves."""
    items = list(items)
    cases = Counter(map(test_of, items))
    for item in items:
        if cases[test_of(item)] > MANY and crc32(item.nodeid.encode()) % 2:
            yield item


def quick(items: list[pytest.Item]) -> list[pytest.Item]:
    """Returns tests without marker of what costs time, and one case of each, the first one, so in
    a random order another one each time."""
    found: dict[str, pytest.Item] = {}
    for item in items:
        if COSTLY.isdisjoint(mark.name for mark in item.iter_markers()):
            found.setdefault(test_of(item), item)
    return list(found.values())


def kinds(item: pytest.Function) -> Iterator[str]:
    """Yields the names of the markers that a test gets beside those that it has."""
    named = item.callspec.params if hasattr(item, "callspec") else {}
    params = named.values()
    fixtures = (definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values())
    functions = [item.function, *fixtures, *(p for p in params if isinstance(p, FunctionType))]
    used = frozenset().union(*map(names_used, functions))
    if used & COMPILE:
        yield "compile"
    if used & PROCESSES:
        yield "processes"
    if os.environ.get("TRITON_INTERPRET") == "1":
        words = {param for param in params if isinstance(param, str)}
        # As in skip_unless_usable("triton").
        words = words.union(*(f.__code__.co_consts for f in functions if hasattr(f, "__code__")))
        if "triton" in words:
            yield "interpreter"
            grids = (mark.kwargs.items() for mark in item.iter_markers("interpreted"))
            if any(named[name] not in values for grid in grids for name, values in grid):
                yield "long"


@cache
def names_used(function: Any) -> frozenset[str]:
    """Returns the names in a function, and in all functions of the tests that it may call."""
    found: set[str] = set()
    known: set[FunctionType] = set()
    rest = [function]
    while rest:
        current = rest.pop()
        current = getattr(current, "__wrapped__", current)
        if isinstance(current, type):
            rest += [value for value in vars(current).values() if isinstance(value, FunctionType)]
        if isinstance(current, FunctionType) and current not in known:
            known.add(current)
            names = _names(current.__code__)
            found |= names
            rest += _called(current, names)
    return frozenset(found)


def _names(code: CodeType) -> set[str]:
    """Returns the names in code and in the functions inside it."""
    names = {*code.co_names}
    # An attribute of torch, unless it is re that compiles.
    if {"torch", "compile"} <= names and "re" not in names:
        names.add("torch.compile")
    return names.union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _called(function: FunctionType, names: set[str]) -> Iterator[Any]:
    """Yields what the names mean, as far as it is code of the tests."""
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            yield from filter(_own, (getattr(value, attribute, None) for attribute in names))
        elif isinstance(value, dict):
            yield from filter(_own, value.values())
        elif _own(value):
            yield value


def _own(value: Any) -> bool:
    module = str(getattr(value, "__module__", ""))
    return callable(value) and module.partition(".")[0] == PACKAGE
