"""The Triton kernels of rope_attention. The meaning is in trm_fast/ops/rope_attention.py.

Short lengths: one program has all keys of a head of a sample on the chip, and the backward computes
everything again from q, k and v. Other lengths: a kernel that only rotates. A head is kept as two
halves of its elements, which the rotation mixes pair by pair.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from trm_fast.kernels._dot import dot

from trm_fast._autograd import once_differentiable

# What compiles without spilling registers, by the bytes of an element.
LONGEST, WIDEST = {2: 128, 4: 32}, {2: 64, 4: 32}
QUERIES, BACKWARD_QUERIES = 32, 16  # at a time, at most
ROWS = 16  # heads of tokens that a program of rotate_kernel turns

_COUNTS = ["length", "window", "heads", "group"]


@triton.jit
def _load(pointer, stride, rows, columns, length, END: tl.constexpr):
    mask = (rows[:, None] < length) & (columns[None, :] < END)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, stride, rows, columns, value, length, END: tl.constexpr):
    mask = (rows[:, None] < length) & (columns[None, :] < END)
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + rows[:, None] * stride + columns[None, :], value, mask=mask)


@triton.jit
def _rotated(
    left, right, tables_ptr, positions, columns, length, DIM: tl.constexpr, SIGN: tl.constexpr
):  # fmt: skip
    """Both halves in float32, rotated forwards or, with SIGN -1, back."""
    cos = _load(tables_ptr, DIM, positions, columns, length, DIM // 2)
    tables_ptr += tl.cast(length, tl.int64) * DIM + DIM // 2
    sin = SIGN * _load(tables_ptr, DIM, positions, columns, length, DIM // 2)
    left, right = left.to(tl.float32), right.to(tl.float32)
    return left * cos - right * sin, right * cos + left * sin


@triton.jit
def _load_halves(
    pointer, stride, tables_ptr, rows, length, DIM: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """The two halves of some rows, rotated if there are tables, in the dtype of memory."""
    FIRST: tl.constexpr = (DIM + 1) // 2
    columns = tl.arange(0, HALF).to(tl.int64)
    left = _load(pointer, stride, rows, columns, length, FIRST)
    right = _load(pointer + FIRST, stride, rows, columns, length, DIM - FIRST)
    if tables_ptr is not None:
        left, right = _rotated(left, right, tables_ptr, rows, columns, length, DIM, 1)
    return left.to(pointer.dtype.element_ty), right.to(pointer.dtype.element_ty)


@triton.jit
def _store_halves(
    pointer, stride, tables_ptr, rows, left, right, length, DIM: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Stores the gradients of two halves, rotated back if there are tables."""
    FIRST: tl.constexpr = (DIM + 1) // 2
    columns = tl.arange(0, HALF).to(tl.int64)
    if tables_ptr is not None:
        left, right = _rotated(left, right, tables_ptr, rows, columns, length, DIM, -1)
    _store(pointer, stride, rows, columns, left, length, FIRST)
    _store(pointer + FIRST, stride, rows, columns, right, length, DIM - FIRST)


@triton.jit
def _logits(
    q1, q2, k1, k2, rows, keys, real, length, window, scale, CAUSAL: tl.constexpr
):  # fmt: skip
    """float32 [rows, keys], -inf where a query does not see a key."""
    logits = dot(q2, tl.trans(k2), dot(q1, tl.trans(k1))) * scale
    # Not in 64 bits, as the addresses: that many registers are not there.
    apart = rows.to(tl.int32)[:, None] - keys.to(tl.int32)[None, :]
    seen = real[None, :] & (rows[:, None] < length) & (apart < window)
    if CAUSAL:
        seen = seen & (apart >= 0)
    else:
        seen = seen & (apart > -window)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _real_keys(padding_ptr, batch, keys, length):
    real = keys < length
    if padding_ptr is not None:
        real = tl.load(padding_ptr + batch * length + keys, mask=real, other=0) != 0
    return real


