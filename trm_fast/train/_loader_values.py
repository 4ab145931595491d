"""Values that a loader keeps, as states of a checkpoint and back: generators, numbers, texts,
arrays, and lists, tuples and dicts of these."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trm_fast.train._loader_parts import GENERATORS
from trm_fast.train.checkpoints.state import DTYPES

MOST = 8 << 20  # bytes of one value: an order of a million examples


class UnsavableError(Exception):
    """A value is none that a checkpoint should hold."""


def generator_state(generator: Any) -> Any:
    """Returns the state of a generator, as tensors and numbers.

    Raises:
        UnsavableError: it has none, as ``random.SystemRandom``.
    """
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return _as_tensors(generator.bit_generator.state)
    if isinstance(generator, np.random.BitGenerator):
        return _as_tensors(generator.state)
    if isinstance(generator, np.random.RandomState):
        return _as_tensors(generator.get_state(legacy=False))
    try:
        version, words, spare = generator.getstate()
    except NotImplementedError:
        raise UnsavableError from None
    return {"version": version, "words": torch.tensor(words), "spare": spare}


def set_generator(generator: Any, state: Any) -> None:
    """Takes back what ``generator_state`` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _as_arrays(state)
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = _as_arrays(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_as_arrays(state))
    else:
        generator.setstate((state["version"], tuple(state["words"].tolist()), state["spare"]))


def _as_tensors(state: Any) -> Any:
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.copy())
    return {k: _as_tensors(v) for k, v in state.items()} if isinstance(state, dict) else state


def _as_arrays(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.cpu().numpy()
    return {k: _as_arrays(v) for k, v in state.items()} if isinstance(state, dict) else state


_KINDS: dict[str, type] = {"torch": torch.Generator, "python": random.Random}
_KINDS |= {"numpy": np.random.Generator, "numpy_legacy": np.random.RandomState}


def encoded(value: Any) -> dict[str, Any]:
    """Returns a copy of a value as the state of a checkpoint, under the name of its kind.

    Raises:
        UnsavableError: it is or has something else, or is too large.
    """
    return _Encoder().encode(value)


class _Encoder:
    def __init__(self) -> None:
        self.room = MOST

    def encode(self, value: Any) -> dict[str, Any]:
        self._take(8)
        if isinstance(value, np.generic):
            # As an array without dimensions, as arithmetic depends on its dtype.
            return {"scalar": self._array(np.array(value))["array"]}
        if value is None or type(value) in (bool, int, float, str):
            self._take(len(value) if type(value) is str else 0)
            return {"plain": value}
        if isinstance(value, GENERATORS):
            return self._generator(value)
        if type(value) is Tensor:
            return self._tensor(value)
        if type(value) is np.ndarray:
            return self._array(value)
        if type(value) in (list, tuple):
            return self._items(type(value).__name__, value)
        if type(value) is dict:
            pairs = [[self.encode(key), self.encode(item)] for key, item in value.items()]
            return {"dict": pairs}
        raise UnsavableError

    def _take(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise UnsavableError

    def _items(self, kind: str, value: Any) -> dict[str, Any]:
        self._take(8 * len(value))
        if value and {*map(type, value)} == {int}:
            try:
                return {kind: torch.tensor(value)}
            except (OverflowError, RuntimeError):  # beyond 64 bits
                pass
        return {kind: [self.encode(item) for item in value]}

    def _tensor(self, value: Tensor) -> dict[str, Any]:
        # A device would not come back.
        known = value.dtype in DTYPES and value.device.type == "cpu"
        if not known or value.is_nested or value.layout != torch.strided:
            raise UnsavableError
        self._take(value.nbytes)
        return {"tensor": value.detach().clone()}

    def _array(self, value: np.ndarray[Any, Any]) -> dict[str, Any]:
        self._take(value.nbytes)
        try:
            tensor = torch.from_numpy(np.array(value))
        except (TypeError, ValueError):  # texts, dates, objects, bytes in the other order
            raise UnsavableError from None
        if tensor.dtype not in DTYPES:
            raise UnsavableError
        return {"array": tensor}

    def _generator(self, value: Any) -> dict[str, Any]:
        kind = next((name for name, kind in _KINDS.items() if type(value) is kind), None)
        if kind is None or getattr(value, "device", torch.device("cpu")).type != "cpu":
            raise UnsavableError
        return {kind: generator_state(value)}


def decoded(state: dict[str, Any]) -> Any:
    """Returns a new value from what ``encoded`` returned."""
    ((kind, value),) = state.items()
    if kind in _KINDS:
        return _new_generator(kind, value)
    if kind == "tensor":
        return value.clone()
    if kind == "array":
        return value.cpu().numpy().copy()
    if kind == "scalar":
        return value.cpu().numpy()[()]
    if kind == "dict":
        return {decoded(key): decoded(item) for key, item in value}
    if kind in ("list", "tuple"):
        items = value.tolist() if isinstance(value, Tensor) else map(decoded, value)
        return list(items) if kind == "list" else tuple(items)
    return value


def _new_generator(kind: str, state: Any) -> Any:
    if kind == "numpy":
        new: Any = np.random.Generator(getattr(np.random, state["bit_generator"])())
    else:
        new = _KINDS[kind]()
    set_generator(new, state)
    return new
