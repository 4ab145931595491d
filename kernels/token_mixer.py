"""The Triton kernels of token_mixer. The meaning is in trm_fast/ops/token_mixer.py.

A kernel computes gate and up for a tile of inner rows and channels of one sample, the whole length
in one sum, and writes what comes of them; the products that are left are torch's. In the backward
it computes d_act besides, and writes with the samples side by side, so that the gradient of a
weight is one product over all of them.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from trm_fast.kernels._dot import dot

from trm_fast._autograd import once_differentiable

PADDING = 32  # rows of the weights are padded to a multiple: aligned loads without a mask


@triton.jit
def _find_tile(inner, width, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sample, rows and channels of a program; those with the same channels run side by side."""
    program = tl.program_id(0).to(tl.int64)
    down, across = tl.cdiv(inner, BLOCK), tl.cdiv(width, BLOCK_D)
    rows = program % down * BLOCK + tl.arange(0, BLOCK)
    columns = program // down % across * BLOCK_D + tl.arange(0, BLOCK_D)
    return program // down // across, rows, columns


@triton.jit
def _load_weight(weight_ptr, rows, k, inner, padded):
    places = weight_ptr + rows[:, None] * padded + k[None, :]
    return tl.load(places, mask=rows[:, None] < inner, other=0.0)


