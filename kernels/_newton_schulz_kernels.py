"""The kernels of newton_schulz: three that do the whole iteration, and one for each product.

Steps come in runs that begin with a new R = X X^T; ``ends`` of the plan says where each run ends.
Within a run X stands still, and Q gathers what it is multiplied by. A run of one step leaves a * I
outside of Q, where it is not rounded; after more steps Q + a * I would cancel, so it is inside.
"""

import triton
import triton.language as tl
from trm_fast.kernels._dot import dot
from trm_fast.kernels._newton_schulz_tiles import (
    TINY,
    coefficients_of,
    divisor_of,
    find_matrix,
    indices,
    largest_of,
    load_matrix,
    load_tile,
    plus_diagonal,
    product,
    squares_of,
    store_matrix,
    store_tile,
)


@triton.jit
def _polynomial(r, coefficients_ptr, first, last, BLOCK: tl.constexpr):
    """Returns q and rest: the steps from first to last multiply X by q + rest * I."""
    DTYPE: tl.constexpr = r.dtype
    i = tl.arange(0, BLOCK)
    a, b, c = coefficients_of(coefficients_ptr, first)
    z = (b * r + c * dot(r, r)).to(DTYPE)
    rest = tl.where(first + 1 == last, a, 0.0)
    q = plus_diagonal(z, i, i, a - rest)
    for step in range(first + 1, last):
        rz = (a * r + dot(r, z)).to(DTYPE)
        r = (a * rz + dot(z, rz)).to(DTYPE)
        a, b, c = coefficients_of(coefficients_ptr, step)
        z = (b * r + c * dot(r, r)).to(DTYPE)
        q = (a * q + dot(q, z)).to(DTYPE)
    return q, rest


@triton.jit(do_not_specialize=["n", "m", "runs"])
def whole_kernel(
    table_ptr, plan_ptr, n, m, runs, eps,
    TALL: tl.constexpr, ALIGNED: tl.constexpr, STORAGE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One matrix for each program: everything in registers and shared memory."""
    index = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK).to(tl.int64)
    pointer, stride = find_matrix(table_ptr, index, STORAGE, ALIGNED)
    x = load_matrix(pointer, stride, i, i, n, m, TALL)
    largest = largest_of(x, TINY)
    divisor = divisor_of(largest, tl.sum(squares_of(x, largest)), eps)
    x = (x / largest / divisor).to(DTYPE)
    first = tl.zeros((), tl.int64)
    for run in range(runs):
        last = tl.load(plan_ptr + run)
        r = dot(x, tl.trans(x)).to(DTYPE)
        q, rest = _polynomial(r, plan_ptr + runs, first, last, BLOCK)
        x = (rest * x + dot(q, x)).to(DTYPE)
        first = last
    pointer, stride = find_matrix(table_ptr, index, STORAGE, ALIGNED)
    store_matrix(pointer, stride, i, i, x, n, m, TALL)


@triton.jit
def _normalise(
    table_ptr, index, x_ptr, n, m, width, eps,
    TALL: tl.constexpr, ALIGNED: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """x <- matrix / max(norm, eps), with zeros up to BLOCK x width, by one program."""
    pointer, stride = find_matrix(table_ptr, index, STORAGE, ALIGNED)
    i, k = tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, CHUNK).to(tl.int64)
    largest = TINY
    for start in range(0, m, CHUNK):
        largest = largest_of(load_matrix(pointer, stride, i, start + k, n, m, TALL), largest)
    squares = tl.zeros((BLOCK, CHUNK), tl.float32)
    for start in range(0, m, CHUNK):
        x = load_matrix(pointer, stride, i, start + k, n, m, TALL)
        squares += squares_of(x, largest)
    divisor = divisor_of(largest, tl.sum(squares), eps)
    for start in range(0, width, CHUNK):
        x = load_matrix(pointer, stride, i, start + k, n, m, TALL)
        store_tile(x_ptr, width, i, start + k, x / largest / divisor)
    tl.debug_barrier()  # every thread may read x


@triton.jit(do_not_specialize=["n", "m", "runs"])
def chunked_kernel(
    table_ptr, plan_ptr, x_ptr, n, m, width, runs, eps,
    TALL: tl.constexpr, ALIGNED: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One matrix for each program: n x n in registers, X through the cache by chunks of columns."""
    index = tl.program_id(0).to(tl.int64)
    i, k = tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, CHUNK).to(tl.int64)
    x_ptr += index * BLOCK * width
    _normalise(table_ptr, index, x_ptr, n, m, width, eps, TALL, ALIGNED, STORAGE, BLOCK, CHUNK)
    first = tl.zeros((), tl.int64)
    for run in range(runs):
        last = tl.load(plan_ptr + run)
        r = product(x_ptr, x_ptr, i, i, width, width, width, True, CHUNK)
        r = r.to(x_ptr.dtype.element_ty)
        q, rest = _polynomial(r, plan_ptr + runs, first, last, BLOCK)
        for start in range(0, width, CHUNK):
            x = load_tile(x_ptr, width, i, start + k)
            x = rest * x + dot(q, x)
            tl.debug_barrier()  # every thread has read the columns that are overwritten
            if run == runs - 1:
                pointer, stride = find_matrix(table_ptr, index, STORAGE, ALIGNED)
                store_matrix(pointer, stride, i, start + k, x, n, m, TALL)
            else:
                store_tile(x_ptr, width, i, start + k, x)
        tl.debug_barrier()  # every thread may read x
        first = last


