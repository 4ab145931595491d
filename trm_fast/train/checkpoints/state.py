"""Nested state to tensors and a JSON tree, tensors to the bytes of a safetensors file; and back.

A state is a tensor, a plain value (None, bool, int, float, str) or a dict, list or tuple of states;
the keys of a dict are str or int. What comes back is equal to the bit: tuples stay tuples, 1, 1.0
and True stay apart, and so do -0.0, infinities, every NaN and integers of any size. A scalar or 0-d
array of NumPy comes back as the plain value that it is, and so does a member of an enumeration of
numbers or strings.

In the tree, what JSON has stands as itself, and everything else as an object of one key:

    {"$tensor": "optim.state.0.step"}   the tensor of that name
    {"$tuple": [1, 2]}                  a tuple
    {"$dict": [[0, "a"], [1, "b"]]}     a dict with keys that are no strings or begin with "$"
    {"$int": "0x10000000000000000"}     an integer beyond 64 bits
    {"$float": "7ff0000000000000"}      an infinity or NaN, by its bits

Not kept is what belongs to memory rather than to the value: strides (tensors come back contiguous),
devices, ``requires_grad`` and ``Parameter``, and the class of a dict. Tensors of one part that are
the same memory in the same shape are stored once and come back as one tensor; other views of shared
memory, and the same tensor in two parts, are stored each and come back equal.

Source of the file format: github.com/huggingface/safetensors: 8 bytes with the length of the
header, the header in JSON, then the tensors without gaps.
"""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trm_fast import _json
from trm_fast._json import MAX_DEPTH, check_depth

# A level of state is at most three of JSON, as "$dict" with its list of pairs; a special number is
# one more, and two are around the tree of a part.
_JSON_DEPTH = 3 * MAX_DEPTH + 3

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip


def flatten(value: Any, path: str) -> tuple[dict[str, Tensor], Any]:
    """Splits a state into its tensors, by name, and a tree that JSON can hold.

    Args:
        value: the state.
        path: how errors call it, and the name of a tensor that is the whole state.

    Raises:
        TypeError: something is no state; the line names the place, as "optim.state.0.step".
        ValueError: it is nested deeper than ``MAX_DEPTH``.
    """
    part = _Part(path)
    tree = part.encode(value, ())
    return part.tensors, tree


def plain(value: Any) -> Any:
    """Returns the plain value that a scalar of NumPy or a subclass of a plain type holds, and
    anything else as it is."""
    kind = type(value)
    if kind in (str, int, float, bool) or value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, np.generic) or (kind is np.ndarray and value.ndim == 0):
        return value.item()
    # Of the type itself: an enumeration may print its members otherwise.
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return str.__str__(value) if isinstance(value, str) else value


class _Part:
    def __init__(self, path: str) -> None:
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self.known: dict[tuple[Any, ...], str] = {}

    def encode(self, value: Any, keys: tuple[str | int, ...]) -> Any:
        value = plain(value)
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if -(1 << 63) <= value < 1 << 63 else {"$int": hex(value)}
        if kind is float:
            finite = math.isfinite(value)
            return value if finite else {"$float": struct.pack(">d", value).hex()}
        check_depth(len(keys) + 1, f"{self.path}: state")
        if isinstance(value, Tensor):
            return {"$tensor": self.name(value, keys)}
        if kind is torch.dtype and value in DTYPES:
            return {"$dtype": DTYPES[value]}
        if kind is list:
            return [self.encode(item, (*keys, i)) for i, item in enumerate(value)]
        if kind is tuple:
            return {"$tuple": [self.encode(item, (*keys, i)) for i, item in enumerate(value)]}
        if isinstance(value, dict):
            return self.encode_dict(value, keys)
        raise TypeError(
            f"{self.place(keys)} must be a tensor, None, bool, int, float, str or a dict, list or "
            f"tuple of these; got {kind.__module__}.{kind.__qualname__}"
        )

    def encode_dict(self, value: dict[Any, Any], keys: tuple[str | int, ...]) -> Any:
        value = {plain(key): item for key, item in value.items()}
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(
                    f"{self.place(keys)} must have keys that are str or int; "
                    f"got {key!r} of {type(key).__module__}.{type(key).__qualname__}"
                )
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, (*keys, key)) for key, item in value.items()}
        pairs = [[self.encode(key, ()), self.encode(value[key], (*keys, key))] for key in value]
        return {"$dict": pairs}

    def place(self, keys: tuple[str | int, ...]) -> str:
        return ".".join(map(str, (self.path, *keys)))

    def name(self, tensor: Tensor, keys: tuple[str | int, ...]) -> str:
        """Returns the name under which the tensor is stored, the old one of a tensor met before."""
        self.check(tensor, keys)
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and memory in self.known:
            return self.known[memory]
        name = ".".join(map(str, keys)) or self.path
        # A surrogate is no UTF-8, and the file format takes this one name for itself.
        name = name.encode("utf-8", "backslashreplace").decode()
        if name == "__metadata__":
            name += "~"
        while name in self.tensors:
            name += "~"
        self.tensors[name] = tensor
        self.known[memory] = name
        return name

    def check(self, tensor: Tensor, keys: tuple[str | int, ...]) -> None:
        if is_traceable_wrapper_subclass(tensor):
            raise TypeError(
                f"{self.place(keys)} must be a plain tensor; got {type(tensor).__name__}: "
                "gather the whole tensor first"
            )
        if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type == "meta":
            raise TypeError(
                f"{self.place(keys)} must be a dense tensor with data; "
                f"got {tensor.layout} on {tensor.device}"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{self.place(keys)} must have a dtype that safetensors knows; got {tensor.dtype}"
            )


