"""Attention with rotary positions: rotation, scores, masks, softmax and weighted sum in one op.

For each sample and head, with L positions, head dimension Dh, q', k' the rotated q, k:

    angle(l, i) = l * theta^(-2i / Dh)                                   i < Dh / 2, l = 0 .. L - 1
    x'[l, i]          = x[l, i] cos(angle) - x[l, i + Dh/2] sin(angle)
    x'[l, i + Dh/2]   = x[l, i + Dh/2] cos(angle) + x[l, i] sin(angle)
    S[i, j]   = scale * q'[i] . k'[j]       where i sees j, else -inf
    P         = softmax(S) over j           a row that sees no key is zero
    out       = P v

Query i sees key j unless causal and j > i, or |i - j| >= window, or key j is padding. With fewer
key heads than heads, head h uses key head h * kv_heads // heads.

Backward, from d_out, with P computed again:

    d_v  = P^T d_out ;  d_P = d_out v^T ;  d_S = P * (d_P - rowsum(P * d_P)) * scale
    d_q' = d_S k'    ;  d_k' = d_S^T q'  ;  d_q, d_k by the rotation with -sin(angle)

Rotation and softmax are computed in float32 (float64 for float64), whatever the dtype of q. The
rotated q and k are rounded to that dtype, except where the products run in float32.

Floor: q, k, v read and out written, 8 L H Dh bytes per sample in 16 bits, and 14 L H Dh in the
backward, which reads q, k, v, d_out and writes d_q, d_k, d_v; 4 L^2 H Dh FLOP forward and 10 L^2 H
Dh backward, half of them when causal. torch's kernels serve all devices; for short heads on a GPU a
Triton kernel keeps them on the chip and saves nothing but q, k and v. A long sequence with a window
is computed in full and masked.

Sources: Vaswani et al. 2017, arXiv:1706.03762; RoFormer, Su et al. 2021, arXiv:2104.09864, in the
half-split order of GPT-NeoX; the backward, FlashAttention, Dao et al. 2022, arXiv:2205.14135,
appendix B.2. Official TRM (SamsungSAILMontreal/TinyRecursiveModels at e7b6871) has 8 heads of 64,
theta 10000, no mask.
"""

from collections.abc import Callable
from contextlib import nullcontext
from math import inf
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from trm_fast._autograd import is_transformed
from trm_fast._dispatch import Call, Example, Op, named_backend
from trm_fast.ops._attention_logits import max_logits
from trm_fast.ops._attention_tables import rotary_tables, visible_pairs
from trm_fast.ops._autocast import activation, without_autocast

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Up to this length torch's attention of bfloat16 on a CPU is slower than that of float32, at length
# 97 with backward 0.45 of the speed. In float16 it always is.
LONGEST_WIDENED = 256


