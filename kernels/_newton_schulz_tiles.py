"""Tiles of matrices and their products, shared by the kernels of newton_schulz.

X is n x m with n <= m. A tall matrix is read and written transposed, tile by tile, through the same
pointers. Working copies are always n x m and padded with zeros to whole tiles, so only the matrices
themselves need masks.
"""

import triton
import triton.language as tl
from trm_fast.kernels._dot import dot

TINY: tl.constexpr = tl.constexpr(2.0**-126)  # what a matrix of zeros is divided by
WIDTH: tl.constexpr = tl.constexpr(2)  # of a row of the table: address, elements between two rows


@triton.jit
def find_matrix(table_ptr, index, STORAGE: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns where a matrix starts, and the elements between two of its rows."""
    row = table_ptr + index * WIDTH
    # Volatile, as addresses that were kept from the first use to the last would fill the registers.
    pointer = tl.load(row, volatile=True).to(tl.pointer_type(STORAGE))
    stride = tl.load(row + 1, volatile=True)
    if ALIGNED:
        pointer, stride = tl.multiple_of(pointer, 16), tl.multiple_of(stride, 16)
    return pointer, stride


@triton.jit
def _places(pointer, stride, i, j, TALL: tl.constexpr):
    """Where X[i, j] is."""
    if TALL:
        places = pointer + j[None, :] * stride + i[:, None]
    else:
        places = pointer + i[:, None] * stride + j[None, :]
    return places


@triton.jit
def load_matrix(pointer, stride, i, j, n, m, TALL: tl.constexpr):
    mask = (i[:, None] < n) & (j[None, :] < m)
    x = tl.load(_places(pointer, stride, i, j, TALL), mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_matrix(pointer, stride, i, j, value, n, m, TALL: tl.constexpr):
    mask = (i[:, None] < n) & (j[None, :] < m)
    value = value.to(pointer.dtype.element_ty)
    tl.store(_places(pointer, stride, i, j, TALL), value, mask=mask)


@triton.jit
def load_tile(pointer, stride, i, j):
    return tl.load(_places(pointer, stride, i, j, False))


@triton.jit
def store_tile(pointer, stride, i, j, value):
    tl.store(_places(pointer, stride, i, j, False), value.to(pointer.dtype.element_ty))


@triton.jit
def indices(tile, across, TILE: tl.constexpr):
    """Rows and columns of a tile, counted row by row."""
    inside = tl.arange(0, TILE)
    return (tile // across) * TILE + inside, (tile % across) * TILE + inside


@triton.jit
def product(
    left_ptr, right_ptr, i, j, left_stride, right_stride, depth,
    TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows i and columns j of left right, or of left right^T, in float32."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    total = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = load_tile(left_ptr, left_stride, i, start + k)
        if TRANSPOSED:
            right = tl.trans(load_tile(right_ptr, right_stride, j, start + k))
        else:
            right = load_tile(right_ptr, right_stride, start + k, j)
        total = dot(left, right, total)
    return total


@triton.jit
def plus_diagonal(tile, i, j, value):
    """tile + value * I, in the dtype of the tile."""
    return (tile + tl.where(i[:, None] == j[None, :], value, 0.0)).to(tile.dtype)


@triton.jit
def coefficients_of(coefficients_ptr, step):
    """a, b and c of one step; the table of integers keeps them as the bits of float32."""
    row = coefficients_ptr + 3 * step
    a = tl.load(row).to(tl.int32).to(tl.float32, bitcast=True)
    b = tl.load(row + 1).to(tl.int32).to(tl.float32, bitcast=True)
    c = tl.load(row + 2).to(tl.int32).to(tl.float32, bitcast=True)
    return a, b, c


@triton.jit
def largest_of(x, largest):
    return tl.maximum(largest, tl.max(tl.abs(x)))


@triton.jit
def squares_of(x, largest):
    """The squares of x over the largest element, so that none overflows."""
    x = x / largest
    return x * x


@triton.jit
def divisor_of(largest, sum_of_squares, eps):
    """max(norm, eps), over the largest element."""
    return tl.maximum(tl.sqrt(sum_of_squares), tl.cast(eps, tl.float32) / largest)
