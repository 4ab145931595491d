"""The meaning is in trm_fast/ops/vector_latent_update.py.

One launch for all updates, and one for their way back: a program owns 16 rows and loops over the
rounds of n updates of z and one of y, so programs never wait for each other. The states and gelu(v)
of its rows are exchanged between its threads through memory that stays in the first-level cache;
weights stream from the second-level cache tile by tile. The parts of x and y in the first product
are computed once per call and once per round.

The backward kernel computes the insides of each update once more from the state before it, and
leaves both sides of the products that give the gradients of weights, which are then one matmul each
over the rows of all steps; ``recompute`` changes nothing here. Sums over rows that give the
gradients of vectors are left for each update and program.

Products accumulate in float32. float32 operands are multiplied as such, never as TF32.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from trm_fast.kernels._vector_rows import (
    add_rows,
    inside,
    load_rows,
    load_vector,
    product,
    store_rows,
)

from trm_fast._autograd import once_differentiable

BLOCK = 16  # rows of a program: the least that a matrix unit takes
BLOCK_K = 16  # likewise, at a time in a product
EPS = 1e-5
VECTORS = 4  # sums over rows that an update leaves
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@triton.jit(do_not_specialize=["batch", "rounds", "steps", "plain"])
def vector_forward_kernel(
    x_ptr, y_ptr, z_ptr, act_ptr, weight_ptr, scale_ptr, y_states_ptr, z_states_ptr,
    batch, rounds, steps, plain,
    H: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y and z in place; the rounds from `plain` on leave the states before each update."""
    i = tl.arange(0, BLOCK)
    before = tl.program_id(0).to(tl.int64) * BLOCK
    rows = batch - before
    slot = tl.cast(batch, tl.int64) * H
    x_ptr += before * H
    y_ptr += before * H
    z_ptr += before * H
    act_ptr += before * H
    y_states_ptr += before * H
    z_states_ptr += before * H
    y_weight_ptr = weight_ptr + 4 * H * H + 4 * H  # behind the weights of the network of z
    z_gain_ptr = weight_ptr + 4 * H * H + 2 * H
    y_gain_ptr = y_weight_ptr + 3 * H * H + 2 * H
    x_part = product(x_ptr, i, rows, weight_ptr, H, BLOCK_K)
    x_part += load_vector(weight_ptr + 3 * H * H, H)
    for round in range(rounds):
        by = tl.load(scale_ptr + round)
        kept_rows = tl.where(round >= plain, rows, 0)
        xy_part = x_part + product(y_ptr, i, rows, weight_ptr + H * H, H, BLOCK_K)
        for _ in range(steps):
            z = load_rows(z_ptr, i, rows, H)
            store_rows(z_states_ptr, i, kept_rows, z, H)
            z_states_ptr += tl.where(kept_rows > 0, slot, 0)
            v = xy_part + product(z_ptr, i, rows, weight_ptr + 2 * H * H, H, BLOCK_K)
            _, normed, _ = inside(v, act_ptr, i, rows, weight_ptr, 3, H, EPS, BLOCK_K)
            z += by * (normed * load_vector(z_gain_ptr, H) + load_vector(z_gain_ptr + H, H))
            store_rows(z_ptr, i, rows, z, H)
            tl.debug_barrier()  # every thread may read z and write u
        y = load_rows(y_ptr, i, rows, H)
        store_rows(y_states_ptr, i, kept_rows, y, H)
        y_states_ptr += tl.where(kept_rows > 0, slot, 0)
        v = product(y_ptr, i, rows, y_weight_ptr, H, BLOCK_K)
        v += product(z_ptr, i, rows, y_weight_ptr + H * H, H, BLOCK_K)
        v += load_vector(y_weight_ptr + 2 * H * H, H)
        _, normed, _ = inside(v, act_ptr, i, rows, y_weight_ptr, 2, H, EPS, BLOCK_K)
        y += by * (normed * load_vector(y_gain_ptr, H) + load_vector(y_gain_ptr + H, H))
        store_rows(y_ptr, i, rows, y, H)
        tl.debug_barrier()  # every thread may read y and write u
    z = load_rows(z_ptr, i, rows, H)
    store_rows(z_states_ptr, i, tl.where(rounds > plain, rows, 0), z, H)