@overload
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    theta: float | None = 10000.0,
    causal: bool = False,
    window: int | None = None,
    padding: Tensor | None = None,
    scale: float | None = None,
    return_max_logit: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    theta: float | None = 10000.0,
    causal: bool = False,
    window: int | None = None,
    padding: Tensor | None = None,
    scale: float | None = None,
    return_max_logit: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    theta: float | None = 10000.0,
    causal: bool = False,
    window: int | None = None,
    padding: Tensor | None = None,
    scale: float | None = None,
    return_max_logit: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns attention with rotary positions, differentiable; the formula is at the top.

    Under ``torch.autocast`` q, k and v are cast to its dtype first, except float64.

    Args:
        q: queries [batch, length, heads, dim], floating point; views of a fused projection are
            fine, and copied only if the elements of a head are not side by side.
        k: keys [batch, length, kv_heads, dim] of the same dtype and device; ``heads`` is a multiple
            of ``kv_heads``.
        v: values, of the shape, dtype and device of ``k``.
        theta: base of the rotary frequencies, finite and > 0, and ``dim`` is even; None for no
            rotation.
        causal: a query sees no later key.
        window: a query sees only keys less than this many positions away, >= 1; None for all.
        padding: bool [batch, length], True for a real token; other keys are not seen. A query that
            sees no key has output and gradients of zero.
        scale: factor of the logits, finite and > 0; None for ``dim ** -0.5``.
        return_max_logit: also return the largest visible logit of each head.
        backend: the implementation that must run; None takes the first usable one.

    Returns:
        [batch, length, heads * dim] in the dtype of the products' inputs. With
        ``return_max_logit`` also [heads], float32 (float64 for float64), without gradient: the
        largest S[i, j] over samples and visible pairs, -inf where there is none, NaN where one is
        NaN; as ``trm_fast.optim.max_logits`` defines it.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not fit together, or a number is out of range.
        BackendError: the named backend cannot run the call.
    """
    _check_tensors(q, k, v, padding)
    q, k, v = activation(q), activation(k), activation(v)
    _check_dtypes(q, k, v)
    _check_options(q, theta, causal, window, scale)
    if window is not None and window >= q.shape[1]:
        window = None
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    theta = None if theta is None else float(theta)
    run = _implementation(q, backend)
    with without_autocast(q):
        out, largest = run(q, k, v, theta, causal, window, padding, scale, return_max_logit)
    return (out, largest) if return_max_logit else out


def _implementation(q: Tensor, backend: str | None) -> Callable[..., Any]:
    # The compiler fuses the reference by itself.
    if torch.compiler.is_compiling() and (backend or named_backend()) in (None, "reference"):
        return _reference
    return _op.choose(q.device.type, frozenset({q.dtype}), backend).run


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> None:
    for name, x in {"q": q, "k": k, "v": v}.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"rope_attention: {name} must be a tensor; got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"rope_attention: {name} must be a real floating point tensor; got {x.dtype}"
            )
        if x.device != q.device:
            raise ValueError(f"rope_attention: {name} must be on {q.device} as q; got {x.device}")
    fits = q.dim() == k.dim() == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or k.shape != v.shape or not _heads_fit(q, k):
        raise ValueError(
            "rope_attention: q must be [batch, length, heads, dim] and k and v [batch, length, "
            "kv_heads, dim], heads a multiple of kv_heads, none of heads and dim 0; got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if padding is not None:
        _check_padding(q, padding)


def _heads_fit(q: Tensor, k: Tensor) -> bool:
    heads, kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]
    return heads > 0 and kv_heads > 0 and dim > 0 and heads % kv_heads == 0


def _check_padding(q: Tensor, padding: Tensor) -> None:
    if not isinstance(padding, Tensor) or padding.dtype != torch.bool:
        got = padding.dtype if isinstance(padding, Tensor) else type(padding).__name__
        raise TypeError(f"rope_attention: padding must be a bool tensor; got {got}")
    if padding.shape != q.shape[:2] or padding.device != q.device:
        raise ValueError(
            f"rope_attention: padding must be {tuple(q.shape[:2])} on {q.device} as q; got "
            f"{tuple(padding.shape)} on {padding.device}"
        )


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"rope_attention: q, k and v must have one dtype; got {q.dtype}, {k.dtype} and "
            f"{v.dtype}"
        )


def _check_options(
    q: Tensor, theta: float | None, causal: bool, window: int | None, scale: float | None
) -> None:
    if not isinstance(causal, bool):
        raise TypeError(f"rope_attention: causal must be a bool; got {causal!r}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise TypeError(f"rope_attention: window must be a whole number or None; got {window!r}")
    if window is not None and window < 1:
        raise ValueError(f"rope_attention: window must be >= 1; got {window}")
    for name, value in {"theta": theta, "scale": scale}.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"rope_attention: {name} must be a number or None; got {value!r}")
        if not 0 < value < inf:
            raise ValueError(f"rope_attention: {name} must be finite and > 0; got {value}")
    if theta is not None and q.shape[3] % 2:
        raise ValueError(
            f"rope_attention: dim must be even to be rotated (theta=None does not); got "
            f"{q.shape[3]}"
        )


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: float | None,
    causal: bool,
    window: int | None,
    padding: Tensor | None,
    scale: float,
    want_logit: bool,
) -> tuple[Tensor, Tensor | None]:
    given, dtype = q.dtype, _product_dtype(q)
    q, k = _rotated(q, theta, dtype), _rotated(k, theta, dtype)
    out, largest = _attend(q, k, v.to(dtype), causal, window, padding, scale, want_logit)
    return out.to(given), largest


def _product_dtype(q: Tensor) -> torch.dtype:
    short = q.dtype == torch.bfloat16 and q.shape[1] <= LONGEST_WIDENED
    widened = q.device.type == "cpu" and (short or q.dtype == torch.float16)
    return torch.float32 if widened else q.dtype


def _rotated(x: Tensor, theta: float | None, dtype: torch.dtype) -> Tensor:
    if theta is None:
        return x.to(dtype)
    length, dim = x.shape[1], x.shape[3]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = rotary_tables(length, dim, theta, wide, x.device)
    # Both products take x as it is stored and compute in the dtype of the tables.
    return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin).to(dtype)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    padding: Tensor | None,
    scale: float,
    want_logit: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns attention of rotated q and k by the kernels of torch, and the largest logits."""
    # A branch, because the compiler may not yet know what the comparison gives.
    grouped = True if q.shape[2] != k.shape[2] else False
    mask = _mask(q, causal, window, padding)
    plain_causal = causal and mask is None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch, heads, length, dim]
    largest = max_logits(q, k, scale, mask, plain_causal) if want_logit else None
    # Rows that see nothing look at everything, and are set to zero afterwards.
    blind = None if mask is None or padding is None else ~mask.any(-1, keepdim=True)
    # torch has derivatives of all kinds for its plain kernel only.
    with sdpa_kernel(SDPBackend.MATH) if is_transformed() else nullcontext():
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask if mask is None or blind is None else mask | blind,
            is_causal=plain_causal,
            scale=scale,
            enable_gqa=grouped,
        )
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return out.transpose(1, 2).flatten(2), largest


