"""Objects, lists, dicts and arrays that may change: what has changed since they were seen first,
and back to that."""

from abc import ABC, abstractmethod
from io import IOBase
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trm_fast.train._loader_parts import attributes
from trm_fast.train._loader_values import UnsavableError, decoded, encoded

_NUMBERS = (bool, int, float, str)


class Watched(ABC):
    """Something that may change."""

    @abstractmethod
    def changes(self) -> Any:
        """Returns what has changed as a state for a checkpoint, or None for nothing and for what
        cannot be saved."""

    @abstractmethod
    def go_back(self, changes: Any) -> None:
        """Brings about what ``changes`` returned, here or in an object that was made alike."""

    def unsaved(self) -> list[str]:
        """Returns the names of what has changed and is not in ``changes``, but may be random."""
        return []


def watched(value: Any) -> Watched:
    """Returns what watches a value."""
    if isinstance(value, Tensor):
        return _WatchedTensor(value)
    if isinstance(value, np.ndarray):
        return _WatchedArray(value)
    if isinstance(value, list):
        return _WatchedList(value)
    return _WatchedDict(value) if isinstance(value, dict) else _WatchedObject(value)


class _WatchedObject(Watched):
    """The attributes of an object. Which object an attribute is counts, and the value of numbers
    and texts; lists, dicts and arrays are watched for themselves."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.before = self._held()

    def _held(self) -> dict[Any, Any]:
        return attributes(self.value)

    def _write(self, name: Any, item: Any) -> None:
        object.__setattr__(self.value, name, item)

    def _remove(self, name: Any) -> None:
        object.__delattr__(self.value, name)

    def _changed(self) -> dict[Any, Any]:
        before = self.before
        return {
            name: item
            for name, item in self._held().items()
            if name not in before or not _is_same(before[name], item)
        }

    def changes(self) -> Any:
        changed, held = self._changed(), self._held()
        found = [pair for pair in map(_encoded_pair, changed.items()) if pair is not None]
        gone = [encoded(name) for name in self.before if name not in held]
        return {"set": found, "gone": gone} if found or gone else None

    def go_back(self, changes: Any) -> None:
        wanted = {} if changes is None else {decoded(k): v for k, v in changes["set"]}
        gone = [] if changes is None else [decoded(name) for name in changes["gone"]]
        for pair in self._changed().items():
            # What cannot be saved, such as a file that was opened, is not taken back either.
            if pair[0] not in wanted and _encoded_pair(pair) is not None:
                self._undo(pair[0])
        for name in self.before.keys() - self._held().keys():
            self._undo(name)
        for name, value in wanted.items():
            self._write(name, decoded(value))
        for name in gone:
            self._remove(name)

    def _undo(self, name: Any) -> None:
        if name in self.before:
            self._write(name, self.before[name])
        else:
            self._remove(name)

    def unsaved(self) -> list[str]:
        return [
            str(name)
            for name, item in self._changed().items()
            if _may_be_random(item) and _encoded_pair((name, item)) is None
        ]


class _WatchedDict(_WatchedObject):
    """The items of a dict, likewise."""

    def _held(self) -> dict[Any, Any]:
        return dict(self.value)

    def _write(self, name: Any, item: Any) -> None:
        self.value[name] = item

    def _remove(self, name: Any) -> None:
        del self.value[name]


class _WatchedList(Watched):
    """Which objects are in a list, and their order."""

    def __init__(self, value: list[Any]) -> None:
        self.value, self.before = value, list(value)

    def _has_changed(self) -> bool:
        same = len(self.value) == len(self.before)
        return not (same and all(map(is_, self.value, self.before)))

    def changes(self) -> Any:
        if not self._has_changed():
            return None
        order = self._order()
        return _encoded_or_none(self.value) if order is None else {"order": order}

    def _order(self) -> Tensor | None:
        """Returns where the items were before, if these are the same ones."""
        places: dict[int, list[int]] = {}
        for place, item in enumerate(self.before):
            places.setdefault(id(item), []).append(place)
        try:
            order = [places[id(item)].pop() for item in self.value]
        except (KeyError, IndexError):
            return None
        return torch.tensor(order) if len(order) == len(self.before) else None

    def go_back(self, changes: Any) -> None:
        if changes is None:
            if self.changes() is not None:
                self.value[:] = self.before
        elif "order" in changes:
            self.value[:] = [self.before[place] for place in changes["order"].tolist()]
        else:
            self.value[:] = decoded(changes)

    def unsaved(self) -> list[str]:
        return [""] if self._has_changed() and self.changes() is None else []


class _WatchedArray(Watched):
    """The numbers in an array of NumPy."""

    def __init__(self, value: np.ndarray[Any, Any]) -> None:
        self.value, self.before = value, value.copy()

    def _has_changed(self) -> bool:
        return bool(self.value.tobytes() != self.before.tobytes())

    def changes(self) -> Any:
        return _encoded_or_none(self.value) if self._has_changed() else None

    def unsaved(self) -> list[str]:
        return [""] if self._has_changed() and self.changes() is None else []

    def go_back(self, changes: Any) -> None:
        if changes is not None or self.changes() is not None:
            self.value[...] = self.before if changes is None else decoded(changes)


class _WatchedTensor(Watched):
    """The numbers in a tensor; torch counts how often they were written."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.before = value, value.detach().clone()
        self.version = _version(value)

    def _has_changed(self) -> bool:
        return self.version != _version(self.value)

    def changes(self) -> Any:
        return _encoded_or_none(self.value.detach()) if self._has_changed() else None

    def unsaved(self) -> list[str]:
        return [""] if self._has_changed() and self.changes() is None else []

    @torch.no_grad()
    def go_back(self, changes: Any) -> None:
        if changes is not None or self.changes() is not None:
            self.value.copy_(self.before if changes is None else decoded(changes))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_same(before: Any, now: Any) -> bool:
    if before is now:
        return True
    return type(before) is type(now) and type(now) in _NUMBERS and bool(before == now)


def _encoded_or_none(value: Any) -> Any:
    try:
        return encoded(value)
    except UnsavableError:
        return None


def _encoded_pair(pair: tuple[Any, Any]) -> list[Any] | None:
    try:
        return [encoded(pair[0]), encoded(pair[1])]
    except UnsavableError:
        return None


def _may_be_random(value: Any) -> bool:
    kinds = (list, dict, tuple, np.ndarray, Tensor)
    return isinstance(value, kinds) or (
        hasattr(value, "__next__") and not isinstance(value, IOBase)
    )
