"""The meaning is in trm_fast/ops/adaptive_step.py.

A program works through one chunk of one tensor. It finds its tensor in a table of addresses on the
device, so that one launch serves all tensors whose dtypes agree. The last program to finish moves
the step counters on, which spares a launch of their own.
"""

from contextlib import nullcontext
from math import inf, log
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # 8 values per thread and array: two 16-byte loads in flight for each
WARPS = 4
SMALLEST_CHUNK, LARGEST_CHUNK = 1024, 65536
CHUNKS_PER_PROCESSOR = (
    8  # enough to even out the load, few enough to share the look-up of addresses
)

# Columns of the table, as in COLUMNS of trm_fast/ops/_adaptive_tensors.py.
PARAM: tl.constexpr = tl.constexpr(0)
GRAD: tl.constexpr = tl.constexpr(1)
EXP_AVG: tl.constexpr = tl.constexpr(2)
EXP_AVG_SQ: tl.constexpr = tl.constexpr(3)
GROK_EXP_AVG: tl.constexpr = tl.constexpr(4)
WEIGHT_EMA: tl.constexpr = tl.constexpr(5)
STEP: tl.constexpr = tl.constexpr(6)
GROK_STEP: tl.constexpr = tl.constexpr(7)
SIZE: tl.constexpr = tl.constexpr(8)
FIRST_DTYPE = 9
WIDTH: tl.constexpr = tl.constexpr(15)

FLOAT32: tl.constexpr = tl.constexpr(0)
BFLOAT16: tl.constexpr = tl.constexpr(1)
ADAM: tl.constexpr = tl.constexpr(1)
ATAN2: tl.constexpr = tl.constexpr(2)
NO_FILTER: tl.constexpr = tl.constexpr(0)
EMA: tl.constexpr = tl.constexpr(1)


@triton.jit
def _pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(row + COLUMN)
    if DTYPE == FLOAT32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == BFLOAT16:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, offsets, mask, MASKED: tl.constexpr):
    if MASKED:
        value = tl.load(pointer + offsets, mask=mask, other=0.0)
    else:
        value = tl.load(pointer + offsets)
    return value.to(tl.float32)


@triton.jit
def _store(pointer, offsets, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offsets, value, mask=mask)
    else:
        tl.store(pointer + offsets, value)


