"""The meaning is in trm_fast/ops/rms_norm_residual.py.

Both directions are one kernel: a tensor is samples x size x kept where the mean runs over the
sequence, and kept x size, one sample, where it runs over the features. A program takes one sample
and a block of the kept dimension. What it normalises stays in registers, up to BLOCK elements; of
more, all but the first BLOCK are read again, out of the cache.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 256  # of the weight's gradient: enough programs to fill a GPU, few enough to add up
# Elements of a tile, of which a program holds up to three: 16 for each thread.
TILE = {4: 2048, 8: 4096}


@triton.jit
def _places(sample, i, r, size, kept, FEATURES: tl.constexpr):
    """Where the elements of a tile [i, r] are."""
    if FEATURES:
        places = i[:, None] * size + r[None, :]
    else:
        places = (sample * size + r[None, :]) * kept + i[:, None]
    return places


@triton.jit
def _block(program, kept, KEPT: tl.constexpr):
    """Sample and kept indices of a block of programs."""
    blocks = tl.cdiv(kept, KEPT)
    sample = program // blocks
    return sample, (program - sample * blocks) * KEPT + tl.arange(0, KEPT)


@triton.jit
def _load_sum(x_ptr, residual_ptr, places, mask, ROUNDED: tl.constexpr):
    h = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if ROUNDED:
        h = h.to(x_ptr.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def _first_half(
    x_ptr, residual_ptr, sum_ptr, sample, i, r, size, kept, FEATURES: tl.constexpr,
):  # fmt: skip
    """Returns h of a tile, and stores it if it is wanted."""
    mask = (i[:, None] < kept) & (r[None, :] < size)
    places = _places(sample, i, r, size, kept, FEATURES)
    h = _load_sum(x_ptr, residual_ptr, places, mask, sum_ptr is not None)
    if sum_ptr is not None:
        tl.store(sum_ptr + places, h.to(sum_ptr.dtype.element_ty), mask=mask)
    return h


@triton.jit
def _second_half(
    out_ptr, weight_ptr, h, inverse, sample, i, r, size, kept, FEATURES: tl.constexpr
):  # fmt: skip
    mask = (i[:, None] < kept) & (r[None, :] < size)
    out = h * inverse[:, None]
    if weight_ptr is not None:
        out *= tl.load(weight_ptr + r, mask=r < size, other=0.0)[None, :]
    places = _places(sample, i, r, size, kept, FEATURES)
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, inverse_ptr, size, kept, eps,
    FEATURES: tl.constexpr, WHOLE: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, i = _block(tl.program_id(0).to(tl.int64), kept, KEPT)
    r = tl.arange(0, BLOCK).to(tl.int64)
    first = _first_half(x_ptr, residual_ptr, sum_ptr, sample, i, r, size, kept, FEATURES)
    squares = tl.sum(first * first, 1)
    if not WHOLE:
        for start in range(BLOCK, size, BLOCK):
            s = start + r
            h = _first_half(x_ptr, residual_ptr, sum_ptr, sample, i, s, size, kept, FEATURES)
            squares += tl.sum(h * h, 1)
    inverse = 1.0 / tl.sqrt_rn(squares / tl.cast(size, tl.float32) + tl.cast(eps, tl.float32))
    tl.store(inverse_ptr + sample * kept + i, inverse, mask=i < kept)
    _second_half(out_ptr, weight_ptr, first, inverse, sample, i, r, size, kept, FEATURES)
    if not WHOLE:
        for start in range(BLOCK, size, BLOCK):
            s = start + r
            mask = (i[:, None] < kept) & (s[None, :] < size)
            places = _places(sample, i, s, size, kept, FEATURES)
            h = _load_sum(x_ptr, residual_ptr, places, mask, sum_ptr is not None)
            _second_half(out_ptr, weight_ptr, h, inverse, sample, i, s, size, kept, FEATURES)


@triton.jit
def _load_pair(
    dout_ptr, x_ptr, residual_ptr, weight_ptr, inverse, sample, i, r, size, kept,
    FEATURES: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """Returns g and u of a tile."""
    mask = (i[:, None] < kept) & (r[None, :] < size)
    places = _places(sample, i, r, size, kept, FEATURES)
    g = tl.load(dout_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + r, mask=r < size, other=0.0)[None, :]
    u = _load_sum(x_ptr, residual_ptr, places, mask, False)
    if not NORMALISED:
        u *= inverse[:, None]
    return g, u


@triton.jit
def _store_gradient(
    dx_ptr, dsum_ptr, g, u, inverse, mean, sample, i, r, size, kept, FEATURES: tl.constexpr
):  # fmt: skip
    mask = (i[:, None] < kept) & (r[None, :] < size)
    places = _places(sample, i, r, size, kept, FEATURES)
    dx = inverse[:, None] * (g - u * mean[:, None])
    if dsum_ptr is not None:
        dx += tl.load(dsum_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dout_ptr, dsum_ptr, x_ptr, residual_ptr, weight_ptr, inverse_ptr, dx_ptr, size, kept,
    NORMALISED: tl.constexpr, FEATURES: tl.constexpr, WHOLE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample, i = _block(tl.program_id(0).to(tl.int64), kept, KEPT)
    r = tl.arange(0, BLOCK).to(tl.int64)
    inverse = tl.load(inverse_ptr + sample * kept + i, mask=i < kept, other=0.0)
    g, u = _load_pair(
        dout_ptr, x_ptr, residual_ptr, weight_ptr, inverse, sample, i, r, size, kept, FEATURES,
        NORMALISED,
    )  # fmt: skip
    total = tl.sum(g * u, 1)
    if not WHOLE:
        for start in range(BLOCK, size, BLOCK):
            s = start + r
            later_g, later_u = _load_pair(
                dout_ptr, x_ptr, residual_ptr, weight_ptr, inverse, sample, i, s, size, kept,
                FEATURES, NORMALISED,
            )  # fmt: skip
            total += tl.sum(later_g * later_u, 1)
    mean = total / tl.cast(size, tl.float32)
    _store_gradient(dx_ptr, dsum_ptr, g, u, inverse, mean, sample, i, r, size, kept, FEATURES)
    if not WHOLE:
        for start in range(BLOCK, size, BLOCK):
            s = start + r
            g, u = _load_pair(
                dout_ptr, x_ptr, residual_ptr, weight_ptr, inverse, sample, i, s, size, kept,
                FEATURES, NORMALISED,
            )  # fmt: skip
            _store_gradient(
                dx_ptr, dsum_ptr, g, u, inverse, mean, sample, i, s, size, kept, FEATURES
            )  # fmt: skip


@triton.jit
def weight_kernel(
    dout_ptr, x_ptr, residual_ptr, inverse_ptr, parts_ptr, samples, size, kept, parts,
    FEATURES: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts <- for every parts-th block of the kept dimension, the sum of d_out * u over it."""
    part = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    blocks = samples * tl.cdiv(kept, KEPT)
    for block in range(part, blocks, parts):
        sample, i = _block(block, kept, KEPT)
        inverse = tl.load(inverse_ptr + sample * kept + i, mask=i < kept, other=0.0)
        g, u = _load_pair(
            dout_ptr, x_ptr, residual_ptr, None, inverse, sample, i, r, size, kept, FEATURES, False
        )  # fmt: skip
        total += tl.sum(g * u, 0)
    tl.store(parts_ptr + part * size + r, total, mask=r < size)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    dim: int,
    eps: float,
    out: Tensor,
    sum: Tensor | None,
    inverse: Tensor,
) -> None:
    """Writes ``out``, ``sum`` unless it is None, and the inverse root of each mean."""
    if not x.numel():
        return
    samples, size, kept = sizes_of(x, dim)
    blocks, warps = blocks_of(size, dim)
    with _on(x):
        forward_kernel[(samples * triton.cdiv(kept, blocks["KEPT"]),)](
            x, residual, weight, out, sum, inverse, size, kept, eps, FEATURES=dim == -1,
            WHOLE=size <= blocks["BLOCK"], **blocks, num_warps=warps,
        )  # fmt: skip