@triton.jit
def _load_tokens(x_ptr, k, columns, length, width):
    mask = (k[:, None] < length) & (columns[None, :] < width)
    return tl.load(x_ptr + k[:, None] * width + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(out_ptr, stride, rows, columns, value, inner, width):
    mask = (rows[:, None] < inner) & (columns[None, :] < width)
    places = out_ptr + rows[:, None] * stride + columns[None, :]
    tl.store(places, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length", "inner"])
def act_kernel(
    x_ptr, weight_ptr, act_ptr, length, inner, width, padded,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act [batch, inner, width] from the weights [2, inner, padded]."""
    sample, rows, columns = _find_tile(inner, width, BLOCK, BLOCK_D)
    length, width = tl.cast(length, tl.int64), tl.cast(width, tl.int64)
    inner, padded = tl.cast(inner, tl.int64), tl.cast(padded, tl.int64)
    x_ptr += sample * length * width
    gate = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    up = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, padded, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _load_tokens(x_ptr, k, columns, length, width)
        gate = dot(_load_weight(weight_ptr, rows, k, inner, padded), x, gate)
        up = dot(_load_weight(weight_ptr + inner * padded, rows, k, inner, padded), x, up)
    act = gate * tl.sigmoid(gate) * up
    _store(act_ptr + sample * inner * width, width, rows, columns, act, inner, width)


@triton.jit(do_not_specialize=["length", "inner"])
def act_backward_kernel(
    x_ptr, d_out_ptr, weight_ptr, act_ptr, d_gate_up_ptr, batch, length, inner, width, padded,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act [inner, batch, width] and d_gate_up [2 * inner, batch, width] from the weights
    [3, inner, padded], of which the third is that of the way down, transposed."""
    sample, rows, columns = _find_tile(inner, width, BLOCK, BLOCK_D)
    length, width = tl.cast(length, tl.int64), tl.cast(width, tl.int64)
    inner, padded = tl.cast(inner, tl.int64), tl.cast(padded, tl.int64)
    x_ptr += sample * length * width
    d_out_ptr += sample * length * width
    gate = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    up = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    d_act = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, padded, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _load_tokens(x_ptr, k, columns, length, width)
        gate = dot(_load_weight(weight_ptr, rows, k, inner, padded), x, gate)
        up = dot(_load_weight(weight_ptr + inner * padded, rows, k, inner, padded), x, up)
        d_out = _load_tokens(d_out_ptr, k, columns, length, width)
        down = _load_weight(weight_ptr + 2 * inner * padded, rows, k, inner, padded)
        d_act = dot(down, d_out, d_act)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d_act * up * (sigmoid + silu * (1 - sigmoid))
    stride = batch * width
    _store(act_ptr + sample * width, stride, rows, columns, silu * up, inner, width)
    d_gate_up_ptr += sample * width
    _store(d_gate_up_ptr, stride, rows, columns, d_gate, inner, width)
    d_gate_up_ptr += inner * stride
    _store(d_gate_up_ptr, stride, rows, columns, d_act * silu, inner, width)


def token_mixer(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Returns [batch, length, width], differentiable."""
    return _TokenMixer.apply(x.contiguous(), gate_up, down)


class _TokenMixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up, down):
        ctx.save_for_backward(x, gate_up, down)
        batch, length, width = x.shape
        inner = down.shape[1]
        weights = _padded([*gate_up.chunk(2)], x.dtype)
        act = torch.empty(batch, inner, width, dtype=x.dtype, device=x.device)
        _launch(act_kernel, x, act, x, weights, act, length, inner, width, weights.shape[2])
        return torch.bmm(down.to(x.dtype).expand(batch, -1, -1), act)

    @staticmethod
    @once_differentiable("token_mixer")
    def backward(ctx, d_out):
        x, gate_up, down = ctx.saved_tensors
        batch, length, width = x.shape
        inner = down.shape[1]
        weights = _padded([*gate_up.chunk(2), down.mT], x.dtype)
        act, d_gate_up = (
            torch.empty(rows, batch, width, dtype=x.dtype, device=x.device)
            for rows in (inner, 2 * inner)
        )
        d_out = d_out.contiguous()
        # A backward pass runs under the autocast of its caller.
        with torch.autocast(x.device.type, enabled=False):
            _launch(
                act_backward_kernel, x, act, x, d_out, weights, act, d_gate_up, batch, length,
                inner, width, weights.shape[2],
            )  # fmt: skip
            d_x = d_weights = d_down = None
            if ctx.needs_input_grad[0]:
                both = weights[:2].flatten(0, 1)[:, :length]
                d_x = torch.bmm(both.mT.expand(batch, -1, -1), d_gate_up.transpose(0, 1))
            if ctx.needs_input_grad[1]:
                # The transpose of the gradient: rows of an odd length would make it slow to write.
                d_weights = (_by_token(x) @ d_gate_up.flatten(1).mT).mT.to(gate_up.dtype)
            if ctx.needs_input_grad[2]:
                d_down = (_by_token(d_out) @ act.flatten(1).mT).to(down.dtype)
        return d_x, d_weights, d_down


def _padded(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Returns weights [inner, length] one after the other, with zeros up to whole blocks."""
    inner, length = weights[0].shape
    shape = (len(weights), inner, triton.cdiv(length, PADDING) * PADDING)
    padded = torch.zeros(shape, dtype=dtype, device=weights[0].device)
    for target, weight in zip(padded, weights, strict=True):
        target[:, :length] = weight
    return padded


def _by_token(x: Tensor) -> Tensor:
    """Returns x [batch, length, width] as a matrix [length, batch * width]."""
    return x.transpose(0, 1).flatten(1)


def _launch(kernel: Any, x: Tensor, act: Tensor, *arguments: Any) -> None:
    if not act.numel():
        return
    batch, _, width = x.shape
    sizes, options = blocks(x.dtype, width)
    tiles = triton.cdiv(act.numel() // (batch * width), sizes["BLOCK"])
    tiles *= triton.cdiv(width, sizes["BLOCK_D"])
    with _on(x):
        kernel[(batch * tiles,)](*arguments, **sizes, **options)


def _on(x: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device.
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def blocks(dtype: torch.dtype, width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Returns block sizes and launch options: rows, channels, and positions at a time."""
    if dtype == torch.float32:
        sizes = {"BLOCK": 64, "BLOCK_D": 64, "BLOCK_K": 16}
        # 8 warps may have all registers; the assembler would spill a few bytes to need fewer.
        return sizes, {"num_warps": 8, "num_stages": 2, "maxnreg": 255}
    # Without wide loads every element has an address of its own, and the registers hold half.
    sizes = {"BLOCK": 64, "BLOCK_D": 64 if width % 16 else 128, "BLOCK_K": PADDING}
    return sizes, {"num_warps": 8, "num_stages": 3}


def specialisations() -> list[dict[str, Any]]:
    """Returns the kinds of launch that are compiled for every target without a GPU, as a check."""
    kinds = []
    for dtype, aligned in (
        (torch.bfloat16, True),
        (torch.float16, False),
        (torch.float32, True),
        (torch.float32, False),
    ):
        kinds += [_kind(kernel, dtype, aligned) for kernel in (act_kernel, act_backward_kernel)]
    return kinds


def _kind(kernel: Any, dtype: torch.dtype, aligned: bool) -> dict[str, Any]:
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    sizes, options = blocks(dtype, 512 if aligned else 500)
    names = [name for name in kernel.arg_names if name not in sizes]
    pointers = [name for name in names if name.endswith("_ptr")]
    return {
        "kernel": kernel.__name__,
        "signature": {name: element if name in pointers else "i32" for name in names},
        "constants": sizes,
        "options": options,
        "aligned": [*pointers, "padded"] + ["width"] * aligned,
    }
