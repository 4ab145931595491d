"""What the checks of max_logits and QKClip share: data, and the truth in float64."""

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
HEADS, DIM = 4, 6


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def true_max(
    q: Tensor, k: Tensor, scale: float, allowed: Tensor | None = None, causal: bool = False
) -> Tensor:
    """[heads], from loops over heads."""
    batch, heads, length, _ = q.shape
    group = heads // k.shape[1]
    seen = torch.ones(batch, heads, length, k.shape[2], dtype=torch.bool)
    if causal:
        seen &= torch.arange(k.shape[2]) <= torch.arange(length)[:, None]
    if allowed is not None:
        seen &= allowed
    largest = []
    for h in range(heads):
        logits = q[:, h] @ k[:, h // group].transpose(1, 2) * scale
        largest.append(logits.masked_fill(~seen[:, h], -torch.inf).max())
    return torch.stack(largest)