def backward(
    dout: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    inverse: Tensor,
    dim: int,
    normalised: bool,
    dx: Tensor,
    dweight: Tensor | None,
) -> None:
    """Writes ``dx``, and ``dweight`` unless it is None."""
    if not x.numel():
        if dweight is not None:
            dweight.zero_()
        return
    samples, size, kept = sizes_of(x, dim)
    blocks, warps = blocks_of(size, dim)
    with _on(x):
        backward_kernel[(samples * triton.cdiv(kept, blocks["KEPT"]),)](
            dout, dsum, x, residual, weight, inverse, dx, size, kept, NORMALISED=normalised,
            FEATURES=dim == -1, WHOLE=size <= blocks["BLOCK"], **blocks, num_warps=warps,
        )  # fmt: skip
        if dweight is None:
            return
        blocks, warps = weight_blocks(size, dim)
        parts = min(PARTS, samples * triton.cdiv(kept, blocks["KEPT"]))
        sums = torch.empty((parts, size), dtype=torch.float32, device=x.device)
        weight_kernel[(parts, triton.cdiv(size, blocks["BLOCK"]))](
            dout, x, residual, inverse, sums, samples, size, kept, parts, FEATURES=dim == -1,
            **blocks, num_warps=warps,
        )  # fmt: skip
        torch.sum(sums, 0, out=dweight)


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def sizes_of(x: Tensor, dim: int) -> tuple[int, int, int]:
    """Returns samples, the size of the mean, and the size of the kept dimension."""
    if dim == -1:
        return 1, x.size(-1), x.numel() // x.size(-1)
    return x.numel() // (x.size(-2) * x.size(-1)), x.size(-2), x.size(-1)


