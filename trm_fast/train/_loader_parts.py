"""What a loader is made of: its random generators, and the objects that change as it is used."""

import random
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from trm_fast.train.callbacks import Callback
from trm_fast.train.objective import Objective
from trm_fast.train.stateful import Stateful

GENERATORS = (
    torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator,
    random.Random,
)  # fmt: skip
# What these packages have made is searched for what users have put into it, and not watched itself.
_LIBRARIES = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "datasets"}
_SHARED: tuple[Any, ...] = (
    torch.default_generator, np.random.mtrand._rand, random.seed.__self__,  # type: ignore[attr-defined]
)  # fmt: skip
_LEAVES = (
    type, ModuleType, BuiltinFunctionType, str, bytes, int, float, complex, type(None)
)  # fmt: skip
_LONG = 1000  # items of a list or dict that are data, and not looked into
_LARGE = 8 << 20  # bytes of an array that is data, and not watched
_MOST = 10_000  # objects that are looked at


class Parts(NamedTuple):
    """What was found, by the path that leads to it, as in "dataset.transform.rng".

    Args:
        generators: random generators, but for those that the whole process shares.
        stateful: objects that say themselves what their state is.
        watched: objects of the user, and the lists, dicts and arrays in them.
        loaders: data loaders.
    """

    generators: dict[str, Any]
    stateful: dict[str, Stateful]
    watched: dict[str, Any]
    loaders: dict[str, DataLoader[Any]]


# Who has made an object: nobody that is known yet, a package, or what is only searched.
_Owner = str | None
_SEARCHED = ""


def parts_of(source: Any) -> Parts:
    """Looks through attributes, items, and what functions keep, the nearest ones first.

    Args:
        source: a loader, or a function that makes one.
    """
    found = Parts({}, {}, {}, {})
    queue: deque[tuple[str, Any, _Owner]] = deque([("", source, None)])
    seen: dict[int, Any] = {}  # kept, so that no other object gets the number of one of them
    while queue and len(seen) < _MOST:
        path, value, owner = queue.popleft()
        if id(value) in seen or isinstance(value, _LEAVES):
            continue
        seen[id(value)] = value
        if isinstance(value, GENERATORS):
            if not any(value is shared for shared in _SHARED):
                found.generators[path] = value
            continue
        owner = _file(found, path, value, owner)
        for name, child, of_child in _children(value, owner):
            queue.append((f"{path}.{name}" if path else name, child, of_child))
    if queue:
        warnings.warn(
            f"EpochBatches: only the first {_MOST} objects of the batches were looked through for "
            "random generators: those behind them are in no checkpoint",
            stacklevel=2,
        )
    return found


def _file(found: Parts, path: str, value: Any, owner: _Owner) -> _Owner:
    """Puts an object where it belongs; returns whose its parts are."""
    if isinstance(value, Tensor):
        if owner and not value.is_nested and value.layout == torch.strided:
            if value.nbytes <= _LARGE:
                found.watched[path] = value
        return _SEARCHED
    if isinstance(value, np.ndarray):
        if owner and value.nbytes <= _LARGE and not isinstance(value, np.memmap):
            found.watched[path] = value
        return _SEARCHED
    if type(value) in (list, dict):
        if owner:
            found.watched[path] = value
        return owner
    if isinstance(value, DataLoader):
        found.loaders[path] = value
    kind = type(value)
    package = _package(value)
    if isinstance(value, nn.Module) or (package == "trm_fast" and path):
        return _SEARCHED
    # Callbacks and objectives have theirs saved by the trainer, as of another moment.
    has_state = hasattr(kind, "state_dict") and hasattr(kind, "load_state_dict")
    if has_state and not isinstance(value, (Callback, Objective)):
        if not path or package not in _LIBRARIES:
            found.stateful[path] = value
        return _SEARCHED
    if package in _LIBRARIES:
        return owner
    if owner is not None and owner != package:
        return _SEARCHED
    found.watched[path] = value
    return package


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _children(value: Any, owner: _Owner) -> Iterator[tuple[str, Any, _Owner]]:
    if isinstance(value, (Tensor, np.ndarray)):
        return
    if isinstance(value, FunctionType):
        yield from _in_function(value, owner)
        return
    if isinstance(value, MethodType):
        yield from ((part, getattr(value, part), owner) for part in ("__self__", "__func__"))
        return
    if isinstance(value, partial):
        yield from ((part, getattr(value, part), owner) for part in ("func", "args", "keywords"))
    if isinstance(value, (dict, list, tuple, deque)) and len(value) <= _LONG:
        if isinstance(value, dict):
            yield from ((str(name), item, owner) for name, item in value.items())
        else:  # arrays in a list are data
            of_item = (_SEARCHED if isinstance(i, (Tensor, np.ndarray)) else owner for i in value)
            yield from zip(map(str, range(len(value))), value, of_item, strict=True)
    for name, attribute in attributes(value).items():
        yield name, attribute, owner
    for kind in type(value).__mro__:
        if kind.__module__.partition(".")[0] not in _LIBRARIES:
            for name, attribute in vars(kind).items():
                yield f"{kind.__name__}.{name}", attribute, _SEARCHED


def attributes(value: Any) -> dict[str, Any]:
    """Returns the attributes of an object, by ``__dict__`` and ``__slots__``."""
    try:
        found = dict(vars(value))
    except TypeError:
        found = {}
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _in_function(function: FunctionType, owner: _Owner) -> Iterator[tuple[str, Any, _Owner]]:
    """Returns what a function keeps from call to call; of libraries nothing but what was given to
    it."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents, owner
        except ValueError:  # not set yet
            pass
    yield "__defaults__", function.__defaults__, owner
    yield "__kwdefaults__", function.__kwdefaults__, owner
    package = (function.__module__ or "").partition(".")[0]
    if package in _LIBRARIES:
        return
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, (DataLoader, Dataset, Sampler)):
            yield name, value, owner
        elif isinstance(value, FunctionType):
            if value.__module__ == function.__module__:
                yield name, value, _SEARCHED
        elif isinstance(value, GENERATORS) or _package(value) == package:
            yield name, value, _SEARCHED


def _global_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