@triton.jit
def _small_product(
    left_ptr, right_ptr, add_ptr, out_ptr, scale, add_scale,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out, which may be an operand, <- scale * left right + add_scale * add, by one program."""
    i = tl.arange(0, BLOCK)
    total = scale * product(left_ptr, right_ptr, i, i, BLOCK, BLOCK, BLOCK, False, BLOCK_K)
    total += add_scale * load_tile(add_ptr, BLOCK, i, i)
    tl.debug_barrier()  # every thread has read the operands
    store_tile(out_ptr, BLOCK, i, i, total)
    tl.debug_barrier()  # every thread may read the result


@triton.jit(do_not_specialize=["n", "m", "runs"])
def cached_kernel(
    table_ptr, plan_ptr, x_ptr, small_ptr, n, m, width, runs, eps,
    TALL: tl.constexpr, ALIGNED: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One matrix for each program: everything through the cache, for n x n beyond the registers."""
    index = tl.program_id(0).to(tl.int64)
    i, k = tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, CHUNK).to(tl.int64)
    x_ptr += index * BLOCK * width
    r_ptr = small_ptr + index * 4 * BLOCK * BLOCK
    z_ptr = r_ptr + BLOCK * BLOCK
    q_ptr = r_ptr + 2 * BLOCK * BLOCK
    t_ptr = r_ptr + 3 * BLOCK * BLOCK
    _normalise(table_ptr, index, x_ptr, n, m, width, eps, TALL, ALIGNED, STORAGE, BLOCK, CHUNK)
    first = tl.zeros((), tl.int64)
    for run in range(runs):
        last = tl.load(plan_ptr + run)
        a, b, c = coefficients_of(plan_ptr + runs, first)
        r = product(x_ptr, x_ptr, i, i, width, width, width, True, BLOCK_K)
        store_tile(r_ptr, BLOCK, i, i, r)
        tl.debug_barrier()  # every thread may read r
        _small_product(r_ptr, r_ptr, r_ptr, z_ptr, c, b, BLOCK, BLOCK_K)
        rest = tl.where(first + 1 == last, a, 0.0)
        q = plus_diagonal(load_tile(z_ptr, BLOCK, i, i), i, i, a - rest)
        store_tile(q_ptr, BLOCK, i, i, q)
        tl.debug_barrier()  # every thread may read q
        for step in range(first + 1, last):
            _small_product(r_ptr, z_ptr, r_ptr, t_ptr, 1.0, a, BLOCK, BLOCK_K)
            _small_product(z_ptr, t_ptr, t_ptr, r_ptr, 1.0, a, BLOCK, BLOCK_K)
            a, b, c = coefficients_of(plan_ptr + runs, step)
            _small_product(r_ptr, r_ptr, r_ptr, z_ptr, c, b, BLOCK, BLOCK_K)
            _small_product(q_ptr, z_ptr, q_ptr, q_ptr, 1.0, a, BLOCK, BLOCK_K)
        for start in range(0, width, CHUNK):
            j = start + k
            x = product(q_ptr, x_ptr, i, j, BLOCK, width, BLOCK, False, BLOCK_K)
            x += rest * load_tile(x_ptr, width, i, j)
            tl.debug_barrier()  # every thread has read the columns that are overwritten
            if run == runs - 1:
                pointer, stride = find_matrix(table_ptr, index, STORAGE, ALIGNED)
                store_matrix(pointer, stride, i, j, x, n, m, TALL)
            else:
                store_tile(x_ptr, width, i, j, x)
        tl.debug_barrier()  # every thread may read x
        first = last


