"""``.npy`` files of integers from outside: the header is matched, never evaluated.

NumPy's own reader parses the header as Python and believes its sizes.

Source of the format: numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trm_fast._files import AnyPath, open_file

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 4096  # bytes; those of an array of numbers have one or two hundred
_HEADER = re.compile(
    r"\{(?=.*'descr': *'([<>|=]?[a-zA-Z]\d{1,3})')(?=.*'fortran_order': *(True|False))"
    r"(?=.*'shape': *\(((?:\d{1,18}(?:, *\d{1,18})*,?)?)\))"
    r"(?: *'(?:descr|fortran_order|shape)': *(?:'[^']*'|True|False|\([\d, ]*\)) *,?){3} *\}"
)
_MAX_AXES = 8


class _Layout(NamedTuple):
    dtype: np.dtype[Any]
    order: str
    shape: tuple[int, ...]
    offset: int


def read_npy(path: AnyPath, *, mapped: bool = False) -> NDArray[Any]:
    """Reads an array of integers.

    Args:
        path: the file.
        mapped: whether the array stays on disk, read-only; otherwise it is in memory, which takes
            the size of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no .npy file of integers, or shorter than its header says.
    """
    with open_file(path) as file:
        try:
            layout = _layout(file)
        except ValueError as error:
            raise ValueError(
                f"{os.fspath(path)}: a complete .npy array of integers is required; got {error}"
            ) from None
        count = math.prod(layout.shape)
        if not count:
            return np.empty(layout.shape, layout.dtype)
        if mapped:
            return np.memmap(file, layout.dtype, "r", layout.offset, layout.shape, layout.order)  # type: ignore[call-overload,no-any-return]
        flat = np.fromfile(file, layout.dtype, count, offset=0)
        return flat.reshape(layout.shape, order=layout.order)  # type: ignore[call-overload,no-any-return]


def _layout(file: BinaryIO) -> _Layout:
    """Reads the header, and leaves the file where the values begin."""
    start = file.read(8)
    if len(start) < 8 or not start.startswith(_MAGIC):
        raise ValueError("something else")
    version = start[6:]
    if version not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError(f"version {version[0]}.{version[1]}")
    length = int.from_bytes(file.read(2 if version == b"\1\0" else 4), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("a header that is cut off")
    found = _HEADER.fullmatch(text.decode("latin-1").strip())
    if found is None:
        raise ValueError("a header that is none of an array of numbers")
    dtype, shape = _dtype(found[1]), _shape(found[3])
    offset = file.tell()
    needed, have = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - offset
    if needed > have:
        raise ValueError(f"{have} bytes of values for {needed}")
    return _Layout(dtype, "F" if found[2] == "True" else "C", shape, offset)


def _dtype(text: str) -> np.dtype[Any]:
    if text.lstrip("<>|=") not in {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}:
        raise ValueError(f"the type {text!r}")
    return np.dtype(text)


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split(",") if size.strip())
    if not 1 <= len(shape) <= _MAX_AXES:
        raise ValueError(f"an array of {len(shape)} axes")
    # Of an empty array too, so that its size can be held.
    if math.prod(size for size in shape if size) >= 1 << 60:
        raise ValueError(f"the shape {list(shape)}")
    return shape
