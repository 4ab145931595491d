"""Storing what a step computes, in bfloat16 with the random bits that trm_fast/ops/adaptive_step.py
describes."""

import torch
from torch import Tensor

from trm_fast.ops._tensors import is_dense


def write(
    target: Tensor, value: Tensor, keep: Tensor | None, bits: tuple[Tensor, int, int] | None = None
) -> None:
    """Stores ``value`` where ``keep`` holds; ``bits`` is (t, lane, shift) of its random bits."""
    if bits is not None and target.dtype == torch.bfloat16:
        value = round_stochastically(
            value.float(), random_words(target, bits[0], bits[1]) >> bits[2]
        )
    value = value.to(target.dtype)
    target.copy_(value if keep is None else torch.where(keep, value, target))


_MASK = 0xFFFFFFFF


def random_words(target: Tensor, t: Tensor, lane: int) -> Tensor:
    """Returns 32 random bits, as int64, for each element of ``target`` in its memory order."""
    index = torch.arange(target.numel(), device=target.device)
    dense = is_dense(target) and target.numel() > 0
    index = index.as_strided(target.shape, target.stride()) if dense else index.view(target.shape)
    key = _mix((t.long() + 0x9E3779B9 * (2 * (index >> 32) + lane)) & _MASK)
    return _mix(key ^ (index & _MASK))


def _mix(h: Tensor) -> Tensor:
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def round_stochastically(value: Tensor, words: Tensor) -> Tensor:
    rounded = ((value.view(torch.int32) & _MASK) + (words & 0xFFFF)) >> 16
    signed = ((rounded & 0xFFFF) ^ 0x8000) - 0x8000
    return torch.where(value.isnan(), value.bfloat16(), signed.to(torch.int16).view(torch.bfloat16))
