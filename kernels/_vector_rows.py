"""What both kernels of vector_latent_update do to the rows of one program.

Pointers are those of its first row; ``i`` counts its rows, of which the first ``rows`` are there.

All weights lie in one array, in the order of the op, so that their places follow from H alone; A1
and C1 lie there as square parts, for x, y and z one after the other, so that all products share the
offsets of their tiles. The network of z has 4 squares and 4 vectors, that of y behind it one square
less: squares, [H], a square and three times [H]. A second array has all squares transposed, for
forward products.
"""

import triton
import triton.language as tl
from trm_fast.kernels._dot import dot


@triton.jit
def load_rows(pointer, i, rows, H: tl.constexpr):
    """The first rows of [BLOCK, H] as float32, zero behind the last."""
    j = tl.arange(0, H)
    found = tl.load(pointer + (i[:, None] * H + j[None, :]), mask=(i < rows)[:, None], other=0.0)
    return found.to(tl.float32)


@triton.jit
def store_rows(pointer, i, rows, value, H: tl.constexpr):
    j = tl.arange(0, H)
    place = pointer + (i[:, None] * H + j[None, :])
    tl.store(place, value.to(pointer.dtype.element_ty), mask=(i < rows)[:, None])


@triton.jit
def add_rows(pointer, i, rows, value, H: tl.constexpr):
    """Adds to rows in memory, which every thread may read afterwards."""
    value += load_rows(pointer, i, rows, H)
    tl.debug_barrier()  # every thread has read what is overwritten
    store_rows(pointer, i, rows, value, H)
    tl.debug_barrier()


@triton.jit
def load_vector(pointer, H: tl.constexpr):
    return tl.load(pointer + tl.arange(0, H)).to(tl.float32)[None, :]


@triton.jit
def product(left_ptr, i, rows, weight_ptr, H: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows times a square [H, H], in float32."""
    j = tl.arange(0, H)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((i.shape[0], H), tl.float32)
    for _ in range(0, H, BLOCK_K):
        # Pointers walk, so that the tiles of offsets are constants, which all products share.
        left = tl.load(
            left_ptr + (i[:, None] * H + k[None, :]), mask=(i < rows)[:, None], other=0.0
        )
        right = tl.load(weight_ptr + (k[:, None] * H + j[None, :]))
        weight_ptr += BLOCK_K * H
        left_ptr += BLOCK_K
        total = dot(left, right, total)
    return total


@triton.jit
def gelu(v):
    """v Phi(v), and its slope."""
    phi = 0.5 + 0.5 * tl.math.erf(v * 0.7071067811865476)
    return v * phi, phi + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)


@triton.jit
def centre(p, H: tl.constexpr, EPS: tl.constexpr):
    """(p - mean) / deviation, and 1 / deviation, of each row."""
    p -= (tl.sum(p, 1) / H)[:, None]
    scale = tl.rsqrt(tl.sum(p * p, 1) / H + EPS)
    return p * scale[:, None], scale


@triton.jit
def inside(
    v, act_ptr, i, rows, weight_ptr, PARTS: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The network behind its first product: gelu'(v), the normed rows and 1 / deviation.

    gelu(v) stays at act_ptr, and every thread may read it.
    """
    u, slope = gelu(v)
    store_rows(act_ptr, i, rows, u, H)
    tl.debug_barrier()  # every thread may read u
    rest_ptr = weight_ptr + PARTS * H * H + H
    p = product(act_ptr, i, rows, rest_ptr, H, BLOCK_K)
    normed, scale = centre(p + load_vector(rest_ptr + H * H, H), H, EPS)
    return slope, normed, scale
