"""The meaning is in trm_fast/ops/swiglu.py.

A program computes one tile of gate and the same tile of up from the same tiles of x, so that x is
read once for both and neither is written. Backward does so again, and makes of the tile of d_act
those of d_gate, d_up and act. All other products, with ``down`` and of gradients, are left to the
library.

Products accumulate in float32. float32 operands are multiplied as such, never as TF32.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from trm_fast.kernels._dot import dot


@triton.jit
def _tile_of_program(inner, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Indices of the rows and columns of a program; neighbours share their rows of x."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(inner, COLS)
    row = program // across
    i = row * ROWS + tl.arange(0, ROWS)
    return i, (program - row * across) * COLS + tl.arange(0, COLS)


@triton.jit
def _gate_and_up(
    x_ptr, gate_up_ptr, i, j, rows, width, inner,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    gate, up = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    # Indices behind the end are those of other rows, whose products nobody stores.
    i, j = i % rows, j % inner
    k = tl.arange(0, DEPTH).to(tl.int64)
    x_ptrs = x_ptr + i[:, None] * width + k[None, :]
    gate_ptrs = gate_up_ptr + j[None, :] * width + k[:, None]
    up_ptrs = gate_up_ptr + (inner + j)[None, :] * width + k[:, None]
    for _ in range(0, width, DEPTH):
        x, g, u = tl.load(x_ptrs), tl.load(gate_ptrs), tl.load(up_ptrs)
        gate, up = dot(x, g, gate), dot(x, u, up)
        x_ptrs += DEPTH
        gate_ptrs += DEPTH
        up_ptrs += DEPTH
    return gate, up


@triton.jit
def forward_kernel(
    x_ptr, gate_up_ptr, act_ptr, rows, width, inner,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    i, j = _tile_of_program(inner, ROWS, COLS)
    gate, up = _gate_and_up(x_ptr, gate_up_ptr, i, j, rows, width, inner, ROWS, COLS, DEPTH)
    act = gate * tl.sigmoid(gate) * up
    mask = (i[:, None] < rows) & (j[None, :] < inner)
    tl.store(act_ptr + i[:, None] * inner + j[None, :], act.to(act_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x_ptr, gate_up_ptr, dact_ptr, grads_ptr, act_ptr, rows, width, inner,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    i, j = _tile_of_program(inner, ROWS, COLS)
    gate, up = _gate_and_up(x_ptr, gate_up_ptr, i, j, rows, width, inner, ROWS, COLS, DEPTH)
    mask = (i[:, None] < rows) & (j[None, :] < inner)
    places = i[:, None] * inner + j[None, :]
    dact = tl.load(dact_ptr + places, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dtype = act_ptr.dtype.element_ty
    tl.store(act_ptr + places, (silu * up).to(dtype), mask=mask)
    places += i[:, None] * inner  # a row of grads holds both
    dgate = dact * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(grads_ptr + places, dgate.to(dtype), mask=mask)
    tl.store(grads_ptr + places + inner, (dact * silu).to(dtype), mask=mask)


def forward(x: Tensor, gate_up: Tensor) -> Tensor:
    """Returns ``silu(x Wg^T) * (x Wu^T)``."""
    rows, inner = x.size(0), gate_up.size(0) // 2
    act = torch.empty((rows, inner), dtype=x.dtype, device=x.device)
    blocks, options = blocks_of(x.dtype, inner)
    x, gate_up = _padded(x, blocks["DEPTH"]), _padded(gate_up, blocks["DEPTH"])
    with _on(x):
        forward_kernel[_grid(rows, inner, blocks)](
            x, gate_up, act, rows, x.size(1), inner, **blocks, **options
        )
    return act


def backward(x: Tensor, gate_up: Tensor, dact: Tensor) -> tuple[Tensor, Tensor]:
    """Returns d_gate and d_up side by side, and ``silu(x Wg^T) * (x Wu^T)``."""
    rows, inner = dact.shape
    act = torch.empty_like(dact)
    grads = torch.empty((rows, 2 * inner), dtype=x.dtype, device=x.device)
    blocks, options = blocks_of(x.dtype, inner)
    x, gate_up = _padded(x, blocks["DEPTH"]), _padded(gate_up, blocks["DEPTH"])
    with _on(x):
        backward_kernel[_grid(rows, inner, blocks)](
            x, gate_up, dact, grads, act, rows, x.size(1), inner, **blocks, **options
        )
    return grads, act


def _padded(matrix: Tensor, depth: int) -> Tensor:
    """Returns the matrix with zeros behind each row, up to whole blocks: rows that begin anywhere
    cannot be loaded in vectors, and the kernel would spill."""
    missing = -matrix.size(1) % depth
    return torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _grid(rows: int, inner: int, blocks: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, blocks["ROWS"]) * triton.cdiv(inner, blocks["COLS"]),)


def blocks_of(dtype: torch.dtype, inner: int) -> tuple[dict[str, int], dict[str, int]]:
    """Returns block sizes and launch options: the largest tiles that spill on no GPU."""
    if dtype == torch.float32:
        # 8 warps may have all registers; the assembler would spill a few bytes to make room.
        options = {"num_warps": 8, "num_stages": 2, "maxnreg": 255}
        return {"ROWS": 64, "COLS": 32, "DEPTH": 32}, options
    cols = 64 if inner % 16 == 0 else 32  # where rows begin anywhere, addresses take registers
    return {"ROWS": 128, "COLS": cols, "DEPTH": 64}, {"num_warps": 8, "num_stages": 3}


def specialisations() -> list[dict[str, Any]]:
    """Returns the kinds of launch that are compiled for every target without a GPU, as a check."""
    kinds = []
    for dtype, element in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        for kernel in (forward_kernel, backward_kernel):
            for inner in (1536, 97):
                blocks, options = blocks_of(dtype, inner)
                names = [name for name in kernel.arg_names if name not in blocks]
                pointers = [name for name in names if name.endswith("_ptr")]
                kinds.append(
                    {
                        "kernel": kernel.__name__,
                        "signature": dict.fromkeys(names, "i32") | dict.fromkeys(pointers, element),
                        "constants": blocks,
                        "options": options,
                        "aligned": [*pointers, "width", *(["inner"] if inner % 16 == 0 else [])],
                    }
                )
    return kinds