@triton.jit(do_not_specialize=["n", "m"])
def norm_kernel(
    table_ptr, parts_ptr, n, m,
    PARTS: tl.constexpr, TALL: tl.constexpr, ALIGNED: tl.constexpr, STORAGE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """parts <- for every PARTS-th tile, the largest element and the sum of squares over it."""
    program = tl.program_id(0).to(tl.int64)
    index, part = program // PARTS, program % PARTS
    pointer, stride = find_matrix(table_ptr, index, STORAGE, ALIGNED)
    across = tl.cdiv(m, TILE).to(tl.int64)
    tiles = tl.cdiv(n, TILE) * across
    largest = TINY
    for tile in range(part, tiles, PARTS):
        i, j = indices(tile, across, TILE)
        largest = largest_of(load_matrix(pointer, stride, i, j, n, m, TALL), largest)
    squares = tl.zeros((TILE, TILE), tl.float32)
    for tile in range(part, tiles, PARTS):
        i, j = indices(tile, across, TILE)
        squares += squares_of(load_matrix(pointer, stride, i, j, n, m, TALL), largest)
    parts_ptr += index * 2 * PARTS + part
    tl.store(parts_ptr, largest)
    tl.store(parts_ptr + PARTS, tl.sum(squares))


@triton.jit(do_not_specialize=["n", "m"])
def normalise_kernel(
    table_ptr, parts_ptr, x_ptr, n, m, size, width, eps,
    PARTS: tl.constexpr, TALL: tl.constexpr, ALIGNED: tl.constexpr, STORAGE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """x <- matrix / max(norm, eps), with zeros up to size x width."""
    program = tl.program_id(0).to(tl.int64)
    across = (width // TILE).to(tl.int64)
    tiles = size // TILE * across
    index = program // tiles
    parts_ptr += index * 2 * PARTS + tl.arange(0, PARTS)
    largest_of_part = tl.load(parts_ptr)
    largest = tl.max(largest_of_part)
    ratio = largest_of_part / largest
    divisor = divisor_of(largest, tl.sum(tl.load(parts_ptr + PARTS) * ratio * ratio), eps)
    pointer, stride = find_matrix(table_ptr, index, STORAGE, ALIGNED)
    i, j = indices(program % tiles, across, TILE)
    x = load_matrix(pointer, stride, i, j, n, m, TALL) / largest / divisor
    store_tile(x_ptr + index * size * width, width, i, j, x)


@triton.jit
def _triangle(tile):
    """Row and column of the tile that has this number among those on and below the diagonal."""
    row = ((tl.sqrt((8 * tile + 1).to(tl.float32)) - 1) * 0.5).to(tl.int64)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)  # the root is rounded
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def _store_twice(pointer, size, i, j, value, mirrored):
    store_tile(pointer, size, i, j, value)
    if mirrored:
        store_tile(pointer, size, j, i, tl.trans(value))


@triton.jit
def symmetric_kernel(
    left_ptr, right_ptr, add_ptr, out_ptr, shifted_ptr, size, width, depth, scale, add_scale, shift,
    HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out <- scale * left right^T + add_scale * add, and shifted <- out + shift * I."""
    program = tl.program_id(0).to(tl.int64)
    across = (size // BLOCK).to(tl.int64)
    if HALF:
        tiles = across * (across + 1) // 2
        row, col = _triangle(program % tiles)
    else:
        tiles = across * across
        row, col = program % tiles // across, program % across
    index = program // tiles
    i, j = row * BLOCK + tl.arange(0, BLOCK), col * BLOCK + tl.arange(0, BLOCK)
    left_ptr += index * size * width
    right_ptr += index * size * width
    total = product(left_ptr, right_ptr, i, j, width, width, depth, True, BLOCK_K)
    total *= tl.cast(scale, tl.float32)
    if add_ptr is not None:
        add = load_tile(add_ptr + index * size * size, size, i, j)
        total += tl.cast(add_scale, tl.float32) * add
    total = total.to(out_ptr.dtype.element_ty)
    if HALF:
        if row == col:
            # The next product takes right^T for right, and a difference of the two would grow.
            total = tl.where(i[:, None] >= j[None, :], total, tl.trans(total))
    mirrored = HALF and row != col
    _store_twice(out_ptr + index * size * size, size, i, j, total, mirrored)
    if shifted_ptr is not None:
        total = plus_diagonal(total, i, j, tl.cast(shift, tl.float32))
        _store_twice(shifted_ptr + index * size * size, size, i, j, total, mirrored)


@triton.jit(do_not_specialize=["n", "m"])
def multiply_kernel(
    q_ptr, x_ptr, out_ptr, table_ptr, n, m, size, width, rest,
    TALL: tl.constexpr, ALIGNED: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out <- q x + rest * x, into the matrices of the table if there is one."""
    program = tl.program_id(0).to(tl.int64)
    across = (width // BLOCK).to(tl.int64)
    tiles = size // BLOCK * across
    index = program // tiles
    i, j = indices(program % tiles, across, BLOCK)
    q_ptr += index * size * size
    x_ptr += index * size * width
    total = product(q_ptr, x_ptr, i, j, size, width, size, False, BLOCK_K)
    total += tl.cast(rest, tl.float32) * load_tile(x_ptr, width, i, j)
    if table_ptr is not None:
        pointer, stride = find_matrix(table_ptr, index, STORAGE, ALIGNED)
        store_matrix(pointer, stride, i, j, total, n, m, TALL)
    else:
        store_tile(out_ptr + index * size * width, width, i, j, total)
