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
    # Not empty_like: it leaves the order of `other` where its strides do not show it.
    return torch.empty_strided(
        other.shape, other.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def overlap(written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> bool:
    """Returns whether an element of a written tensor shares memory with any other element."""
    tensors = [(*_span(t), True, t) for t in written if t.numel()]
    tensors += [(*_span(t), False, t) for t in read if t.numel()]
    return any(map(_share, _neighbourhoods(sorted(tensors, key=lambda item: item[:3]))))


_Item = tuple[int, int, bool, Tensor]  # first address, address behind the last, written, tensor


def _neighbourhoods(items: list[_Item]) -> list[list[_Item]]:
    """Returns the tensors, sorted by address, in groups whose spans of memory hang together."""
    groups: list[list[_Item]] = []
    end = 0
    for item in items:
        if item[0] >= end:
            groups.append([])
        groups[-1].append(item)
        end = max(end, item[1])
    return groups


def _share(group: list[_Item]) -> bool:
    written = [tensor for *_, is_written, tensor in group if is_written]
    read = [tensor for *_, is_written, tensor in group if not is_written]
    if not written or (len(group) == 1 and not _may_repeat(written[0])):
        return False
    # Rare: views with gaps may lie between each other without sharing an element.
    unit = gcd(*(tensor.element_size() for *_, tensor in group))
    taken = np.concatenate([_places(tensor, unit) for tensor in written])
    met = np.concatenate([_places(tensor, unit) for tensor in read]) if read else taken[:0]
    return np.unique(taken).size < taken.size or bool(np.isin(taken, met).any())


def _may_repeat(tensor: Tensor) -> bool:
    """Returns False if the strides rule out that two indices name the same element."""
    extent = 0
    for step, n in sorted(_order(tensor)):
        if step <= extent:
            return True
        extent += step * (n - 1)
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
