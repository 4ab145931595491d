"""The meaning is in trm_fast/ops/stablemax_cross_entropy.py.

A program reduces the logits of some tokens, as many as make a tile with the columns; a larger
vocabulary is walked through in tiles, twice, and its sums are compensated. A second launch adds up
the tokens of each sequence in a fixed order.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a tile: four logits for each thread, with eight some registers spill; a vocabulary that fills a
# tile by itself has less to keep per token.
ELEMENTS, COLUMNS = 512, 1024
TOKENS: tl.constexpr = tl.constexpr(128)  # of a sequence that are added up at once
WARPS = 4


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, where the error of 1 + x is divided out."""
    wide = 1.0 + x
    exact = tl.where(wide == 1.0, x, tl.log(wide) * (x / tl.where(wide == 1.0, 1.0, wide - 1.0)))
    return tl.where(wide < float("inf"), exact, tl.log(wide))


@triton.jit
def _ratio(v, top, STABLEMAX: tl.constexpr):
    """s(v) / s(top) in one division of numbers that are exact where s is not."""
    if STABLEMAX:
        wide = 1.0 + tl.abs(v)
        top_wide = 1.0 + tl.abs(top)
        above = tl.where(top < 0, top_wide, tl.where(v < 0, 1.0, wide))
        below = tl.where(top < 0, wide, tl.where(v < 0, wide * top_wide, top_wide))
        ratio = above / below
    else:
        ratio = tl.exp(v - top)
    return ratio


@triton.jit
def _log_ratio(top, v, STABLEMAX: tl.constexpr):
    """log(s(top) / s(v))"""
    if STABLEMAX:
        wide = 1.0 + tl.abs(v)
        top_wide = 1.0 + tl.abs(top)
        apart = (v < 0) & (top >= 0)
        # Of one sign the quotient cannot overflow; of two the logarithms cannot cancel.
        quotient = tl.maximum(wide, top_wide) / tl.minimum(wide, top_wide)
        log = tl.where(apart, tl.log(wide) + tl.log(top_wide), tl.log(quotient))
    else:
        log = top - v
    return log