def _mask(q: Tensor, causal: bool, window: int | None, padding: Tensor | None) -> Tensor | None:
    """Returns which keys a query sees, [length, length] or [batch, 1, 1 or length, length]; None
    where the options of torch's kernels say it."""
    length = q.shape[1]
    keys = None if padding is None else padding[:, None, None, :]
    if window is None and not (causal and keys is not None):
        return keys
    reach = length if window is None else window
    pairs = visible_pairs(length, reach, causal, q.device)
    return pairs if keys is None else pairs & keys


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: float | None,
    causal: bool,
    window: int | None,
    padding: Tensor | None,
    scale: float,
    want_logit: bool,
) -> tuple[Tensor, Tensor | None]:
    """One kernel where a head fits one program; else a kernel that rotates, and torch's."""
    from trm_fast.kernels.rope_attention import attend, in_one_program, rotate

    length, dim = q.shape[1], q.shape[3]
    tables = None
    if theta is not None:
        tables = rotary_tables(length, dim, theta, torch.float32, q.device)
    if q.numel() and in_one_program(length, dim, q.dtype):
        out, largest = attend(q, k, v, tables, causal, window, padding, scale, want_logit)
        return out.flatten(2), largest
    if tables is not None:
        q, k = rotate(q, tables), rotate(k, tables)
    return _attend(q, k, v, causal, window, padding, scale, want_logit)


def _refuses(backend: str, call: Call) -> str | None:
    if backend == "triton" and torch.float64 in call.dtypes:
        return "runs float32, bfloat16 and float16; got float64, which runs on the reference"
    return None


def _examples(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Example]:
    """``shape`` is [batch, length, heads, dim], or [length, dim] for two samples and heads."""
    if len(shape) > 2:
        batch, length, heads, dim = (1, *shape)[-4:]
    else:
        (length, dim), batch, heads = (1, 1, *shape)[-2:], 2, 2
    dim += dim % 2
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, batch, length, heads, dim, generator=generator).to(device, dtype)
    padding = torch.ones(batch, length, dtype=torch.bool, device=device)
    padding[:, -1:] = length == 1
    masked = {"causal": True, "window": 5, "padding": padding}
    return {"full": _example(drawn, {}), "masked": _example(drawn, masked)}


def _example(drawn: Tensor, options: dict[str, Any]) -> Example:
    def prepare(
        backend: str, real: torch.dtype | None
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        q, k, v, d_out = drawn.to(real or drawn.dtype).unbind()
        written: dict[str, Tensor] = {}

        def call() -> None:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out, largest = rope_attention(
                *leaves, return_max_logit=True, backend=backend, **options
            )
            grads = torch.autograd.grad(out, leaves, d_out.flatten(2))
            written.update(zip(("d_q", "d_k", "d_v"), grads, strict=True))
            written.update(out=out.detach(), max_logit=largest)

        return call, written

    # q', k', P and d_S are each rounded once, and the logits, at most about 6 here, enlarge the
    # error of q' and k' in P; sums of up to 1000 products in float32 add to it.
    eps = 6 * torch.finfo(drawn.dtype).eps + 32 * torch.finfo(torch.float32).eps
    return Example(prepare, dict.fromkeys(("out", "max_logit", "d_q", "d_k", "d_v"), eps))


_op = Op(
    name="rope_attention",
    implementations={"reference": _reference, "triton": _triton},
    refuses=_refuses,
    examples=_examples,
    order={"cpu": ("reference",), "cuda": ("triton", "reference")},
)
