"""The meaning is in trm_fast/ops/adaptive_step.py.

A program works through one chunk of one tensor. It finds its tensor in a table of addresses on the
device, so that one launch serves all tensors whose dtypes agree. The last program to finish moves
the step counters on, which spares a launch of their own.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from math import inf, log
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from trm_fast.kernels._rows import chunk_size, lay_out

# 8 values per thread and array: two 16-byte loads in flight for each. Also the chunk of a ring
# whose sum is taken anew at once.
BLOCK: tl.constexpr = tl.constexpr(1024)
WARPS = 4
RING_MULTIPLE: tl.constexpr = tl.constexpr(8)  # elements in 16 bytes of bfloat16

# Columns of the table, as in COLUMNS of trm_fast/ops/_adaptive_tensors.py.
PARAM: tl.constexpr = tl.constexpr(0)
GRAD: tl.constexpr = tl.constexpr(1)
EXP_AVG: tl.constexpr = tl.constexpr(2)
EXP_AVG_SQ: tl.constexpr = tl.constexpr(3)
GROK_EXP_AVG: tl.constexpr = tl.constexpr(4)
WEIGHT_EMA: tl.constexpr = tl.constexpr(5)
GROK_RING: tl.constexpr = tl.constexpr(6)
SUMS: tl.constexpr = tl.constexpr(7)
STEP: tl.constexpr = tl.constexpr(8)
GROK_STEP: tl.constexpr = tl.constexpr(9)
SIZE: tl.constexpr = tl.constexpr(10)
WINDOW: tl.constexpr = tl.constexpr(11)
FIRST_DTYPE = 12
WIDTH: tl.constexpr = tl.constexpr(19)

FLOAT32: tl.constexpr = tl.constexpr(0)
BFLOAT16: tl.constexpr = tl.constexpr(1)

# The modes that these kernels know, by the names of the page. A call gives their positions.
RULES = ("adamw", "adam", "atan2", "sgd", "momentum", "filter")
FILTERS = ("none", "ema", "highpass", "projection", "cosine_gate", "ma")
ADAMW: tl.constexpr = tl.constexpr(RULES.index("adamw"))
ADAM: tl.constexpr = tl.constexpr(RULES.index("adam"))
ATAN2: tl.constexpr = tl.constexpr(RULES.index("atan2"))
SGD: tl.constexpr = tl.constexpr(RULES.index("sgd"))
MOMENTUM: tl.constexpr = tl.constexpr(RULES.index("momentum"))
FILTER_ONLY: tl.constexpr = tl.constexpr(RULES.index("filter"))
NO_FILTER: tl.constexpr = tl.constexpr(FILTERS.index("none"))
EMA: tl.constexpr = tl.constexpr(FILTERS.index("ema"))
HIGHPASS: tl.constexpr = tl.constexpr(FILTERS.index("highpass"))
PROJECTION: tl.constexpr = tl.constexpr(FILTERS.index("projection"))
COSINE_GATE: tl.constexpr = tl.constexpr(FILTERS.index("cosine_gate"))
MOVING_AVERAGE: tl.constexpr = tl.constexpr(FILTERS.index("ma"))


class Numbers(NamedTuple):
    """The numbers of a call, by the names of the page; a call gives them in this order."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    alpha: float
    lamb: float
    after_step: float
    maximize: float
    weight_ema: float
    dampening: float
    nesterov: float
    warmup: float
    proj_eps: float


class Plan(NamedTuple):
    """What one tensor needs at one step."""

    t: Any  # this step
    k: Any  # steps that the filter has taken
    filtering: Any
    seeding: Any
    factor: Any  # of the gradient: sign * clip / grad_scale
    alpha: Any
    fresh: Any  # 1 - alpha
    gain: Any  # of the gradient in what the filter gives
    pull: Any  # of the mean, or of the sum of the ring, in it
    beta1: Any
    take1: Any  # share of the gradient in the first moment
    beta2: Any
    keep2: Any  # 1 - beta2
    eps: Any
    l2: Any  # weight decay of "adam" and "sgd"
    decay: Any  # 1 - lr * weight decay of the other rules
    pace: Any  # lr / (1 - beta1^t)
    debias: Any  # 1 / sqrt(1 - beta2^t)
    ema_fresh: Any  # 1 - weight_ema
    size: Any
    window: Any


