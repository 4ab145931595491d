"""The meaning is in trm_fast/ops/newton_schulz.py.

Matrices of one shape share their launches: the batch is part of the grid, and a program finds its
matrix in a table of addresses, so nothing is stacked. Below, X is n x m with n <= m.

n <= 128: one launch. A program does the whole iteration of one matrix, and what does not fit the
registers stays in the cache. ``whole_kernel`` keeps X and the n x n matrices on chip, for n and m
up to 64; ``chunked_kernel`` keeps the n x n matrices, for a longer m; ``cached_kernel`` keeps none,
for n up to 128, where registers would spill. In float32 the limits are half of these.

Larger n: one launch for each product, over the tiles of all matrices. n x n products are symmetric,
so only tiles on and below the diagonal are computed, and each is stored twice. A cluster of blocks
could hold the n x n matrices up to 512 on chip, but Triton gives blocks neither a barrier nor
shared memory in common, and sm_80 has no clusters.

Products accumulate in float32. float32 operands are multiplied as such, never as TF32.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from trm_fast.kernels._newton_schulz_kernels import (
    cached_kernel,
    chunked_kernel,
    multiply_kernel,
    norm_kernel,
    normalise_kernel,
    symmetric_kernel,
    whole_kernel,
)
from trm_fast.kernels._newton_schulz_tiles import WIDTH
from trm_fast.kernels._tables import upload

PARTS = 64  # of a norm: few enough for each program of the next kernel to add them up
TILE = 64  # of the element-wise kernels; it divides every BLOCK of the products
LONGEST = 1024  # m in one launch: a longer one keeps one multiprocessor busy and the others idle
# Largest n, by the bytes of an element, for which n x n matrices fit the registers, and for which
# they fit the tile of one program. Above these the compiler spills.
IN_REGISTERS = {2: 64, 4: 32}
IN_ONE_TILE = {2: 128, 4: 64}

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class _Plan:
    """What is equal for all matrices of one call."""

    coefficients: Sequence[Triple]
    ends: Sequence[int]  # of the runs of steps that begin with a new X X^T
    half: bool  # whether the mirror image of a symmetric product is not computed
    dtype: torch.dtype
    eps: float


@dataclass(frozen=True)
class _Group:
    """Matrices of one shape and dtype."""

    count: int
    n: int
    m: int
    table: Tensor  # addresses and strides; behind them ends and coefficients of the plan
    kind: dict[str, Any]  # constants of every kernel that reads or writes the matrices


def newton_schulz_(
    matrices: Sequence[Tensor],
    coefficients: Sequence[Triple],
    form: str,
    restarts: Sequence[int],
    dtype: torch.dtype,
    eps: float,
) -> None:
    """Does the iteration in place, with as few launches for each shape as the shape allows."""
    steps = len(coefficients)
    inner = {r for r in restarts if 0 < r < steps} if form == "gram" else {*range(1, steps)}
    plan = _Plan(coefficients, sorted({*inner, steps}), form != "standard", dtype, eps)
    places = [_with_columns_side_by_side(matrix) for matrix in matrices]
    groups: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
    for place in places:
        if place.numel():
            groups.setdefault((place.shape, place.dtype), []).append(place)
    for same in groups.values():
        device = same[0].device
        # Triton launches on the current device.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            group = _group(same, plan)
            if in_one_launch(group.n, group.m, dtype):
                _launch_once(group, plan)
            else:
                _launch_products(group, plan)
    for matrix, place in zip(matrices, places, strict=True):
        if place.data_ptr() != matrix.data_ptr():
            matrix.copy_(place)


def _with_columns_side_by_side(matrix: Tensor) -> Tensor:
    """Returns the matrix, or its transpose, which the iteration transposes, or a copy."""
    if matrix.size(1) == 1 or matrix.stride(1) == 1:
        return matrix
    if matrix.size(0) == 1 or matrix.stride(0) == 1:
        return matrix.mT
    return matrix.contiguous()


def _group(matrices: list[Tensor], plan: _Plan) -> _Group:
    rows, cols = matrices[0].shape
    # The stride of a single row is arbitrary, and not used.
    places = [(x.data_ptr(), x.stride(0) if rows > 1 else 0) for x in matrices]
    bits = np.array(plan.coefficients, np.float32).view(np.int32)
    words = np.concatenate([np.array(places).ravel(), plan.ends, bits.ravel()]).astype(np.int64)
    table = upload(words.tobytes(), lambda: words, matrices[0].device)
    kind = {
        "TALL": rows > cols,
        "ALIGNED": all(value % 16 == 0 for place in places for value in place),
        "STORAGE": _TYPES[matrices[0].dtype],
    }
    return _Group(len(matrices), min(rows, cols), max(rows, cols), table, kind)


def in_one_launch(n: int, m: int, dtype: torch.dtype) -> bool:
    """Returns whether one program does the whole iteration of a matrix."""
    return n <= IN_ONE_TILE[dtype.itemsize] and m <= LONGEST


def _launch_once(group: _Group, plan: _Plan) -> None:
    kernel, blocks, options = single_launch(group.n, group.m, plan.dtype)
    constants = group.kind | blocks
    numbers: list[Any] = [group.n, group.m]
    buffers = []
    if kernel is not whole_kernel:
        block = blocks["BLOCK"]
        width = _padded(group.m, 64)  # of every CHUNK and BLOCK_K
        numbers.append(width)
        buffers.append(_buffer(group, plan, block, width))
    if kernel is cached_kernel:
        buffers.append(_buffer(group, plan, 4 * block, block))
    kernel[(group.count,)](
        group.table, group.table[group.count * WIDTH.value :], *buffers, *numbers, len(plan.ends),
        plan.eps, **constants, **options,
    )  # fmt: skip


def single_launch(n: int, m: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """Returns kernel, block sizes and launch options with which one program does a matrix."""
    block = max(16, triton.next_power_of_2(n))
    wide = dtype.itemsize == 4
    # 8 warps may have all registers; the assembler would spill a few bytes to make room for more.
    options = {"num_warps": 8, "num_stages": 2, "maxnreg": 255}
    if block > IN_REGISTERS[dtype.itemsize]:
        if wide:
            return cached_kernel, {"BLOCK": block, "BLOCK_K": 16, "CHUNK": 16}, options
        blocks = {"BLOCK": block, "BLOCK_K": 64, "CHUNK": 32}
        return cached_kernel, blocks, {"num_warps": 16, "num_stages": 2}
    if block == 16 or (block == 32 and not wide):
        options |= {"num_warps": 1}
    if m <= block:
        return whole_kernel, {"BLOCK": block, "DTYPE": _TYPES[dtype]}, options
    return chunked_kernel, {"BLOCK": block, "CHUNK": 32}, options


def _launch_products(group: _Group, plan: _Plan) -> None:
    """Launches every product of the iteration once for all matrices of the group."""
    blocks, options = product_blocks(
        group.n, group.m, group.count, plan.dtype, _processors(group.table.device)
    )
    block = blocks["BLOCK"]
    size, width = _padded(group.n, block), _padded(group.m, block)
    across, along = size // block, width // block
    x, y = (_buffer(group, plan, size, width) for _ in range(2))
    r, z = (_buffer(group, plan, size, size) for _ in range(2))
    if len(plan.ends) < len(plan.coefficients):
        q, t = (_buffer(group, plan, size, size) for _ in range(2))
    _launch_norm(group, x, plan.eps)

    def symmetric(left, right, out, scale=1.0, add=None, add_scale=0.0, shifted=None, shift=0.0):
        tiles = across * (across + 1) // 2 if plan.half else across * across
        depth = left.size(2) if scale else 0
        symmetric_kernel[(group.count * tiles,)](
            left, right, add, out, shifted, size, left.size(2), depth, scale, add_scale, shift,
            HALF=plan.half, **blocks, **options,
        )  # fmt: skip

    first = 0
    for last in plan.ends:
        alone = first + 1 == last
        a, b, c = plan.coefficients[first]
        symmetric(x, x, r)
        symmetric(r, r, z, c, r, b, None if alone else q, a)
        for step in range(first + 1, last):
            symmetric(r, z, t, 1.0, r, a)
            symmetric(z, t, r, 1.0, t, a)
            a, b, c = plan.coefficients[step]
            symmetric(r, r, z, c, r, b)
            symmetric(q, z, t, 1.0, q, a)
            q, t = t, q
        into = group.table if last == len(plan.coefficients) else None
        multiply_kernel[(group.count * across * along,)](
            z if alone else q, x, y, into, group.n, group.m, size, width, a if alone else 0.0,
            **group.kind, **blocks, **options,
        )  # fmt: skip
        x, y = y, x
        first = last


def _launch_norm(group: _Group, x: Tensor, eps: float) -> None:
    parts = torch.empty(group.count * 2 * PARTS, dtype=torch.float32, device=x.device)
    constants = group.kind | {"PARTS": PARTS, "TILE": TILE}
    norm_kernel[(group.count * PARTS,)](group.table, parts, group.n, group.m, **constants)
    normalise_kernel[(x.numel() // TILE**2,)](
        group.table, parts, x, group.n, group.m, *x.shape[1:], eps, **constants
    )


def product_blocks(
    n: int, m: int, count: int, dtype: torch.dtype, processors: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns block sizes and launch options of the products; small blocks where large ones would
    leave multiprocessors idle."""
    if dtype == torch.float32:
        return {"BLOCK": 64, "BLOCK_K": 32}, {"num_warps": 8, "num_stages": 2}
    across, along = triton.cdiv(n, 128), triton.cdiv(m, 128)
    if count * min(across * (across + 1) // 2, across * along) < processors:
        return {"BLOCK": 64, "BLOCK_K": 64}, {"num_warps": 4, "num_stages": 4}
    return {"BLOCK": 128, "BLOCK_K": 64}, {"num_warps": 8, "num_stages": 3}


def _buffer(group: _Group, plan: _Plan, rows: int, cols: int) -> Tensor:
    return torch.empty(group.count, rows, cols, dtype=plan.dtype, device=group.table.device)


def _padded(size: int, block: int) -> int:
    return triton.cdiv(size, block) * block


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def specialisations() -> list[dict[str, Any]]:
    """Returns the kinds of launch that are compiled for every target without a GPU, as a check."""
    kinds = []
    for storage, dtype, tall, aligned, count, sizes in (
        (torch.float32, torch.bfloat16, False, True, 1, ((16, 16), (16, 999), (32, 32), (32, 999))),
        (torch.bfloat16, torch.float16, True, False, 1000, ((64, 64), (64, 999), (128, 999))),
        (torch.float32, torch.float32, True, False, 1, ((32, 32), (32, 999), (64, 999))),
    ):
        matrix = {"TALL": tall, "ALIGNED": aligned, "STORAGE": _TYPES[storage]}
        parts = matrix | {"PARTS": PARTS, "TILE": TILE}
        kinds += [_kind(norm_kernel, dtype, parts), _kind(normalise_kernel, dtype, parts)]
        for size in sizes:
            kernel, blocks, options = single_launch(*size, dtype)
            kinds.append(_kind(kernel, dtype, matrix | blocks, options))
        blocks, options = product_blocks(512, 1536, count, dtype, 132)
        whole = {"HALF": False, "add_ptr": None, "shifted_ptr": None}
        kinds += [
            _kind(symmetric_kernel, dtype, blocks | {"HALF": True}, options),
            _kind(symmetric_kernel, dtype, blocks | whole, options),
            _kind(multiply_kernel, dtype, blocks | matrix, options),
            _kind(multiply_kernel, dtype, blocks | matrix | {"table_ptr": None}, options),
        ]
    return kinds


def _kind(
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    options: dict[str, int] | None = None,
) -> dict[str, Any]:
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {"table_ptr": "*i64", "plan_ptr": "*i64", "parts_ptr": "*fp32"}
    types |= dict.fromkeys(("scale", "add_scale", "shift", "rest", "eps"), "fp32")
    types |= dict.fromkeys(("n", "m", "size", "width", "depth", "runs"), "i32")
    names = [name for name in kernel.arg_names if name not in constants]
    padded = ("size", "width", "depth")
    return {
        "kernel": kernel.__name__,
        "signature": {name: types.get(name, element) for name in names},
        "constants": constants,
        "options": options or {},
        "aligned": [name for name in names if name.endswith("_ptr") or name in padded],
    }
