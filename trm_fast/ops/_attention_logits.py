"""The largest attention logit of each head, computed apart from the attention."""

from math import inf

import torch
from torch import Tensor

# Elements of the logits that max_logits computes at once: 64 MiB in float32.
_CHUNK = 1 << 24


@torch.no_grad()
def max_logits(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Returns the largest unmasked ``q . k * scale`` of each head, exact but for rounding.

    The products are computed a second time, in float32 (float64 for float64, TensorFloat32 where
    torch is set to it) and in chunks of 64 MiB, without gradient. An attention kernel that has its
    row maxima should report those instead.

    Args:
        q: queries, [batch, heads, length, dim], as they enter the attention, that is after rotary
            positions.
        k: keys, [batch, kv_heads, key_length, dim]; head ``h`` uses key head ``h * kv_heads //
            heads``.
        scale: factor of the logits, > 0; None means ``1 / sqrt(dim)``.
        mask: which keys a query may attend to, broadcastable to [batch, heads, length, key_length];
            boolean (True is allowed), or floating point and added to the logits (-inf is not
            allowed; other values are not counted in).
        causal: query ``i`` attends to keys 0 to ``i``, as in ``scaled_dot_product_attention``.

    Returns:
        [heads]; -inf for a head without any unmasked pair, NaN if a product is NaN.

    Raises:
        ValueError: shapes do not fit together, ``scale`` is not positive and finite, or ``mask`` is
            of whole numbers.
    """
    _check_shapes(q, k)
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    if not 0 < scale < inf:
        raise ValueError(f"max_logits: scale must be finite and > 0; got {scale}")
    batch, heads, length, _ = q.shape
    allowed = _allowed(mask)
    if allowed is not None:
        allowed = allowed.expand(batch, heads, length, k.shape[2])
    per_row = max(heads * k.shape[2], 1)
    rows = min(max(_CHUNK // per_row, 1), max(length, 1))
    samples = max(_CHUNK // (per_row * rows), 1)
    largest = torch.full((heads,), -inf, dtype=_product_dtype(q), device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for b in range(0, batch, samples):
            for i in range(0, length, rows):
                part = (slice(b, b + samples), slice(None), slice(i, i + rows))
                visible = None if allowed is None else allowed[part]
                first = i if causal else None
                logits = _masked_products(q[part], k[b : b + samples], visible, first)
                if logits.numel():
                    largest = torch.maximum(largest, logits.amax((0, 2, 3)))
    return largest * scale


def _allowed(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(f"max_logits: mask must be boolean or floating point; got {mask.dtype}")
    return mask > -inf


def _masked_products(q: Tensor, k: Tensor, allowed: Tensor | None, first: int | None) -> Tensor:
    """Returns [batch, heads, rows, keys]; with ``first``, the number of the first row, row ``i``
    sees keys 0 to ``first + i`` and keys that no row sees may be left out."""
    seen = k.shape[2] if first is None else min(k.shape[2], first + q.shape[2])
    dtype = _product_dtype(q)
    keys = k[:, :, :seen].to(dtype).unsqueeze(2)
    # [batch, kv_heads, heads / kv_heads, rows, dim]
    queries = q.to(dtype).unflatten(1, (k.shape[1], -1))
    products: Tensor = (queries @ keys.mT).flatten(1, 2)
    if first is not None:
        ones = torch.ones(products.shape[2:], dtype=torch.bool, device=q.device)
        products.masked_fill_(ones.triu(first + 1), -inf)
    if allowed is not None:
        products.masked_fill_(~allowed[..., :seen], -inf)
    return products


def _product_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check_shapes(q: Tensor, k: Tensor) -> None:
    fits = q.ndim == k.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "max_logits: q must be [batch, heads, length, dim] and k [batch, kv_heads, key_length, "
            f"dim], heads a multiple of kv_heads; got {tuple(q.shape)} and {tuple(k.shape)}"
        )