@triton.jit
def _array(row, COLUMN: tl.constexpr, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """Where an array of a tensor begins; dtypes are in the order of the columns."""
    address = tl.load(row + COLUMN)
    if DTYPES[COLUMN] == FLOAT32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif DTYPES[COLUMN] == BFLOAT16:
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
def _rounded(value, word, SHIFT: tl.constexpr):
    """The bits of bfloat16, rounded stochastically, as uint32."""
    bits = value.to(tl.uint32, bitcast=True) + ((word >> SHIFT) & 0xFFFF)
    return tl.where(value == value, bits >> 16, 0x7FC0).to(tl.uint32)


@triton.jit
def _store_state(pointer, offsets, value, word, SHIFT: tl.constexpr, mask, MASKED: tl.constexpr):
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = _rounded(value, word, SHIFT).to(tl.uint16)
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
def _blend_by_sums(row, k, factor, alpha, fresh, lamb, proj_eps, FILTER: tl.constexpr):
    """Scalars in float64, once per program: what is left when sums cancel counts."""
    sums = tl.load(row + SUMS).to(tl.pointer_type(tl.float64))
    factor, lamb = factor.to(tl.float64), lamb.to(tl.float64)
    # The sums are over the gradient as it is and the mean before this step; both change below.
    alpha = tl.where(k == 0, 0.0, alpha.to(tl.float64))
    fresh = tl.where(k == 0, 1.0, fresh.to(tl.float64))
    dot = tl.load(sums) * factor
    square = tl.load(sums + 1) * factor * factor
    mean_square = alpha * alpha * tl.load(sums + 2) + fresh * fresh * square
    mean_square += 2 * alpha * fresh * dot
    dot = alpha * dot + fresh * square
    if FILTER == PROJECTION:
        gain = 1.0
        pull = tl.where(mean_square > proj_eps, lamb * dot / mean_square, 0.0).to(tl.float32)
    else:
        tl.static_assert(FILTER == COSINE_GATE, "no such filter")
        aligned = dot > 0.5 * tl.sqrt(square * mean_square)
        gain = tl.where(aligned, lamb, 1 / lamb).to(tl.float32)
        pull = 0.0
    return gain, pull


@triton.jit
def _blend(
    row, t, k, window, factor, alpha, fresh, lamb, after_step, proj_eps,
    FILTER: tl.constexpr, WARMUP: tl.constexpr,
):  # fmt: skip
    """What a filter multiplies the gradient by, and its mean or the sum of its ring."""
    if FILTER == PROJECTION or FILTER == COSINE_GATE:
        gain, pull = _blend_by_sums(row, k, factor, alpha, fresh, lamb, proj_eps, FILTER)
    elif FILTER == MOVING_AVERAGE:
        known = tl.minimum(k + 1, window)
        amplified = t > after_step
        if WARMUP:
            amplified = amplified & (known == window)
        gain, pull = 1.0, tl.where(amplified, lamb / known.to(tl.float32), 0.0)
    elif FILTER == HIGHPASS:
        gain, pull = 1 + lamb, -lamb
    else:
        tl.static_assert(FILTER == EMA, "no such filter")
        gain, pull = 1.0, lamb
    return gain, pull


@triton.jit
def _filter_by_mean(g, word, plan, mean_ptr, offsets, mask, MASKED: tl.constexpr):
    if plan.filtering:
        mu = _load(mean_ptr, offsets, mask, MASKED)
        mu = tl.where(plan.seeding, g, plan.alpha * mu + plan.fresh * g)
        _store_state(mean_ptr, offsets, mu, word, 16, mask, MASKED)
        g = plan.gain * g + plan.pull * mu
    return g


@triton.jit
def _filter_by_ring(
    g, word, first, plan, sum_ptr, ring_ptr, offsets, mask, MASKED: tl.constexpr
):  # fmt: skip
    k, window = plan.k, plan.window
    slot = ring_ptr + (k % window).to(tl.int64) * plan.size
    replaced = tl.zeros_like(g)
    total = tl.zeros_like(g)
    if plan.seeding | ((k + 1 + (first // BLOCK).to(tl.int32)) % (2 * window) == 0):
        for age in range(tl.maximum(k + 1 - window, 0), k):
            past = ring_ptr + (age % window).to(tl.int64) * plan.size
            total += _load(past, offsets, mask, MASKED)
    else:
        total = _load(sum_ptr, offsets, mask, MASKED)
        if k >= window:
            replaced = _load(slot, offsets, mask, MASKED)
    fresh = g
    if slot.dtype.element_ty == tl.bfloat16:
        fresh = (_rounded(g, word, 16) << 16).to(tl.float32, bitcast=True)
    total += fresh - replaced
    _store_state(slot, offsets, g, word, 16, mask, MASKED)
    _store(sum_ptr, offsets, total, mask, MASKED)
    # A sum that is withheld may be infinite.
    return tl.where(plan.pull != 0, g + plan.pull * total, g)


@triton.jit
def _step_block(
    row, first, plan, MASKED: tl.constexpr, RULE: tl.constexpr, FILTER: tl.constexpr,
    MOMENT: tl.constexpr, NESTEROV: tl.constexpr, AVERAGE: tl.constexpr, ALIGNED: tl.constexpr,
    DTYPES: tl.constexpr,
):  # fmt: skip
    ADAPTIVE: tl.constexpr = RULE == ADAMW or RULE == ADAM or RULE == ATAN2
    offsets = first + tl.arange(0, BLOCK).to(tl.int64)
    mask = offsets < plan.size
    param_ptr = _array(row, PARAM, DTYPES, ALIGNED)
    grad_ptr = _array(row, GRAD, DTYPES, ALIGNED)
    exp_avg_ptr = _array(row, EXP_AVG, DTYPES, ALIGNED)
    exp_avg_sq_ptr = _array(row, EXP_AVG_SQ, DTYPES, ALIGNED)
    mean_ptr = _array(row, GROK_EXP_AVG, DTYPES, ALIGNED)
    if ADAPTIVE or RULE == SGD:
        p = _load(param_ptr, offsets, mask, MASKED)
        old = p
    g = _load(grad_ptr, offsets, mask, MASKED) * plan.factor
    if MOMENT:
        m = _load(exp_avg_ptr, offsets, mask, MASKED)
    if ADAPTIVE:
        v = _load(exp_avg_sq_ptr, offsets, mask, MASKED)

    word = _random_words(plan.t, offsets, 0)
    if FILTER == MOVING_AVERAGE:
        ring_ptr = _array(row, GROK_RING, DTYPES, ALIGNED)
        g = _filter_by_ring(g, word, first, plan, mean_ptr, ring_ptr, offsets, mask, MASKED)
    elif FILTER != NO_FILTER:
        g = _filter_by_mean(g, word, plan, mean_ptr, offsets, mask, MASKED)

    if RULE == ADAM or RULE == SGD:
        g = g + plan.l2 * p
    if MOMENT and RULE == SGD:
        m = tl.where(plan.t == 1, g, plan.beta1 * m + plan.take1 * g)
    elif MOMENT:
        m = m + plan.take1 * (g - m)
    if RULE == FILTER_ONLY:
        p = g
    elif RULE == MOMENTUM:
        p = g + plan.beta1 * (m - g) if NESTEROV else m
    elif RULE == SGD:
        if MOMENT:
            g = g + plan.beta1 * m if NESTEROV else m
        p = p - plan.pace * g
    else:
        tl.static_assert(ADAPTIVE, "no such rule")
        v = plan.beta2 * v + plan.keep2 * g * g
        vhat = tl.sqrt(v) * plan.debias
        if RULE == ATAN2:
            p = plan.decay * p - plan.pace * _atan2_right(m, vhat)
        else:
            p = plan.decay * p - plan.pace * m / (vhat + plan.eps)

    _store(param_ptr, offsets, p.to(param_ptr.dtype.element_ty), mask, MASKED)
    if MOMENT:
        _store_state(exp_avg_ptr, offsets, m, word, 0, mask, MASKED)
    word = _random_words(plan.t, offsets, 1)
    if ADAPTIVE:
        _store_state(exp_avg_sq_ptr, offsets, v, word, 0, mask, MASKED)
    if AVERAGE:
        ema_ptr = _array(row, WEIGHT_EMA, DTYPES, ALIGNED)
        e = tl.where(plan.t == 1, old, _load(ema_ptr, offsets, mask, MASKED))
        e = e + plan.ema_fresh * (p - e)
        _store_state(ema_ptr, offsets, e, word, 16, mask, MASKED)


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
            if FILTER != MOVING_AVERAGE:
                mask = mask & (t > after_step)
            tl.store(grok_ptr, tl.load(grok_ptr, mask=mask, other=0.0) + 1, mask=mask)


@triton.jit(do_not_specialize=["tensors", "after_step"])
def adaptive_step_kernel(
    table_ptr, owner_ptr, start_ptr, ticket_ptr, tensors, chunk, after_step, sign, lr, beta1, take1,
    log_beta1, beta2, keep2, log_beta2, eps, weight_decay, alpha, fresh, lamb, proj_eps, ema_fresh,
    lr_ptr, weight_decay_ptr, lamb_ptr, grad_scale_ptr, found_inf_ptr, clip_ptr,
    RULE: tl.constexpr, FILTER: tl.constexpr, MOMENT: tl.constexpr, NESTEROV: tl.constexpr,
    WARMUP: tl.constexpr, AVERAGE: tl.constexpr, ALIGNED: tl.constexpr, DTYPES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = table_ptr + tl.load(owner_ptr + program) * WIDTH
    start = tl.multiple_of(tl.load(start_ptr + program), BLOCK)
    size, window = tl.load(row + SIZE), tl.load(row + WINDOW).to(tl.int32)
    if ALIGNED and FILTER == MOVING_AVERAGE:
        size = tl.multiple_of(size, RING_MULTIPLE)
    healthy = True
    if found_inf_ptr is not None:
        healthy = tl.load(found_inf_ptr) == 0

    factor = tl.cast(sign, tl.float32)
    if grad_scale_ptr is not None:
        factor = factor / tl.load(grad_scale_ptr)
    if clip_ptr is not None:
        factor = factor * tl.load(clip_ptr)
    lr, lamb = _value(lr, lr_ptr), _value(lamb, lamb_ptr)
    weight_decay = _value(weight_decay, weight_decay_ptr)
    alpha, fresh = tl.cast(alpha, tl.float32), tl.cast(fresh, tl.float32)

    t = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32))) + 1
    pace, debias, decay = lr, 1.0, 1.0
    if RULE == ADAMW or RULE == ADAM or RULE == ATAN2:
        pace = lr / _one_minus_exp(t * tl.cast(log_beta1, tl.float32))
        debias = 1 / tl.sqrt(_one_minus_exp(t * tl.cast(log_beta2, tl.float32)))
    if RULE == ADAMW or RULE == ATAN2:
        decay = 1 - lr * weight_decay
    k, seeding, gain, pull = 0, False, 1.0, 0.0
    if FILTER != NO_FILTER:
        k = tl.load(tl.load(row + GROK_STEP).to(tl.pointer_type(tl.float32))).to(tl.int32)
        k = tl.maximum(k, 0)  # a negative one would lie before the ring
        seeding = k == 0
        gain, pull = _blend(
            row, t, k, window, factor, alpha, fresh, lamb, after_step, proj_eps, FILTER, WARMUP
        )
    plan = Plan(
        t=t, k=k, filtering=t > after_step, seeding=seeding, factor=factor, alpha=alpha,
        fresh=fresh, gain=gain, pull=pull,
        beta1=tl.cast(beta1, tl.float32), take1=tl.cast(take1, tl.float32),
        beta2=tl.cast(beta2, tl.float32), keep2=tl.cast(keep2, tl.float32),
        eps=tl.cast(eps, tl.float32), l2=weight_decay, decay=decay, pace=pace, debias=debias,
        ema_fresh=tl.cast(ema_fresh, tl.float32), size=size, window=window,
    )  # fmt: skip
    if healthy:
        end = tl.minimum(start + chunk, size)
        for first in range(start, end, BLOCK):
            first = tl.multiple_of(first, BLOCK)
            # Two copies of the body: a mask forbids wide loads, and only the last block needs one.
            if first + BLOCK <= size:
                _step_block(
                    row, first, plan, False,
                    RULE, FILTER, MOMENT, NESTEROV, AVERAGE, ALIGNED, DTYPES,
                )  # fmt: skip
            else:
                _step_block(
                    row, first, plan, True,
                    RULE, FILTER, MOMENT, NESTEROV, AVERAGE, ALIGNED, DTYPES,
                )  # fmt: skip
        # Every warp has read its counters before this program counts as done.
        tl.debug_barrier()
        done = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
        if done == tl.num_programs(0) - 1:
            _count_steps(table_ptr, tensors, after_step, FILTER)
            tl.store(ticket_ptr, 0)


def _has_moment(rule: int, rows: np.ndarray) -> bool:
    """Whether the rule has a first moment; only "sgd" goes by the rows, where empty tensors have
    no address."""
    return rule != FILTER_ONLY.value and (rule != SGD.value or bool(rows[:, EXP_AVG.value].any()))


def adaptive_step_rows_(
    table: Tensor, ticket: Tensor | None, rule: int, filter: int, numbers: Sequence[float],
    lr_at: Tensor | None, weight_decay_at: Tensor | None, lamb_at: Tensor | None,
    grad_scale: Tensor | None, found_inf: Tensor | None, clip: Tensor | None,
) -> None:  # fmt: skip
    """Launches the kernel once for each combination of dtypes among the rows of ``table``.

    Raises:
        ValueError: ``rule`` or ``filter`` is no position in ``RULES`` or ``FILTERS``.
    """
    for kind, number, known in (("rule", rule, RULES), ("filter", filter, FILTERS)):
        if not 0 <= number < len(known):
            raise ValueError(f"adaptive_step: there is no {kind} of number {number}")
    n = Numbers(*numbers)
    if ticket is None:  # the interpreter, on the CPU
        ticket = torch.zeros(1, dtype=torch.int32)
    rows = table.numpy()
    kept_out = n.dampening if rule == SGD.value else n.beta1
    # Triton launches on the current device.
    with torch.cuda.device(ticket.device) if ticket.is_cuda else nullcontext():
        for same, layout in _groups(rows):
            filtered = bool(same[0, GROK_STEP.value] != 0)
            sizes = same[:, SIZE.value]
            chunk = chunk_size(int(sizes.sum()), ticket.device)
            on_device, owner, start = lay_out(same, sizes, chunk, ticket.device)
            adaptive_step_kernel[(len(owner),)](
                on_device, owner, start, ticket, len(same), chunk, int(n.after_step),
                -1.0 if n.maximize else 1.0, n.lr, n.beta1, 1.0 - kept_out, _log(n.beta1),
                n.beta2, 1.0 - n.beta2, _log(n.beta2), n.eps, n.weight_decay,
                n.alpha, 1.0 - n.alpha, n.lamb, n.proj_eps, 1.0 - n.weight_ema,
                lr_at, weight_decay_at, lamb_at, grad_scale, found_inf, clip,
                RULE=rule, FILTER=filter if filtered else NO_FILTER.value,
                MOMENT=_has_moment(rule, same), NESTEROV=bool(n.nesterov),
                WARMUP=bool(n.warmup), AVERAGE=bool(same[:, WEIGHT_EMA.value].any()), **layout,
            )  # fmt: skip


def _groups(rows: np.ndarray) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Yields the rows that one launch serves, and what they have in common."""
    # A slot of a ring is aligned only if all of them are.
    rings = (rows[:, WINDOW.value] == 0) | (rows[:, SIZE.value] % RING_MULTIPLE.value == 0)
    aligned = (rows[:, : SUMS.value] % 16 == 0).all(axis=1) & rings
    kinds = np.column_stack([aligned, rows[:, FIRST_DTYPE:]])
    for kind in np.unique(kinds, axis=0):
        yield rows[(kinds == kind).all(axis=1)], _layout(bool(kind[0]), tuple(kind[1:].tolist()))


def _layout(aligned: bool, dtypes: tuple[int, ...]) -> dict[str, Any]:
    # Without wide loads every value has an address of its own, so a thread gets half as many.
    return {"ALIGNED": aligned, "DTYPES": dtypes, "num_warps": WARPS if aligned else 2 * WARPS}


def _log(beta: float) -> float:
    return log(beta) if beta > 0 else -inf


def specialisations() -> list[dict[str, Any]]:
    """Returns the kinds of launch that are compiled for every target without a GPU, as a check."""
    names = adaptive_step_kernel.arg_names
    pointers = ("table_ptr", "owner_ptr", "start_ptr", "ticket_ptr")
    optional = [name for name in names if name.endswith("_ptr") and name not in pointers]
    flags = ("MOMENT", "NESTEROV", "WARMUP", "AVERAGE")
    types = dict.fromkeys(pointers, "*i64") | {"ticket_ptr": "*i32"}
    types |= dict.fromkeys(("tensors", "chunk", "after_step"), "i32")
    types |= dict.fromkeys(optional, "*fp32")
    plain = (0,) * 7
    launches = []
    for rule, filter, dtypes, aligned, given, *true in (
        # float32 throughout
        ("adamw", "ema", plain, True, False, "MOMENT"),
        # filter and first moment in bfloat16
        ("adamw", "ema", (0, 0, 1, 0, 1, 0, 0), True, True, "MOMENT"),
        # bfloat16 model, float32 states
        ("adam", "highpass", (1, 1, 0, 0, 0, 0, 0), True, True, "MOMENT", "AVERAGE"),
        # float16 model, bfloat16 states, odd addresses
        ("atan2", "ema", (2, 2, 1, 1, 1, 1, 0), False, True, "MOMENT", "AVERAGE"),
        # no filter
        ("atan2", "none", (1, 1, 0, 0, 0, 0, 0), True, False, "MOMENT"),
        # sums over tensors
        ("adamw", "projection", plain, True, True, "MOMENT"),
        ("adam", "cosine_gate", plain, True, False, "MOMENT"),
        # rings
        ("adamw", "ma", plain, True, False, "MOMENT", "WARMUP"),
        ("atan2", "ma", (2, 2, 1, 1, 0, 1, 1), False, True, "MOMENT", "AVERAGE"),
        # the other rules
        ("sgd", "ma", plain, True, False, "MOMENT", "NESTEROV", "AVERAGE"),
        ("sgd", "ema", (1, 1, 0, 0, 1, 0, 0), True, False),
        ("momentum", "ema", (0, 0, 1, 0, 1, 0, 0), True, True, "MOMENT", "NESTEROV"),
        ("filter", "ma", (1, 1, 0, 0, 0, 0, 1), True, False),
    ):
        constants = {"RULE": RULES.index(rule), "FILTER": FILTERS.index(filter)}
        constants |= {name: name in true for name in flags}
        constants |= _layout(aligned, dtypes) | dict.fromkeys(() if given else optional)
        options = {"num_warps": constants.pop("num_warps")}
        launches.append(
            {
                "kernel": "adaptive_step_kernel",
                "signature": {n: types.get(n, "fp32") for n in names if n not in constants},
                "constants": constants,
                "options": options,
                "aligned": [*pointers, "chunk"],
                "float64": filter in ("projection", "cosine_gate"),
            }
        )
    return launches
