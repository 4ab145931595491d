"""Questions about the memory of tensors that the pages of several ops ask."""

from collections.abc import Sequence
from itertools import pairwise
from math import gcd

import numpy as np
import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Returns whether the elements fill memory without gaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    order = sorted(_order(tensor))
    return order[0][0] == 1 and all(step * n == after for (step, n), (after, _) in pairwise(order))


def same_order(tensor: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors of one shape list their elements in the same order of memory."""
    return tensor.numel() == 0 or _order(tensor) == _order(other)


def in_order_of(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns ``tensor`` in the memory order of ``other``; contiguous if ``other`` has gaps."""
    tensor = tensor.resolve_neg()
    if not is_dense(other):
        return tensor.contiguous()
    if same_order(tensor, other):
        return tensor
    # Not empty_like: it leaves the order of `other` where that cannot be told from its strides.
    return torch.empty_strided(
        other.shape, other.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def overlap(written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> bool:
    """Returns whether an element of a written tensor shares memory with any other element."""
    written = [tensor for tensor in written if tensor.numel()]
    read = [tensor for tensor in read if tensor.numel()]
    if all(map(is_dense, written)) and not _spans_meet(written, read):
        return False
    # Rare: views with gaps may lie between each other without sharing an element.
    unit = gcd(*(tensor.element_size() for tensor in (*written, *read)))
    taken = np.concatenate([_places(tensor, unit) for tensor in written])
    met = np.concatenate([_places(tensor, unit) for tensor in read]) if read else taken[:0]
    return np.unique(taken).size < taken.size or bool(np.isin(taken, met).any())


def _spans_meet(written: Sequence[Tensor], read: Sequence[Tensor]) -> bool:
    spans = [(*_span(t), True) for t in written] + [(*_span(t), False) for t in read]
    written_end = read_end = 0
    for start, end, is_written in sorted(spans):
        if start < written_end or (is_written and start < read_end):
            return True
        if is_written:
            written_end = max(written_end, end)
        else:
            read_end = max(read_end, end)
    return False


def _span(tensor: Tensor) -> tuple[int, int]:
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    extent = 1 + sum(step * (n - 1) for step, n in steps)
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


def _places(tensor: Tensor, unit: int) -> np.ndarray:
    """Returns the addresses of all elements, in multiples of ``unit`` bytes."""
    places = np.array([tensor.data_ptr()])
    for step, n in zip(tensor.stride(), tensor.shape, strict=True):
        places = np.add.outer(places, np.arange(n) * step * tensor.element_size()).ravel()
    units = np.arange(0, tensor.element_size(), unit)
    all_places: np.ndarray = np.add.outer(places, units).ravel()
    return all_places // unit


def _order(tensor: Tensor) -> list[tuple[int, int]]:
    """Returns (stride, size) of the dimensions that have more than one element."""
    return [(step, n) for step, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1]