@triton.jit
def _back_through(
    v, d_ptr, by, act_ptr, out_ptr, hidden_ptr, sums_ptr, i, rows, weight_ptr, turned_ptr,
    PARTS: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From the gradient of a new state, at d_ptr, to that of v, which stays at hidden_ptr."""
    slope, normed, scale = inside(v, act_ptr, i, rows, turned_ptr, PARTS, H, EPS, BLOCK_K)
    second_ptr = weight_ptr + PARTS * H * H + H
    j = tl.arange(0, H)
    d = by * load_rows(d_ptr, i, rows, H)
    tl.store(sums_ptr + 2 * H + j, tl.sum(d * normed, 0))
    tl.store(sums_ptr + 3 * H + j, tl.sum(d, 0))
    g = d * load_vector(second_ptr + H * H + H, H)
    g -= (tl.sum(g, 1) / H)[:, None] + normed * (tl.sum(g * normed, 1) / H)[:, None]
    g *= scale[:, None]
    tl.store(sums_ptr + H + j, tl.sum(g, 0))
    store_rows(out_ptr, i, rows, g, H)
    tl.debug_barrier()  # every thread may read the gradient of p
    d_v = product(out_ptr, i, rows, second_ptr, H, BLOCK_K) * slope
    tl.store(sums_ptr + j, tl.sum(d_v, 0))
    store_rows(hidden_ptr, i, rows, d_v, H)
    tl.debug_barrier()  # every thread may read the gradient of v
    return d_v


@triton.jit(do_not_specialize=["batch", "rounds", "steps", "plain"])
def vector_backward_kernel(
    x_ptr, dx_ptr, dy_ptr, dz_ptr, weight_ptr, turned_ptr, scale_ptr, y_states_ptr, z_states_ptr,
    act_ptr, out_ptr, hidden_ptr, round_ptr, all_ptr, work_ptr, sums_ptr,
    batch, rounds, steps, plain,
    H: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dy and dz in place. act, out and hidden: slots of all updates of z, then of y. What
    outlasts an update is in memory, in float32: the registers are for the products."""
    i = tl.arange(0, BLOCK)
    before = tl.program_id(0).to(tl.int64) * BLOCK
    rows = batch - before
    slot = tl.cast(batch, tl.int64) * H
    x_ptr += before * H
    dx_ptr += before * H
    dy_ptr += before * H
    dz_ptr += before * H
    y_states_ptr += before * H
    z_states_ptr += before * H
    act_ptr += before * H
    out_ptr += before * H
    hidden_ptr += before * H
    round_ptr += before * H
    all_ptr += before * H
    work_ptr += before * H
    x_part_ptr, xy_part_ptr, total_ptr = work_ptr, work_ptr + slot, work_ptr + 2 * slot
    of_round_ptr, sum_y_ptr = work_ptr + 3 * slot, work_ptr + 4 * slot
    sum_z_ptr = work_ptr + 5 * slot
    steps_64 = tl.cast(steps, tl.int64)
    grad_steps = (rounds - plain) * steps_64
    y_weight_ptr = weight_ptr + 4 * H * H + 4 * H
    y_turned_ptr = turned_ptr + 4 * H * H + 4 * H
    sums_slot = tl.num_programs(0).to(tl.int64) * 4 * H
    sums_ptr += tl.program_id(0).to(tl.int64) * 4 * H
    zeros = tl.zeros((BLOCK, H), tl.float32)
    x_part = product(x_ptr, i, rows, turned_ptr, H, BLOCK_K)
    store_rows(x_part_ptr, i, rows, x_part + load_vector(weight_ptr + 3 * H * H, H), H)
    store_rows(total_ptr, i, rows, zeros, H)
    store_rows(sum_y_ptr, i, rows, load_rows(dy_ptr, i, rows, H), H)
    store_rows(sum_z_ptr, i, rows, load_rows(dz_ptr, i, rows, H), H)
    tl.debug_barrier()  # every thread may read these
    for back in range(rounds - plain):
        round = rounds - plain - 1 - back
        by = tl.load(scale_ptr + plain + round)
        y_ptr = y_states_ptr + round * slot
        z_ptr = z_states_ptr + (round + 1) * steps_64 * slot
        at = grad_steps + round
        v = product(y_ptr, i, rows, y_turned_ptr, H, BLOCK_K)
        v += product(z_ptr, i, rows, y_turned_ptr + H * H, H, BLOCK_K)
        v += load_vector(y_weight_ptr + 2 * H * H, H)
        d_v_ptr = hidden_ptr + at * slot
        _back_through(
            v, sum_y_ptr, by, act_ptr + at * slot, out_ptr + at * slot, d_v_ptr,
            sums_ptr + at * sums_slot, i, rows, y_weight_ptr, y_turned_ptr, 2, H, EPS, BLOCK_K,
        )  # fmt: skip
        d = product(d_v_ptr, i, rows, y_weight_ptr, H, BLOCK_K)
        add_rows(sum_y_ptr, i, rows, d, H)
        d = product(d_v_ptr, i, rows, y_weight_ptr + H * H, H, BLOCK_K)
        add_rows(sum_z_ptr, i, rows, d, H)
        xy_part = product(y_ptr, i, rows, turned_ptr + H * H, H, BLOCK_K)
        xy_part += load_rows(x_part_ptr, i, rows, H)
        store_rows(xy_part_ptr, i, rows, xy_part, H)
        store_rows(of_round_ptr, i, rows, zeros, H)
        tl.debug_barrier()  # every thread may read these
        for k in range(steps):
            at = (round + 1) * steps_64 - 1 - k
            z_ptr = z_states_ptr + at * slot
            v = product(z_ptr, i, rows, turned_ptr + 2 * H * H, H, BLOCK_K)
            v += load_rows(xy_part_ptr, i, rows, H)
            d_v_ptr = hidden_ptr + at * slot
            d_v = _back_through(
                v, sum_z_ptr, by, act_ptr + at * slot, out_ptr + at * slot, d_v_ptr,
                sums_ptr + at * sums_slot, i, rows, weight_ptr, turned_ptr, 3, H, EPS, BLOCK_K,
            )  # fmt: skip
            add_rows(of_round_ptr, i, rows, d_v, H)
            d = product(d_v_ptr, i, rows, weight_ptr + 2 * H * H, H, BLOCK_K)
            add_rows(sum_z_ptr, i, rows, d, H)
        of_round = load_rows(of_round_ptr, i, rows, H)
        store_rows(round_ptr + round * slot, i, rows, of_round, H)
        add_rows(total_ptr, i, rows, of_round, H)
        d = product(round_ptr + round * slot, i, rows, weight_ptr + H * H, H, BLOCK_K)
        add_rows(sum_y_ptr, i, rows, d, H)
    store_rows(all_ptr, i, rows, load_rows(total_ptr, i, rows, H), H)
    tl.debug_barrier()  # every thread may read the sum of all rounds
    dx = product(all_ptr, i, rows, weight_ptr, H, BLOCK_K)
    store_rows(dx_ptr, i, rows, dx, H)
    store_rows(dy_ptr, i, rows, load_rows(sum_y_ptr, i, rows, H), H)
    store_rows(dz_ptr, i, rows, load_rows(sum_z_ptr, i, rows, H), H)


def vector_latent_update(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    levels: Any,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """Runs the recursion in one launch; ``recompute`` is always on."""
    schedule = levels.schedule()
    rounds = schedule.scales
    grad_rounds = schedule.grad_rounds if torch.is_grad_enabled() else 0
    counts = (len(rounds), schedule.steps, len(rounds) - grad_rounds)
    if x.shape[0] == 0:
        # Nothing runs, but the results are results of all inputs.
        nothing = sum(weight.sum().to(x.dtype) * 0 for weight in weights)
        return y + x * nothing, z + x * nothing
    cast = [weight.to(x.dtype) for weight in weights]
    flat = torch.cat([_in_squares(weight) for weight in cast])
    with torch.no_grad():
        turned = torch.cat([_in_squares(weight, transposed=True) for weight in cast])
    with torch.set_grad_enabled(grad_rounds > 0):
        out: tuple[Tensor, Tensor] = _VectorLatentUpdate.apply(
            x, y, z, flat, turned, _upload(rounds, x.device), counts
        )
    return out


@lru_cache(maxsize=64)
def _upload(scales: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(scales, dtype=torch.float32, device=device)


class _VectorLatentUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        flat: Tensor,
        turned: Tensor,
        scales: Tensor,
        counts: tuple[int, int, int],
    ) -> tuple[Tensor, Tensor]:
        rounds, steps, plain = counts
        batch, hidden = x.shape
        x = x.contiguous()
        y, z = (t.clone(memory_format=torch.contiguous_format) for t in (y, z))
        grad_rounds = rounds - plain
        y_states = x.new_empty((grad_rounds, batch, hidden))
        z_states = x.new_empty((grad_rounds * steps + (grad_rounds > 0), batch, hidden))
        act = torch.empty_like(x)
        constants, options = _launch(hidden)
        with _on(x.device):
            vector_forward_kernel[(triton.cdiv(batch, BLOCK),)](
                x, y, z, act, turned, scales, y_states, z_states, batch, *counts,
                **constants, **options,
            )  # fmt: skip
        ctx.counts = counts
        ctx.save_for_backward(x, flat, turned, scales, y_states, z_states)
        return y, z

    @staticmethod
    @once_differentiable("vector_latent_update")
    def backward(ctx: Any, dy: Tensor, dz: Tensor) -> tuple[Any, ...]:
        x, flat, turned, scales, y_states, z_states = ctx.saved_tensors
        rounds, steps, plain = ctx.counts
        batch, hidden = x.shape
        grad_rounds, programs = rounds - plain, triton.cdiv(batch, BLOCK)
        grad_steps = grad_rounds * steps
        dx = torch.empty_like(x)
        dy, dz = (t.clone(memory_format=torch.contiguous_format) for t in (dy, dz))
        updates = grad_steps + grad_rounds
        act, out, into = (x.new_empty((updates, batch, hidden)) for _ in range(3))
        of_round, total = x.new_empty((grad_rounds, batch, hidden)), torch.empty_like(x)
        work = x.new_empty((6, batch, hidden), dtype=torch.float32)
        sums = x.new_empty((updates, programs, VECTORS, hidden), dtype=torch.float32)
        constants, options = _launch(hidden)
        with _on(x.device):
            vector_backward_kernel[(programs,)](
                x, dx, dy, dz, flat, turned, scales, y_states, z_states, act, out, into,
                of_round, total, work, sums, batch, *ctx.counts, **constants, **options,
            )  # fmt: skip
        into_z, into_y = into[:grad_steps], into[grad_steps:]
        squares = (
            ((total, x), (of_round, y_states), (into_z, z_states[:-1])),
            ((out[:grad_steps], act[:grad_steps]),),
            ((into_y, y_states), (into_y, z_states[steps::steps])),
            ((out[grad_steps:], act[grad_steps:]),),
        )
        matrices = [[_over_rows(*sides) for sides in parts] for parts in squares]
        z_vectors, y_vectors = (
            part.sum((0, 1)).to(x.dtype) for part in sums.split((grad_steps, grad_rounds))
        )
        parts = [
            *matrices[0], z_vectors[0], *matrices[1], z_vectors[1:],
            *matrices[2], y_vectors[0], *matrices[3], y_vectors[1:],
        ]  # fmt: skip
        starts = (dy, dz) if plain == 0 else (None, None)
        return dx, *starts, torch.cat([part.reshape(-1) for part in parts]), None, None, None


def _in_squares(weight: Tensor, transposed: bool = False) -> Tensor:
    """Returns the elements of a weight, square by square."""
    if weight.dim() == 1:
        return weight
    squares = weight.unflatten(1, (-1, weight.shape[0])).movedim(1, 0)
    return (squares.mT if transposed else squares).reshape(-1)


def _over_rows(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, summed over the rows of all steps."""
    return left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _launch(hidden: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns constants and launch options of both kernels; larger tiles would spill."""
    constants = {"H": hidden, "EPS": EPS, "BLOCK": BLOCK, "BLOCK_K": BLOCK_K}
    warps = 8 if hidden > 64 else 4
    # A thread may have all registers; the assembler would spill a few bytes to make room for more.
    return constants, {"num_warps": warps, "num_stages": 2, "maxnreg": 255}


def specialisations() -> list[dict[str, Any]]:
    """Returns the kinds of launch that are compiled for every target without a GPU, as a check."""
    kinds = []
    for dtype in (torch.float32, torch.bfloat16):
        for hidden in (32, 64, 128):
            for kernel in (vector_forward_kernel, vector_backward_kernel):
                constants, options = _launch(hidden)
                kinds.append(_kind(kernel, dtype, constants, options))
    return kinds


def _kind(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], options: dict[str, int]
) -> dict[str, Any]:
    types = {"scale_ptr": "*fp32", "work_ptr": "*fp32", "sums_ptr": "*fp32"}
    types |= dict.fromkeys(("batch", "rounds", "steps", "plain"), "i32")
    names = [name for name in kernel.arg_names if name not in constants]
    return {
        "kernel": kernel.__name__,
        "signature": {name: types.get(name, _TYPES[dtype]) for name in names},
        "constants": constants,
        "options": options,
        "aligned": [name for name in names if name.endswith("_ptr")],
    }
