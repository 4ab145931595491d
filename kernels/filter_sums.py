"""The meaning is in trm_fast/ops/filter_sums.py.

A program adds up one chunk of one tensor, which it finds in a table of addresses on the device; a
second launch adds up the chunks of each tensor.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from trm_fast.kernels._rows import lay_out, programs_of

BLOCK: tl.constexpr = tl.constexpr(1024)  # two 16-byte loads of float32 per thread and array
# The same for every call, so that the sums of a tensor depend on nothing else; it is CHUNK of
# trm_fast/ops/filter_sums.py.
CHUNK: tl.constexpr = tl.constexpr(4096)
WARPS = 4
PARTS: tl.constexpr = tl.constexpr(128)  # one for each thread

# Columns of the table, as in COLUMNS of trm_fast/ops/filter_sums.py, but for the last one.
GRAD: tl.constexpr = tl.constexpr(0)
MEAN: tl.constexpr = tl.constexpr(1)
SUMS: tl.constexpr = tl.constexpr(2)
SIZE: tl.constexpr = tl.constexpr(3)
FIRST: tl.constexpr = tl.constexpr(4)  # number of programs before those of this tensor
FIRST_DTYPE = 4  # of the table that comes in
WIDTH: tl.constexpr = tl.constexpr(5)

FLOAT32: tl.constexpr = tl.constexpr(0)
BFLOAT16: tl.constexpr = tl.constexpr(1)


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
def _load(pointer, offsets, size, MASKED: tl.constexpr):
    if MASKED:
        value = tl.load(pointer + offsets, mask=offsets < size, other=0.0)
    else:
        value = tl.load(pointer + offsets)
    return value.to(tl.float32)


@triton.jit
def _add_block(
    dot, square, mean_square, grad_ptr, mean_ptr, first, size,
    MEANS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offsets = first + tl.arange(0, BLOCK).to(tl.int64)
    g = _load(grad_ptr, offsets, size, MASKED)
    square += g * g
    if MEANS:
        mu = _load(mean_ptr, offsets, size, MASKED)
        dot += g * mu
        mean_square += mu * mu
    return dot, square, mean_square


@triton.jit
def filter_sums_kernel(
    table_ptr, owner_ptr, start_ptr, parts_ptr,
    MEANS: tl.constexpr, ALIGNED: tl.constexpr, GRAD_DTYPE: tl.constexpr, MEAN_DTYPE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = table_ptr + tl.load(owner_ptr + program) * WIDTH
    start = tl.multiple_of(tl.load(start_ptr + program), BLOCK)
    size = tl.load(row + SIZE)
    grad_ptr = _pointer(row, GRAD, GRAD_DTYPE, ALIGNED)
    mean_ptr = _pointer(row, MEAN, MEAN_DTYPE, ALIGNED)
    dot = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    mean_square = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, tl.minimum(start + CHUNK, size), BLOCK):
        first = tl.multiple_of(first, BLOCK)
        # Two copies of the body: a mask forbids wide loads, and only the last block needs one.
        if first + BLOCK <= size:
            dot, square, mean_square = _add_block(
                dot, square, mean_square, grad_ptr, mean_ptr, first, size, MEANS, False
            )
        else:
            dot, square, mean_square = _add_block(
                dot, square, mean_square, grad_ptr, mean_ptr, first, size, MEANS, True
            )
    part_ptr = parts_ptr + 3 * program
    tl.store(part_ptr, tl.sum(dot.to(tl.float64)))
    tl.store(part_ptr + 1, tl.sum(square.to(tl.float64)))
    tl.store(part_ptr + 2, tl.sum(mean_square.to(tl.float64)))


@triton.jit
def combine_kernel(table_ptr, parts_ptr):
    """Adds up the parts of one tensor."""
    row = table_ptr + tl.program_id(0).to(tl.int64) * WIDTH
    first_ptr = parts_ptr + 3 * tl.load(row + FIRST)
    parts = tl.maximum(tl.cdiv(tl.load(row + SIZE), CHUNK), 1)
    dot = tl.zeros((PARTS,), tl.float64)
    square = tl.zeros((PARTS,), tl.float64)
    mean_square = tl.zeros((PARTS,), tl.float64)
    for first in range(0, parts, PARTS):
        index = first + tl.arange(0, PARTS).to(tl.int64)
        part_ptr = first_ptr + 3 * index
        dot += tl.load(part_ptr, mask=index < parts, other=0.0)
        square += tl.load(part_ptr + 1, mask=index < parts, other=0.0)
        mean_square += tl.load(part_ptr + 2, mask=index < parts, other=0.0)
    sums = tl.load(row + SUMS).to(tl.pointer_type(tl.float64))
    tl.store(sums, tl.sum(dot))
    tl.store(sums + 1, tl.sum(square))
    tl.store(sums + 2, tl.sum(mean_square))


def filter_sums_rows_(table: Tensor, scratch: Tensor | None) -> None:
    """Launches both kernels once for each combination of dtypes among the rows of ``table``."""
    rows = table.numpy()
    if scratch is None:  # the interpreter, on the CPU
        parts = int(programs_of(rows[:, SIZE.value], CHUNK.value).sum())
        scratch = torch.empty((parts, 3), dtype=torch.float64)
    # A tensor whose address is odd does not slow the others down.
    aligned = (rows[:, : SUMS.value] % 16 == 0).all(axis=1)
    kinds = np.column_stack([aligned, rows[:, FIRST_DTYPE:]])
    # Triton launches on the current device.
    with torch.cuda.device(scratch.device) if scratch.is_cuda else nullcontext():
        for kind in np.unique(kinds, axis=0):
            _launch(rows[(kinds == kind).all(axis=1), :FIRST_DTYPE], kind.tolist(), scratch)


def _launch(rows: np.ndarray, kind: list[int], scratch: Tensor) -> None:
    sizes = rows[:, SIZE.value]
    programs = programs_of(sizes, CHUNK.value)
    rows = np.column_stack([rows, np.cumsum(programs) - programs])
    table, owner, start = lay_out(rows, sizes, CHUNK.value, scratch.device)
    aligned, grad_dtype, mean_dtype = kind
    filter_sums_kernel[(len(owner),)](
        table, owner, start, scratch, MEANS=bool(rows[:, MEAN.value].any()),
        ALIGNED=bool(aligned), GRAD_DTYPE=grad_dtype, MEAN_DTYPE=mean_dtype, num_warps=WARPS,
    )  # fmt: skip
    combine_kernel[(len(rows),)](table, scratch, num_warps=WARPS)


def specialisations() -> list[dict[str, Any]]:
    """Returns the kinds of launch that are compiled for every target without a GPU, as a check."""
    types = dict.fromkeys(("table_ptr", "owner_ptr", "start_ptr"), "*i64")
    types |= {"parts_ptr": "*fp64"}
    names = ("MEANS", "ALIGNED", "GRAD_DTYPE", "MEAN_DTYPE")
    values = ((True, True, 0, 0), (True, True, 0, 1), (True, False, 2, 0), (False, True, 1, 0))
    kinds = [(filter_sums_kernel, dict(zip(names, kind, strict=True))) for kind in values]
    launches = []
    for kernel, constants in [*kinds, (combine_kernel, {})]:
        signature = {name: types[name] for name in kernel.arg_names if name not in constants}
        launches.append(
            {
                "kernel": kernel.__name__,
                "signature": signature,
                "constants": constants,
                "options": {"num_warps": WARPS},
                "aligned": list(signature),
                "float64": True,  # across lanes and parts only
            }
        )
    return launches
