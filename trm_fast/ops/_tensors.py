"""Questions about the memory of tensors that the pages of several ops ask."""

from collections.abc import Sequence
from itertools import pairwise

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
    if not is_dense(other):
        return tensor.contiguous()
    if same_order(tensor, other):
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


def overlap(written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> bool:
    """Returns whether a written tensor shares memory with another written or a read one."""
    spans = [(*_span(t), True) for t in written if t.numel()]
    spans += [(*_span(t), False) for t in read if t.numel()]
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


def _order(tensor: Tensor) -> list[tuple[int, int]]:
    """Returns (stride, size) of the dimensions that have more than one element."""
    return [(step, n) for step, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1]