@triton.jit
def forward_kernel(
    logits_ptr, labels_ptr, predictions_ptr, others_ptr, losses_ptr,
    tokens, length, vocabulary, stride, ignored,
    STABLEMAX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    known = token < tokens
    row_ptr = logits_ptr + token // length * stride + token % length * vocabulary
    # The best column so far is the first that nothing exceeds, NaN above all.
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    index = tl.full((BLOCK_T,), 0, tl.int32)
    for first in range(0, vocabulary, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        mask = known[:, None] & (column < vocabulary)[None, :]
        v = tl.load(row_ptr[:, None] + column[None, :], mask=mask, other=float("-inf"))
        v = v.to(tl.float32)
        is_nan = v != v
        has_nan = tl.max(is_nan.to(tl.int32), axis=1) > 0
        best = tl.max(tl.where(is_nan, float("-inf"), v), axis=1)
        is_best = tl.where(has_nan[:, None], is_nan, v == best[:, None])
        at = tl.min(tl.where(is_best, column[None, :], vocabulary), axis=1)
        better = (top == top) & (has_nan | (best > top))
        top = tl.where(better, tl.where(has_nan, float("nan"), best), top)
        index = tl.where(better, at, index)

    top = tl.where(known, top, 0.0)
    others = tl.zeros((BLOCK_T,), tl.float32)
    lost = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, vocabulary, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        mask = known[:, None] & (column < vocabulary)[None, :]
        v = tl.load(row_ptr[:, None] + column[None, :], mask=mask, other=float("-inf"))
        ratio = _ratio(v.to(tl.float32), top[:, None], STABLEMAX)
        ratio = tl.where(mask & (column[None, :] != index[:, None]), ratio, 0.0)
        part = tl.sum(ratio, axis=1) - lost
        total = others + part
        lost = (total - others) - part
        others = total

    label = tl.load(labels_ptr + token, mask=known, other=0)
    inside = (label >= 0) & (label < vocabulary)
    others = tl.where(inside, others + (top - top), float("nan"))
    others = tl.where(label == ignored, 0.0, others)
    target = tl.where(inside, label, 0)
    v = tl.load(row_ptr + target, mask=known, other=0.0).to(tl.float32)
    log = tl.where(label == index, 0.0, _log_ratio(top, v, STABLEMAX))
    loss = tl.where(label == ignored, 0.0, tl.where(others == others, log + _log1p(others), others))
    tl.store(predictions_ptr + token, index.to(tl.int64), mask=known)
    tl.store(others_ptr + token, others, mask=known)
    tl.store(losses_ptr + token, loss, mask=known)


@triton.jit
def sequence_kernel(
    losses_ptr, labels_ptr, predictions_ptr, loss_ptr, correct_ptr, valid_ptr, exact_ptr,
    length, ignored,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TOKENS,), tl.float32)
    lost = tl.zeros((TOKENS,), tl.float32)
    right = tl.zeros((TOKENS,), tl.int64)
    counted = tl.zeros((TOKENS,), tl.int64)
    for first in range(0, length, TOKENS):
        token = first + tl.arange(0, TOKENS)
        mask = token < length
        place = sequence * length + token
        part = tl.load(losses_ptr + place, mask=mask, other=0.0) - lost
        label = tl.load(labels_ptr + place, mask=mask, other=0)
        prediction = tl.load(predictions_ptr + place, mask=mask, other=0)
        longer = total + part
        lost = (longer - total) - part
        total = longer
        is_valid = mask & (label != ignored)
        counted += is_valid.to(tl.int64)
        right += (is_valid & (label == prediction)).to(tl.int64)
    valid = tl.sum(counted)
    correct = tl.sum(right)
    tl.store(loss_ptr + sequence, tl.sum(total) / tl.maximum(valid, 1).to(tl.float32))
    tl.store(correct_ptr + sequence, correct)
    tl.store(valid_ptr + sequence, valid)
    tl.store(exact_ptr + sequence, ((valid > 0) & (correct == valid)).to(tl.int8))


@triton.jit
def backward_kernel(
    grad_ptr, logits_ptr, labels_ptr, predictions_ptr, others_ptr, valid_ptr, out_ptr,
    tokens, length, vocabulary, stride, ignored,
    STABLEMAX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    known = token < tokens
    sequence = token // length
    row_ptr = logits_ptr + sequence * stride + token % length * vocabulary
    label = tl.load(labels_ptr + token, mask=known, other=0)
    index = tl.load(predictions_ptr + token, mask=known, other=0)
    others = tl.load(others_ptr + token, mask=known, other=0.0)
    valid = tl.load(valid_ptr + sequence, mask=known, other=1)
    grad = tl.load(grad_ptr + sequence, mask=known, other=0.0)
    grad = grad / tl.maximum(valid, 1).to(tl.float32)
    top = tl.load(row_ptr + index, mask=known, other=0.0).to(tl.float32)
    used = known & (label != ignored)
    for first in range(0, vocabulary, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        inside = column < vocabulary
        mask = used[:, None] & inside[None, :]
        v = tl.load(row_ptr[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        ratio = _ratio(v, top[:, None], STABLEMAX)
        # p - 1 of the label, where p may be 1 but for little; a GPU's x / x need not be 1.
        is_top = (label == index)[:, None]
        missing = tl.where(is_top, -others[:, None], (ratio - 1.0) - others[:, None])
        share = tl.where(column[None, :] == label[:, None], missing, ratio)
        out = (grad / (1.0 + others))[:, None] * share
        if STABLEMAX:
            out = out / (1.0 + tl.abs(v))
        out = tl.where(used[:, None], out, 0.0)
        place = token[:, None] * vocabulary + column[None, :]
        tl.store(out_ptr + place, out, mask=known[:, None] & inside[None, :])


def _tile(vocabulary: int) -> dict[str, int]:
    columns = min(triton.next_power_of_2(vocabulary), COLUMNS)
    return {"BLOCK_T": max(1, ELEMENTS // columns), "BLOCK_V": columns, "num_warps": WARPS}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    # Triton launches on the current device.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def forward(
    logits: Tensor, labels: Tensor, ignore_index: int, stablemax: bool
) -> tuple[Tensor, ...]:
    """Returns loss, predictions, correct, valid, exact and ``others`` of the page."""
    batch, length, vocabulary = logits.shape
    predictions = torch.empty_like(labels)
    others, losses = logits.new_empty((2, batch, length), dtype=torch.float32)
    loss = logits.new_empty(batch, dtype=torch.float32)
    correct, valid = labels.new_empty((2, batch))
    exact = logits.new_empty(batch, dtype=torch.bool)
    tile, tokens = _tile(vocabulary), batch * length
    with _on(logits.device):
        if tokens:
            forward_kernel[(triton.cdiv(tokens, tile["BLOCK_T"]),)](
                logits, labels, predictions, others, losses,
                tokens, length, vocabulary, logits.stride(0), ignore_index,
                STABLEMAX=stablemax, **tile,
            )  # fmt: skip
        if batch:
            sequence_kernel[(batch,)](
                losses, labels, predictions, loss, correct, valid, exact.view(torch.int8),
                length, ignore_index, num_warps=WARPS,
            )  # fmt: skip
    return loss, predictions, correct, valid, exact, others


def backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    predictions: Tensor,
    others: Tensor,
    valid: Tensor,
    ignore_index: int,
    stablemax: bool,
) -> Tensor:
    """Returns the gradient of the logits."""
    batch, length, vocabulary = logits.shape
    out = logits.new_empty(logits.shape)
    tile, tokens = _tile(vocabulary), batch * length
    if tokens:
        with _on(logits.device):
            backward_kernel[(triton.cdiv(tokens, tile["BLOCK_T"]),)](
                grad, logits, labels, predictions, others, valid, out,
                tokens, length, vocabulary, logits.stride(0), ignore_index,
                STABLEMAX=stablemax, **tile,
            )  # fmt: skip
    return out


def specialisations() -> list[dict[str, Any]]:
    """Returns the kinds of launch that are compiled for every target without a GPU, as a check."""
    counts = dict.fromkeys(("labels_ptr", "predictions_ptr", "correct_ptr", "valid_ptr"), "*i64")
    types = counts | {"exact_ptr": "*i8", "stride": "i64"}
    types |= dict.fromkeys(("tokens", "length", "vocabulary", "ignored"), "i32")
    launches = []
    for kernel, dtype, vocabulary, stablemax in (
        (forward_kernel, "*fp32", 11, True),
        (forward_kernel, "*bf16", 6, False),
        (forward_kernel, "*fp16", 50257, True),
        (forward_kernel, "*bf16", 50257, False),
        (sequence_kernel, "*fp32", 11, True),
        (backward_kernel, "*fp32", 11, True),
        (backward_kernel, "*bf16", 6, False),
        (backward_kernel, "*fp16", 50257, True),
        (backward_kernel, "*bf16", 50257, False),
    ):
        tile = _tile(vocabulary) | {"STABLEMAX": stablemax}
        constants = {name: tile[name] for name in kernel.arg_names if name in tile}
        given = types | dict.fromkeys(("logits_ptr", "out_ptr"), dtype)
        names = [name for name in kernel.arg_names if name not in constants]
        launches.append(
            {
                "kernel": kernel.__name__,
                "signature": {name: given.get(name, "*fp32") for name in names},
                "constants": constants,
                "options": {"num_warps": WARPS},
                "aligned": [name for name in names if name.endswith("_ptr")],
            }
        )
    return launches
