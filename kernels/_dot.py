"""The product of two tiles, as every kernel takes it."""

import os

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 as if it were integers.
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(left, right, total=None):
    """Sums in float32; float32 operands are multiplied as such, never as TF32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")