def unflatten(tree: Any, tensors: Mapping[str, Tensor], depth: int = 0) -> Any:
    """Puts a state together again, in the lists and dicts of the tree, so that no second one of
    them is in memory.

    Args:
        tree: what ``flatten`` returned; not to be used any more.
        tensors: by name.
        depth: levels of the state around this one.

    Raises:
        ValueError: the tree is not one that ``flatten`` makes, or names a tensor that is missing.
    """
    if tree is None or type(tree) in (bool, str, int, float):
        return tree
    if type(tree) is list:
        return _items(tree, tensors, depth)
    tags = [key for key in tree if key.startswith("$")]
    if not tags:
        check_depth(depth + 1, "a tree")
        for key, item in tree.items():
            tree[key] = unflatten(item, tensors, depth + 1)
        return tree
    if len(tree) != 1 or tags[0] not in _DECODERS:
        raise ValueError(f"a tree must be of known kinds; got an object with {tags[0][:40]!r}")
    return _DECODERS[tags[0]](tree[tags[0]], tensors, depth)


def _items(items: list[Any], tensors: Mapping[str, Tensor], depth: int) -> list[Any]:
    check_depth(depth + 1, "a tree")
    for place, item in enumerate(items):
        items[place] = unflatten(item, tensors, depth + 1)
    return items


def _tensor(name: Any, tensors: Mapping[str, Tensor], _: int) -> Tensor:
    if type(name) is not str or name not in tensors:
        raise ValueError(f"a tree must name stored tensors; got {str(name)[:80]!r}")
    return tensors[name]


def _tuple(items: Any, tensors: Mapping[str, Tensor], depth: int) -> tuple[Any, ...]:
    return tuple(_items(_list(items), tensors, depth))


def _dict(pairs: Any, tensors: Mapping[str, Tensor], depth: int) -> dict[Any, Any]:
    check_depth(depth + 1, "a tree")
    found = {}
    for pair in _list(pairs):
        key, value = (unflatten(item, tensors, depth + 1) for item in _list(pair, 2))
        if type(key) not in (str, int):
            raise ValueError(f"a tree must have keys that are str or int; got {type(key).__name__}")
        found[key] = value
    return found


def _list(items: Any, length: int | None = None) -> list[Any]:
    if type(items) is not list or length not in (None, len(items)):
        raise ValueError("a tree must hold tuples as lists and dicts as pairs; got something else")
    return items


def _int(text: Any, _: Mapping[str, Tensor], __: int) -> int:
    return int(_hex(text, r"-?0x[0-9a-f]+"), 16)


def _float(text: Any, _: Mapping[str, Tensor], __: int) -> float:
    value: float = struct.unpack(">d", bytes.fromhex(_hex(text, r"[0-9a-f]{16}")))[0]
    return value


def _hex(text: Any, pattern: str) -> str:
    if type(text) is not str or not re.fullmatch(pattern, text):
        raise ValueError("a tree must hold special numbers in hexadecimal; got something else")
    return text


def _dtype(name: Any, _: Mapping[str, Tensor], __: int) -> torch.dtype:
    found = next((dtype for dtype, known in DTYPES.items() if known == name), None)
    if found is None:
        raise ValueError(f"a dtype must be one of {', '.join(DTYPES.values())}; got {name!r:.40}")
    return found


_DECODERS = {
    "$tensor": _tensor,
    "$tuple": _tuple,
    "$dict": _dict,
    "$int": _int,
    "$float": _float,
    "$dtype": _dtype,
}


def dumps(tree: Any) -> bytes:
    """Returns a tree as compact JSON in ASCII."""
    return json.dumps(tree, separators=(",", ":"), allow_nan=False).encode("ascii")


def loads(data: bytes, subject: str) -> Any:
    """Reads JSON of a stranger: bounded depth, bounded integers, no NaN.

    Args:
        data: the JSON.
        subject: begins the messages.

    Raises:
        ValueError: it is no JSON or goes beyond these bounds.
    """
    return _json.loads(data, subject, max_depth=_JSON_DEPTH)


def dense(tensor: Tensor) -> Tensor:
    """Returns the values as a contiguous tensor on the CPU, without a copy where it is one."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def to_safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a safetensors file; large tensors are not copied."""
    # Widest elements first, so that each tensor is aligned to its own elements.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = dumps(header)
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():
            yield dense(tensors[name]).reshape(-1).view(torch.uint8).numpy().data


def from_safetensors(data: bytes) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, each in memory of its own.

    Raises:
        ValueError: it is no such file, or has tensors that torch cannot hold.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    # The last five come from shapes and dtypes that no tensor can have.
    except (
        SafetensorError, AssertionError, KeyError, OverflowError, RuntimeError, TypeError,
    ) as error:  # fmt: skip
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(f"must be a safetensors file; {type(error).__name__}: {reason}") from None