def blocks_of(size: int, dim: int) -> tuple[dict[str, int], int]:
    """Returns the tile of a program, and its warps."""
    warps = 8 if size > (2048 if dim == -1 else 64) else 4
    padded = triton.next_power_of_2(size)
    if dim == -1:
        block = min(padded, TILE[warps])
        return {"KEPT": min(16, TILE[warps] // block), "BLOCK": block}, warps
    # 32 channels side by side are one or two lines of a cache.
    return {"KEPT": 32, "BLOCK": min(padded, TILE[warps] // 32)}, warps


def weight_blocks(size: int, dim: int) -> tuple[dict[str, int], int]:
    """Returns the tile of a program of the weight's gradient, and its warps."""
    if dim == -1:
        return {"KEPT": 16, "BLOCK": min(triton.next_power_of_2(size), 128)}, 4
    return {"KEPT": 128, "BLOCK": min(triton.next_power_of_2(size), 16)}, 4


def specialisations() -> list[dict[str, Any]]:
    """Returns the kinds of launch that are compiled for every target without a GPU, as a check."""
    kinds = []
    none = {"residual_ptr": None, "weight_ptr": None, "sum_ptr": None, "dsum_ptr": None}
    for element, options, size, dim in (
        ("*bf16", none, 512, -1), ("*bf16", none, 97, -2), ("*fp32", {}, 512, -1),
        ("*fp32", {}, 97, -2), ("*fp16", {}, 4096, -1), ("*fp16", {}, 8192, -1),
        ("*bf16", {}, 4096, -2), ("*fp32", none, 7, -1),
    ):  # fmt: skip
        features = dim == -1
        blocks, warps = blocks_of(size, dim)
        constants = blocks | {"FEATURES": features, "WHOLE": size <= blocks["BLOCK"]}
        normalised = {"NORMALISED": bool(options)}
        kinds += [
            _kind(forward_kernel, element, constants | options, warps, size),
            _kind(backward_kernel, element, constants | normalised | options, warps, size),
        ]
        blocks, warps = weight_blocks(size, dim)
        constants = blocks | {"FEATURES": features, "residual_ptr": None}
        constants |= {"samples": 1} if features else {}  # what a launch makes of an argument of 1
        kinds.append(_kind(weight_kernel, element, constants, warps, size))
    return kinds


def _kind(
    kernel: Any, element: str, constants: dict[str, Any], warps: int, size: int
) -> dict[str, Any]:
    types = dict.fromkeys(("size", "kept", "samples", "parts"), "i32") | {"eps": "fp32"}
    types |= dict.fromkeys(("inverse_ptr", "weight_ptr", "parts_ptr"), "*fp32")
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    names = [name for name in kernel.arg_names if name not in constants]
    return {
        "kernel": kernel.__name__,
        "signature": {name: types.get(name, element) for name in names},
        "constants": constants,
        "options": {"num_warps": warps},
        "aligned": [
            name
            for name in names
            if name.endswith("_ptr") or name == "kept" or (name == "size" and size % 16 == 0)
        ],
    }