@triton.jit
def _store_state(
    pointer,
    offsets,
    value,
    word,
    SHIFT: tl.constexpr,
    mask,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    if DTYPE == BFLOAT16:
        bits = value.to(tl.uint32, bitcast=True) + ((word >> SHIFT) & 0xFFFF)
        bits = tl.where(value == value, bits >> 16, 0x7FC0).to(tl.uint16)
        _store(pointer.to(tl.pointer_type(tl.uint16)), offsets, bits, mask, MASKED)
    else:
        _store(pointer, offsets, value, mask, MASKED)


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _random_words(t, offsets, LANE: tl.constexpr):
    high = (offsets >> 32).to(tl.uint32)
    key = _mix(t.to(tl.int32).to(tl.uint32) + 0x9E3779B9 * (2 * high + LANE))
    return _mix(key ^ offsets.to(tl.uint32))


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation; at -0.5 the next term is 5e-9 of the sum."""
    tail = 1 + x * 0.14285714 * (1 + x * 0.125)
    tail = 1 + x * 0.25 * (1 + x * 0.2 * (1 + x * 0.16666667 * tail))
    series = -x * (1 + x * 0.5 * (1 + x * 0.33333333 * tail))
    return tl.where(x > -0.5, series, 1 - tl.exp(x))


@triton.jit
def _atan2_right(y, x):
    """atan2(y, x) for x >= 0; the polynomial is that of csrc/adaptive_step/math.h."""
    tall = tl.abs(y)
    small, large = tl.where(tall < x, tall, x), tl.where(tall < x, x, tall)
    diagonal = tl.where(large > 0, 1.0, 0.0)  # also where both are infinite
    r = tl.where(small == large, diagonal, small / tl.where(small == large, 1.0, large))
    z = r * r
    total = 0.002849886892 * z - 0.01606861502
    total = total * z + 0.04269149154
    total = total * z - 0.07504291832
    total = total * z + 0.1064093262
    total = total * z - 0.1420364380
    total = total * z + 0.1999261975
    total = total * z - 0.3333307207
    total = total * z * r + r
    angle = tl.where(tall > x, 1.57079633 - total, total)
    return tl.where(y < 0, -angle, angle)


@triton.jit
def _value(number, pointer):
    """A scalar of the call, from memory where the host must not know it."""
    if pointer is None:
        value = tl.cast(number, tl.float32)
    else:
        value = tl.load(pointer)
    return value


@triton.jit
def _step_block(
    row, offsets, mask, t, filtering, seeding, factor, alpha, fresh, lamb, keep1, beta2, keep2, eps,
    l2, decay, pace, debias, ema_fresh,
    RULE: tl.constexpr, FILTER: tl.constexpr, AVERAGE: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr, PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    EXP_AVG_DTYPE: tl.constexpr, EXP_AVG_SQ_DTYPE: tl.constexpr, GROK_EXP_AVG_DTYPE: tl.constexpr,
    WEIGHT_EMA_DTYPE: tl.constexpr,
):  # fmt: skip
    param_ptr = _pointer(row, PARAM, PARAM_DTYPE, ALIGNED)
    grad_ptr = _pointer(row, GRAD, GRAD_DTYPE, ALIGNED)
    exp_avg_ptr = _pointer(row, EXP_AVG, EXP_AVG_DTYPE, ALIGNED)
    exp_avg_sq_ptr = _pointer(row, EXP_AVG_SQ, EXP_AVG_SQ_DTYPE, ALIGNED)
    p = _load(param_ptr, offsets, mask, MASKED)
    g = _load(grad_ptr, offsets, mask, MASKED) * factor
    m = _load(exp_avg_ptr, offsets, mask, MASKED)
    v = _load(exp_avg_sq_ptr, offsets, mask, MASKED)
    word = _random_words(t, offsets, 0)

    if FILTER != NO_FILTER:
        if filtering:
            grok_ptr = _pointer(row, GROK_EXP_AVG, GROK_EXP_AVG_DTYPE, ALIGNED)
            mu = _load(grok_ptr, offsets, mask, MASKED)
            mu = tl.where(seeding, g, alpha * mu + fresh * g)
            _store_state(grok_ptr, offsets, mu, word, 16, mask, MASKED, GROK_EXP_AVG_DTYPE)
            g = g + lamb * (mu if FILTER == EMA else g - mu)
    if RULE == ADAM:
        g = g + l2 * p
    m = m + keep1 * (g - m)
    v = beta2 * v + keep2 * g * g
    vhat = tl.sqrt(v) * debias
    old = p
    if RULE == ATAN2:
        p = decay * p - pace * _atan2_right(m, vhat)
    else:
        p = decay * p - pace * m / (vhat + eps)

    _store(param_ptr, offsets, p.to(param_ptr.dtype.element_ty), mask, MASKED)
    _store_state(exp_avg_ptr, offsets, m, word, 0, mask, MASKED, EXP_AVG_DTYPE)
    word = _random_words(t, offsets, 1)
    _store_state(exp_avg_sq_ptr, offsets, v, word, 0, mask, MASKED, EXP_AVG_SQ_DTYPE)
    if AVERAGE:
        ema_ptr = _pointer(row, WEIGHT_EMA, WEIGHT_EMA_DTYPE, ALIGNED)
        e = tl.where(t == 1, old, _load(ema_ptr, offsets, mask, MASKED))
        e = e + ema_fresh * (p - e)
        _store_state(ema_ptr, offsets, e, word, 16, mask, MASKED, WEIGHT_EMA_DTYPE)


@triton.jit
def _count_steps(table_ptr, tensors, after_step, FILTER: tl.constexpr):
    for first in range(0, tensors, 128):
        index = first + tl.arange(0, 128)
        mask = index < tensors
        row = table_ptr + index.to(tl.int64) * WIDTH
        step_ptr = tl.load(row + STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        t = tl.load(step_ptr, mask=mask, other=0.0) + 1
        tl.store(step_ptr, t, mask=mask)
        if FILTER != NO_FILTER:
            grok_ptr = tl.load(row + GROK_STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
            mask = mask & (t > after_step)
            tl.store(grok_ptr, tl.load(grok_ptr, mask=mask, other=0.0) + 1, mask=mask)


@triton.jit(do_not_specialize=["tensors", "programs", "after_step"])
def adaptive_step_kernel(
    table_ptr, owner_ptr, start_ptr, ticket_ptr, tensors, programs, chunk, after_step, sign, lr,
    log_beta1, keep1, beta2, log_beta2, keep2, eps, weight_decay, alpha, fresh, lamb, ema_fresh,
    lr_ptr, weight_decay_ptr, lamb_ptr, grad_scale_ptr, found_inf_ptr, clip_ptr,
    RULE: tl.constexpr, FILTER: tl.constexpr, AVERAGE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    EXP_AVG_DTYPE: tl.constexpr, EXP_AVG_SQ_DTYPE: tl.constexpr, GROK_EXP_AVG_DTYPE: tl.constexpr,
    WEIGHT_EMA_DTYPE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = table_ptr + tl.load(owner_ptr + program) * WIDTH
    start = tl.multiple_of(tl.load(start_ptr + program), BLOCK)
    size = tl.load(row + SIZE)
    healthy = True
    if found_inf_ptr is not None:
        healthy = tl.load(found_inf_ptr) == 0

    factor = tl.cast(sign, tl.float32)
    if grad_scale_ptr is not None:
        factor = factor / tl.load(grad_scale_ptr)
    if clip_ptr is not None:
        factor = factor * tl.load(clip_ptr)
    lr = _value(lr, lr_ptr)
    weight_decay = _value(weight_decay, weight_decay_ptr)
    lamb = _value(lamb, lamb_ptr)
    alpha, fresh = tl.cast(alpha, tl.float32), tl.cast(fresh, tl.float32)
    keep1, keep2 = tl.cast(keep1, tl.float32), tl.cast(keep2, tl.float32)
    beta2, eps = tl.cast(beta2, tl.float32), tl.cast(eps, tl.float32)
    ema_fresh = tl.cast(ema_fresh, tl.float32)

    t = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32))) + 1
    pace = lr / _one_minus_exp(t * tl.cast(log_beta1, tl.float32))
    debias = 1 / tl.sqrt(_one_minus_exp(t * tl.cast(log_beta2, tl.float32)))
    decay = 1 - lr * weight_decay
    if RULE == ADAM:
        decay = 1.0
    filtering = t > after_step
    seeding = False
    if FILTER != NO_FILTER:
        seeding = tl.load(tl.load(row + GROK_STEP).to(tl.pointer_type(tl.float32))) == 0

    if healthy:
        end = tl.minimum(start + chunk, size)
        for first in range(start, end, BLOCK):
            first = tl.multiple_of(first, BLOCK)
            offsets = first + tl.arange(0, BLOCK).to(tl.int64)
            # Two copies of the body: a mask forbids wide loads, and only the last block needs one.
            if first + BLOCK <= size:
                _step_block(
                    row, offsets, offsets < size, t, filtering, seeding, factor, alpha, fresh, lamb,
                    keep1, beta2, keep2, eps, weight_decay, decay, pace, debias, ema_fresh, RULE,
                    FILTER, AVERAGE, ALIGNED, False, PARAM_DTYPE, GRAD_DTYPE, EXP_AVG_DTYPE,
                    EXP_AVG_SQ_DTYPE, GROK_EXP_AVG_DTYPE, WEIGHT_EMA_DTYPE,
                )  # fmt: skip
            else:
                _step_block(
                    row, offsets, offsets < size, t, filtering, seeding, factor, alpha, fresh, lamb,
                    keep1, beta2, keep2, eps, weight_decay, decay, pace, debias, ema_fresh, RULE,
                    FILTER, AVERAGE, ALIGNED, True, PARAM_DTYPE, GRAD_DTYPE, EXP_AVG_DTYPE,
                    EXP_AVG_SQ_DTYPE, GROK_EXP_AVG_DTYPE, WEIGHT_EMA_DTYPE,
                )  # fmt: skip
        # Every warp has read its counters before this program counts as done.
        tl.debug_barrier()
        done = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
        if done == programs - 1:
            _count_steps(table_ptr, tensors, after_step, FILTER)
            tl.store(ticket_ptr, 0)


def adaptive_step_rows_(
    table: Tensor, ticket: Tensor | None, rule: int, filter: int, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, alpha: float, lamb: float, after_step: int,
    maximize: bool, weight_ema: float, lr_at: Tensor | None, weight_decay_at: Tensor | None,
    lamb_at: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None,
    clip: Tensor | None,
) -> None:  # fmt: skip
    """Launches the kernel once for each combination of dtypes among the rows of ``table``."""
    if ticket is None:  # the interpreter, on the CPU
        ticket = torch.zeros(1, dtype=torch.int32)
    rows = table.numpy()
    # Triton launches on the current device.
    with torch.cuda.device(ticket.device) if ticket.is_cuda else nullcontext():
        for dtypes in np.unique(rows[:, FIRST_DTYPE:], axis=0):
            same = rows[(rows[:, FIRST_DTYPE:] == dtypes).all(axis=1)]
            filtered = bool(same[0, GROK_STEP.value] != 0)
            chunk = chunk_size(int(same[:, SIZE.value].sum()), _processors(ticket.device))
            on_device, programs = _upload(same, chunk, ticket.device)
            tensors = len(same)
            owners = on_device[tensors * WIDTH.value :]
            adaptive_step_kernel[(programs,)](
                on_device, owners, owners[programs:], ticket, tensors, programs, chunk, after_step,
                -1.0 if maximize else 1.0, lr, _log(beta1), 1.0 - beta1, beta2, _log(beta2),
                1.0 - beta2, eps, weight_decay, alpha, 1.0 - alpha, lamb, 1.0 - weight_ema,
                lr_at, weight_decay_at, lamb_at, grad_scale, found_inf, clip,
                RULE=rule, FILTER=filter if filtered else 0,
                AVERAGE=bool(same[:, WEIGHT_EMA.value].any()),
                ALIGNED=bool((same[:, : STEP.value] % 16 == 0).all()), BLOCK=BLOCK,
                **dict(zip(_DTYPES, dtypes.tolist(), strict=True)), num_warps=WARPS,
            )  # fmt: skip


_DTYPES = (
    "PARAM_DTYPE", "GRAD_DTYPE", "EXP_AVG_DTYPE", "EXP_AVG_SQ_DTYPE", "GROK_EXP_AVG_DTYPE",
    "WEIGHT_EMA_DTYPE",
)  # fmt: skip


def _log(beta: float) -> float:
    return log(beta) if beta > 0 else -inf


def chunk_size(elements: int, processors: int) -> int:
    """Returns the elements per program, a power of two that gives each processor several."""
    wanted = triton.next_power_of_2(max(1, elements // (CHUNKS_PER_PROCESSOR * processors)))
    return min(max(wanted, SMALLEST_CHUNK), LARGEST_CHUNK)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


_uploaded: dict[tuple[Any, ...], Tensor] = {}
_MOST_UPLOADED = 64  # tables of about 12 KB; gradients that move give a new one
_spare: dict[int, Tensor] = {}  # pinned memory by size: none can be had during a capture
_captured: list[Tensor] = []  # a CUDA graph copies its table again, and reads it, at each replay


def _upload(rows: np.ndarray, chunk: int, device: torch.device) -> tuple[Tensor, int]:
    """Returns one int64 tensor of the rows, the row of each program and its first element, and the
    number of programs."""
    # An empty tensor gets a program too, because its step counts.
    programs_of = np.maximum(1, -(-rows[:, SIZE.value] // chunk))
    programs = int(programs_of.sum())
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        host = _spare.pop(rows.size + 2 * programs, None)
        packed = _pack(rows, chunk, programs_of)
        host = packed.pin_memory() if host is None else host.copy_(packed)
        _captured.extend((host, host.to(device, non_blocking=True)))
        return _captured[-1], programs
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, chunk, rows.tobytes())
    if key not in _uploaded:
        packed = _pack(rows, chunk, programs_of)
        if len(_uploaded) >= _MOST_UPLOADED:
            _uploaded.clear()
        if device.type == "cuda":
            _spare.setdefault(packed.numel(), torch.empty_like(packed).pin_memory())
            packed = packed.pin_memory().to(device, non_blocking=True)
        _uploaded[key] = packed
    return _uploaded[key], programs


def _pack(rows: np.ndarray, chunk: int, programs_of: np.ndarray) -> Tensor:
    owner = np.repeat(np.arange(len(rows)), programs_of)
    first = np.repeat(np.cumsum(programs_of) - programs_of, programs_of)
    start = (np.arange(len(owner)) - first) * chunk
    return torch.from_numpy(np.concatenate([rows.ravel(), owner, start]).astype(np.int64))


def specialisations() -> list[dict[str, Any]]:
    """Returns the kinds of launch that are compiled for every target without a GPU, as a check."""
    pointers = ("table_ptr", "owner_ptr", "start_ptr", "ticket_ptr")
    integers = ("tensors", "programs", "chunk", "after_step")
    optional = (
        "lr_ptr", "weight_decay_ptr", "lamb_ptr", "grad_scale_ptr", "found_inf_ptr", "clip_ptr",
    )  # fmt: skip
    signature = dict.fromkeys(pointers, "*i64") | dict.fromkeys(integers, "i32")
    signature |= {"ticket_ptr": "*i32"}
    constexprs = ("RULE", "FILTER", "AVERAGE", "ALIGNED", "BLOCK", *_DTYPES)
    scalars = [
        name
        for name in adaptive_step_kernel.arg_names
        if name not in (*signature, *optional, *constexprs)
    ]
    signature |= dict.fromkeys(scalars, "fp32")
    kinds = []
    for rule, filter, average, aligned, given, *dtypes in (
        # float32 throughout
        (0, 1, False, True, False, 0, 0, 0, 0, 0, 0),
        # filter and first moment in bfloat16
        (0, 1, False, True, True, 0, 0, 1, 0, 1, 0),
        # bfloat16 model, float32 states
        (1, 2, True, True, True, 1, 1, 0, 0, 0, 0),
        # float16 model, bfloat16 states, odd addresses
        (2, 1, True, False, True, 2, 2, 1, 1, 1, 1),
        # no filter
        (2, 0, False, True, False, 1, 1, 0, 0, 0, 0),
    ):
        present = dict.fromkeys(optional, "*fp32") if given else {}
        constants = dict.fromkeys(() if given else optional)
        constants |= dict(
            zip(constexprs, (rule, filter, average, aligned, BLOCK, *dtypes), strict=True)
        )
        kinds.append(
            {
                "signature": signature | present,
                "constants": constants,
                "options": {"num_warps": WARPS},
                "aligned": [*pointers, "chunk"],
            }
        )
    return kinds
