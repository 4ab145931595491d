"""What the checks of rope_attention share: data, the formula in float64, and plain torch."""

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BASE = 10000.0


def drawn(*shape: int, seed: int = 0, dtype=torch.float64, device="cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def qkv(batch, length, heads, dim, kv_heads=None, dtype=torch.float64, device="cpu"):
    """q, k, v and the gradient of the output, [batch, length, heads * dim]."""
    few = (batch, length, kv_heads or heads, dim)
    shapes = ((batch, length, heads, dim), few, few)
    tensors = [drawn(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate(shapes)]
    return tensors, drawn(batch, length, heads * dim, seed=3, dtype=dtype, device=device)


def ragged(batch: int, length: int) -> Tensor:
    """Padding: the first sample is full, the next ones lose tokens at both ends and inside."""
    padding = torch.ones(batch, length, dtype=torch.bool)
    for b in range(1, batch):
        padding[b, :b] = False
        padding[b, length - b :] = False
        padding[b, length // 2] = False
    return padding


def seen(batch: int, length: int, causal=False, window=None, padding=None) -> Tensor:
    """bool [batch, length, length], pair by pair."""
    pairs = [
        [(not causal or j <= i) and (window is None or abs(i - j) < window) for j in range(length)]
        for i in range(length)
    ]
    pairs = torch.tensor(pairs, dtype=torch.bool).view(1, length, length)
    pairs = pairs.expand(batch, length, length)
    return pairs if padding is None else pairs & padding.cpu()[:, None, :]


def rotate(x: Tensor, theta: float | None) -> Tensor:
    """x [batch, length, dim] as complex numbers, turned."""
    if theta is None:
        return x
    length, dim = x.shape[1:]
    frequency = theta ** (-torch.arange(0, dim, 2).double() / dim)
    angle = torch.arange(length).double()[:, None] * frequency
    turned = torch.complex(*x.split(dim // 2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def truth(
    q, k, v, theta=BASE, causal=False, window=None, padding=None, scale=None
) -> tuple[Tensor, Tensor]:
    """Output and largest logits, head by head."""
    batch, length, heads, dim = q.shape
    visible = seen(batch, length, causal, window, padding)
    outs, largest = [], []
    for h in range(heads):
        kv_head = h * k.shape[2] // heads
        logits = rotate(q[:, :, h], theta) @ rotate(k[:, :, kv_head], theta).mT
        logits = logits * (dim**-0.5 if scale is None else scale)
        largest.append(logits.masked_fill(~visible, -inf).max())
        weights = logits.exp() * visible
        total = weights.sum(-1, keepdim=True)
        outs.append(weights / total.masked_fill(total == 0, 1.0) @ v[:, :, kv_head])
    return torch.stack(outs, 2).flatten(2), torch.stack(largest).detach()


def plain(q, k, v, theta=BASE, causal=False, window=None, padding=None, scale=None) -> Tensor:
    """The operators that official TRM applies, in the dtype of q. Every query must see a key."""
    batch, length, heads, dim = q.shape
    if theta is not None:
        frequency = theta ** (-torch.arange(0, dim, 2).float() / dim)
        angle = torch.outer(torch.arange(length).float(), frequency).to(q.device)
        cos, sin = (torch.cat((t, t), -1)[:, None] for t in (angle.cos(), angle.sin()))
        q, k = (
            (x * cos + torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1) * sin).to(v.dtype)
            for x in (q.float(), k.float())
        )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    mask = seen(batch, length, causal, window, padding)[:, None].to(q.device)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def grads_of(function: Any, tensors: list[Tensor], d_out: Tensor, **options) -> list[Tensor]:
    """Output, then the gradients of q, k and v, on the CPU in float64."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    out = out[0] if isinstance(out, tuple) else out
    grads = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
    return [x.detach().double().cpu() for x in (out, *grads)]


def true_grads(tensors: list[Tensor], d_out: Tensor, **options) -> list[Tensor]:
    wide = [x.double().cpu() for x in tensors]
    return grads_of(truth, wide, d_out.double().cpu(), **options)


def assert_near_torch(found: list[Tensor], tensors, d_out, **options) -> None:
    """At most twice the error of plain torch in the same dtype, in gradients three times.

    Torch may be exact by luck, so an ulp of the largest value is allowed too; in float32, where all
    error is that of sums over dim and length, as many ulps as a random walk of that many steps.
    """
    expected = true_grads(tensors, d_out, **options)
    theirs = grads_of(plain, tensors, d_out, **options)
    dtype, (_, length, _, dim) = tensors[0].dtype, tensors[0].shape
    ulps = (dim + length) ** 0.5 if dtype == torch.float32 else 1.0
    for i, (ours, torchs, true) in enumerate(zip(found, theirs, expected, strict=True)):
        floor = ulps * torch.finfo(dtype).eps * true.abs().max()
        bound = torch.maximum((3 if i else 2) * (torchs - true).abs().max(), floor)
        assert (ours - true).abs().max() <= bound
