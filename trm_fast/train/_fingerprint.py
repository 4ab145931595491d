"""What data a loader has, as a short text: other data of the same size have another one."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from trm_fast.train.batches import Batches, EpochBatches

MOST = 64 << 20  # bytes of one array that are read, in pages spread over all of it: some 50 ms
_PAGE = 1 << 12
_ITEMS = 10_000  # about as many of a longer list, spread over all of it


def fingerprint(source: Any) -> str | None:
    """Returns a hash of the tensors, arrays and plain values that batches are made of.

    Args:
        source: batches, or what a data loader, the data sets of torch, lists and dataclasses hold.

    Returns:
        16 hexadecimal digits; None if any of it is something else, such as a file that is read
        example by example, a function, or a tensor that is not plain memory, as a sparse one.
    """
    digest = hashlib.sha256()
    try:
        return digest.hexdigest()[:16] if _add(digest, source) else None
    except Exception:
        # Data of others may raise anything when they are looked into; no run may end by that.
        return None


def _add(digest: Any, value: Any) -> bool:
    if isinstance(value, Tensor):
        return _add_tensor(digest, value)
    if isinstance(value, np.ndarray):
        return _add_array(digest, value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        digest.update(f"{type(value).__name__} {value!r};".encode())
        return True
    inner = _inner(value)
    if inner is None:
        return False
    digest.update(f"{type(value).__name__} {len(inner)};".encode())
    return all(_add(digest, item) for item in inner)


def _inner(value: Any) -> list[Any] | None:
    """Returns the parts of something by which its data are known."""
    if isinstance(value, EpochBatches):
        return [value.source]
    if isinstance(value, Batches) and hasattr(value, "data"):
        return [value.data]
    if isinstance(value, DataLoader):
        return [value.dataset]
    if isinstance(value, TensorDataset):
        return list(value.tensors)
    if isinstance(value, Subset):
        return [value.dataset, list(value.indices)]
    if isinstance(value, ConcatDataset):
        return list(value.datasets)
    if isinstance(value, (list, tuple, range)):
        return [len(value), *value[:: max(1, len(value) // _ITEMS)]]
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def _add_tensor(digest: Any, tensor: Tensor) -> bool:
    is_plain = tensor.layout is torch.strided and not (
        tensor.is_meta
        or tensor.is_nested
        or tensor.is_quantized
        or is_traceable_wrapper_subclass(tensor)
    )
    if not is_plain:
        return False
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
    # Bytes, as NumPy has not all dtypes.
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    _add_bytes(digest, flat.view(torch.uint8).numpy())
    return True


def _add_array(digest: Any, array: np.ndarray[Any, Any]) -> bool:
    if array.dtype.hasobject or isinstance(array, np.ma.MaskedArray):
        return False
    digest.update(f"{array.dtype} {array.shape};".encode())
    if array.size and array.dtype.itemsize:
        _add_bytes(digest, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return True


def _add_bytes(digest: Any, flat: np.ndarray[Any, Any]) -> None:
    every = -(-flat.size // MOST)
    if every <= 1:
        digest.update(flat)
        return
    for start in range(0, flat.size, every * _PAGE):
        digest.update(flat[start : start + _PAGE])