@triton.jit
def _weights(logits):
    """exp(logits - row maximum) and the sum of each row; a row without keys is zeros over 1."""
    largest = tl.max(logits, 1)
    weights = tl.exp(logits - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
    total = tl.sum(weights, 1)
    return weights, tl.where(total == 0, 1.0, total)


@triton.jit
def _largest(logits):
    """The largest of each row, NaN if one is, which tl.max alone would pass over."""
    nan = tl.max((logits != logits).to(tl.int32), 1)
    return tl.where(nan > 0, float("nan"), tl.max(logits, 1))


@triton.jit(do_not_specialize=_COUNTS)
def attend_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, padding_ptr, out_ptr, largest_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    length, window, heads, group, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """One head of one sample, its queries by blocks."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // heads, program % heads
    scale = tl.cast(scale, tl.float32)
    keys = tl.arange(0, BLOCK).to(tl.int64)
    columns = tl.arange(0, 2 * HALF).to(tl.int64)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    out_ptr += (batch * length * heads + head) * DIM
    k1, k2 = _load_halves(k_ptr, k_row, tables_ptr, keys, length, DIM, HALF)
    v = _load(v_ptr, v_row, keys, columns, length, DIM)
    real = _real_keys(padding_ptr, batch, keys, length)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    for block in range(tl.cdiv(length, QUERIES)):
        rows = tl.cast(block, tl.int64) * QUERIES + tl.arange(0, QUERIES)
        q1, q2 = _load_halves(q_ptr, q_row, tables_ptr, rows, length, DIM, HALF)
        logits = _logits(q1, q2, k1, k2, rows, keys, real, length, window, scale, CAUSAL)
        if largest_ptr is not None:
            largest = tl.maximum(largest, _largest(logits), tl.PropagateNan.ALL)
        weights, total = _weights(logits)
        out = dot(weights.to(v.dtype), v) / total[:, None]
        _store(out_ptr, tl.cast(heads, tl.int64) * DIM, rows, columns, out, length, DIM)
    if largest_ptr is not None:
        nan = tl.max((largest != largest).to(tl.int32), 0)
        tl.store(largest_ptr + program, tl.where(nan > 0, float("nan"), tl.max(largest, 0)))


@triton.jit(do_not_specialize=_COUNTS)
def attend_backward_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, padding_ptr, d_out_ptr, d_q_ptr, d_k_ptr, d_v_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    length, window, heads, group, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """One key head of one sample: its query heads, and their rows by blocks, one after another."""
    program = tl.program_id(0).to(tl.int64)
    kv_heads = heads // group
    batch, kv_head = program // kv_heads, program % kv_heads
    scale = tl.cast(scale, tl.float32)
    keys = tl.arange(0, BLOCK).to(tl.int64)
    columns = tl.arange(0, 2 * HALF).to(tl.int64)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    k1, k2 = _load_halves(k_ptr, k_row, tables_ptr, keys, length, DIM, HALF)
    v = _load(v_ptr, v_row, keys, columns, length, DIM)
    real = _real_keys(padding_ptr, batch, keys, length)
    d_k1 = tl.zeros((BLOCK, HALF), tl.float32)
    d_k2 = tl.zeros((BLOCK, HALF), tl.float32)
    d_v = tl.zeros((BLOCK, 2 * HALF), tl.float32)
    blocks = tl.cdiv(length, QUERIES)
    width = tl.cast(heads, tl.int64) * DIM
    for step in range(group * blocks):
        head = kv_head * group + step // blocks
        rows = tl.cast(step % blocks, tl.int64) * QUERIES + tl.arange(0, QUERIES)
        place = (batch * length * heads + head) * DIM
        query_ptr = q_ptr + batch * q_batch + head * q_head
        q1, q2 = _load_halves(query_ptr, q_row, tables_ptr, rows, length, DIM, HALF)
        d_out = _load(d_out_ptr + place, width, rows, columns, length, DIM)
        logits = _logits(q1, q2, k1, k2, rows, keys, real, length, window, scale, CAUSAL)
        weights, total = _weights(logits)
        weights = weights / total[:, None]
        d_v = dot(tl.trans(weights.to(v.dtype)), d_out, d_v)
        d_weights = dot(d_out, tl.trans(v))
        shared = tl.sum(weights * d_weights, 1)
        d_logits = (weights * (d_weights - shared[:, None]) * scale).to(v.dtype)
        d_k1 = dot(tl.trans(d_logits), q1, d_k1)
        d_k2 = dot(tl.trans(d_logits), q2, d_k2)
        d_q1, d_q2 = dot(d_logits, k1), dot(d_logits, k2)
        _store_halves(d_q_ptr + place, width, tables_ptr, rows, d_q1, d_q2, length, DIM, HALF)
    place = (batch * length * kv_heads + kv_head) * DIM
    width = tl.cast(kv_heads, tl.int64) * DIM
    _store_halves(d_k_ptr + place, width, tables_ptr, keys, d_k1, d_k2, length, DIM, HALF)
    _store(d_v_ptr + place, width, keys, columns, d_v, length, DIM)


@triton.jit(do_not_specialize=["rows", "length", "heads"])
def rotate_kernel(
    x_ptr, tables_ptr, out_ptr, x_batch, x_row, x_head, rows, length, heads,
    DIM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """Rotates some of batch * length * heads rows of x [batch, length, heads, DIM]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, HALF).to(tl.int64)
    token, head = row // heads, row % heads
    batch, position = token // length, token % length
    places = batch * x_batch + position * x_row + head * x_head
    mask = (row[:, None] < rows) & (columns[None, :] < DIM // 2)
    x_ptr += places[:, None] + columns[None, :]
    left = tl.load(x_ptr, mask=mask, other=0.0)
    right = tl.load(x_ptr + DIM // 2, mask=mask, other=0.0)
    left, right = _rotated(left, right, tables_ptr, position, columns, length, DIM, SIGN)
    out_ptr += row[:, None] * DIM + columns[None, :]
    tl.store(out_ptr, left.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + DIM // 2, right.to(out_ptr.dtype.element_ty), mask=mask)


def in_one_program(length: int, dim: int, dtype: torch.dtype) -> bool:
    """Returns whether one program does a head of this length and dimension."""
    return length <= LONGEST[dtype.itemsize] and dim <= WIDEST[dtype.itemsize]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor | None,
    causal: bool,
    window: int | None,
    padding: Tensor | None,
    scale: float,
    want_logit: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns attention [batch, length, heads, dim] and the largest logit of each head."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    padding = None if padding is None else padding.contiguous()
    out, largest = _Attend.apply(q, k, v, tables, causal, window, padding, scale, want_logit)
    return out, largest.amax(0) if want_logit else None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tables, causal, window, padding, scale, want_logit):
        ctx.save_for_backward(q, k, v, tables, padding)
        ctx.options = (causal, window, scale)
        batch, length, heads, dim = q.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        sizes, options = launch(length, dim, q.dtype)
        largest = None
        if want_logit:
            largest = torch.empty(batch, heads, dtype=torch.float32, device=q.device)
            ctx.mark_non_differentiable(largest)
        with _on(q):
            attend_kernel[(batch * heads,)](
                q, k, v, tables, padding, out, largest,
                *_numbers(q, k, v, window, scale), CAUSAL=causal, **sizes, **options,
            )  # fmt: skip
        return out, largest

    @staticmethod
    @once_differentiable("rope_attention")
    def backward(ctx, d_out, _):
        q, k, v, tables, padding = ctx.saved_tensors
        causal, window, scale = ctx.options
        d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        sizes, options = launch(q.shape[1], q.shape[3], q.dtype)
        with _on(q):
            attend_backward_kernel[(k.shape[0] * k.shape[2],)](
                q, k, v, tables, padding, d_out.contiguous(), d_q, d_k, d_v,
                *_numbers(q, k, v, window, scale), CAUSAL=causal,
                **sizes | {"QUERIES": BACKWARD_QUERIES}, **options,
            )  # fmt: skip
        return d_q, d_k, d_v, *(None,) * 6


def _numbers(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> list[Any]:
    _, length, heads, _ = q.shape
    strides = [x.stride(i) for x in (q, k, v) for i in range(3)]
    return [*strides, length, window or length, heads, heads // k.shape[2], scale]


def launch(length: int, dim: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Returns sizes of blocks and launch options; the backward takes fewer queries at a time."""
    half = max(16, triton.next_power_of_2((dim + 1) // 2))
    block = max(16, triton.next_power_of_2(length))
    warps = 4 if block <= 64 and dtype.itemsize == 2 else 8
    sizes = {"DIM": dim, "HALF": half, "BLOCK": block, "QUERIES": min(block, QUERIES)}
    return sizes, {"num_warps": warps}


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Returns x [batch, length, heads, dim] rotated."""
    return _Rotate.apply(x, tables)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tables):
        ctx.save_for_backward(tables)
        return _rotate(x, tables, 1)

    @staticmethod
    @once_differentiable("rope_attention")
    def backward(ctx, d_out):
        return _rotate(d_out, *ctx.saved_tensors, -1), None


def _rotate(x: Tensor, tables: Tensor, sign: int) -> Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _, length, heads, dim = x.shape
    rows = x.numel() // dim
    if rows:
        with _on(x):
            rotate_kernel[(triton.cdiv(rows, ROWS),)](
                x, tables, out, *x.stride()[:3], rows, length, heads,
                DIM=dim, HALF=triton.next_power_of_2(dim // 2), ROWS=ROWS, SIGN=sign,
            )  # fmt: skip
    return out


def _on(x: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device.
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def specialisations() -> list[dict[str, Any]]:
    """Returns the kinds of launch that are compiled for every target without a GPU, as a check."""
    plain = ("padding_ptr", "largest_ptr")
    kinds = []
    for length, dim, dtype, causal, absent in (
        (97, 64, torch.bfloat16, False, plain),
        (128, 64, torch.float16, True, ()),
        (81, 33, torch.bfloat16, False, ("tables_ptr",)),
        (64, 64, torch.float16, True, ()),
        (32, 32, torch.float32, True, ()),
        (7, 16, torch.float32, False, plain),
    ):
        blocks, options = launch(length, dim, dtype)
        for kernel in (attend_kernel, attend_backward_kernel):
            constants = blocks | {"CAUSAL": causal}
            constants |= {name: None for name in absent if name in kernel.arg_names}
            if kernel is attend_backward_kernel:
                constants |= {"QUERIES": BACKWARD_QUERIES}
            kinds.append(_kind(kernel, dtype, constants, options))
    for dtype, dim, sign in ((torch.bfloat16, 64, 1), (torch.float32, 128, -1)):
        constants = {"DIM": dim, "HALF": dim // 2, "ROWS": ROWS, "SIGN": sign}
        kinds.append(_kind(rotate_kernel, dtype, constants, {}))
    return kinds


def _kind(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], options: dict[str, int]
) -> dict[str, Any]:
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {"tables_ptr": "*fp32", "largest_ptr": "*fp32", "padding_ptr": "*i1", "scale": "fp32"}
    types |= dict.fromkeys((*_COUNTS, "rows"), "i32")
    names = [name for name in kernel.arg_names if name not in constants]
    strides = [name for name in names if name not in types and not name.endswith("_ptr")]
    types |= dict.fromkeys(strides, "i32")
    even = constants["DIM"] % 16 == 0
    return {
        "kernel": kernel.__name__,
        "signature": {name: types.get(name, element) for name in names},
        "constants": constants,
        "options": options,
        "aligned": [name for name in names if name.endswith("_ptr")] + strides * even,
    }
