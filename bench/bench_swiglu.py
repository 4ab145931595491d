"""SwiGLU: ours beside plain torch and torch.compile, with the memory that each keeps for backward.

The reference is plain torch. Sizes are those of a tiny recursive model of width 512. Before
anything is timed, the results of each variant are compared with the formula in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import trm_fast
from trm_fast.ops import OPS, swiglu

from ._report import Row, Run, Table, in_bytes
from ._timing import Job, interleave

PLAIN = "trm_fast reference"
WIDTH, INNER = 512, 1536
# Rows, dtype.
SIZES = {
    "cpu": [(4 * 97, torch.float32), (16 * 97, torch.float32), (16 * 97, torch.bfloat16)],
    "cuda": [(768 * 97, torch.float32), (768 * 97, torch.bfloat16)],
}
CASES = [(device, *size) for device, sizes in SIZES.items() for size in sizes]

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Variant:
    """A way to compute the network."""

    name: str
    network: Network


def variants(device: str) -> Iterator[Variant]:
    states = trm_fast.backends()["swiglu"][device]
    for backend in OPS["swiglu"].order[device]:
        if states[backend] in ("usable", "chosen"):
            yield Variant(f"trm_fast {backend}", _ours(backend))
    torch._dynamo.reset()  # or the compiler gives up on what it has compiled for many sizes
    yield Variant("torch.compile", torch.compile(_ours("reference"), dynamic=False))


def _ours(backend: str) -> Network:
    return lambda x, gate_up, down: swiglu(x, gate_up, down, backend=backend)


class Workload:
    """The tensors that all variants share, and the truth."""

    def __init__(self, rows: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = ((rows, WIDTH), (2 * INNER, WIDTH), (WIDTH, INNER), (rows, WIDTH))
        scales = (1.0, WIDTH**-0.5, INNER**-0.5, 1.0)
        drawn = [
            (torch.randn(shape, generator=generator) * scale).to(device, dtype)
            for shape, scale in zip(shapes, scales, strict=True)
        ]
        self.inputs, self.dout = drawn[:3], drawn[3]
        self.leaves = [tensor.clone().requires_grad_() for tensor in self.inputs]
        doubles = [tensor.double().requires_grad_() for tensor in self.inputs]
        gate, up = (doubles[0] @ doubles[1].T).chunk(2, 1)
        out = (gate * torch.sigmoid(gate) * up) @ doubles[2].T
        self.truth = out.detach(), *torch.autograd.grad(out, doubles, self.dout.double())

    def both_ways(self, network: Network) -> tuple[Tensor, ...]:
        out = network(*self.leaves)
        return out, *torch.autograd.grad(out, self.leaves, self.dout)

    def forward(self, network: Network) -> Tensor:
        with torch.no_grad():
            return network(*self.inputs)

    def check(self, variant: Variant) -> None:
        """Raises AssertionError where a result is off by more than eight roundings of its dtype, of
        which plain torch makes six, or by sums of thousands of terms in float32."""
        bound = 8 * torch.finfo(self.dout.dtype).eps + 4096 * 2.0**-24
        for found, true in zip(self.both_ways(variant.network), self.truth, strict=True):
            error = float((found.detach().double() - true).abs().max() / true.abs().max())
            if not error <= bound:
                raise AssertionError(f"{variant.name}: error must be <= {bound:.1g}; got {error}")

    def kept(self, variant: Variant) -> int:
        """Returns the bytes that a call keeps for backward, beyond x and the weights."""
        given = {tensor.data_ptr() for tensor in self.leaves}
        found: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = variant.network(*self.leaves)
        del out
        return sum(found.values())


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("device", "rows", "dtype"), CASES, ids=str)
def test_swiglu(device: str, rows: int, dtype: torch.dtype, backward: bool, run: Run) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        run.skipped["cuda"] = "torch finds no CUDA device"
        pytest.skip(run.skipped["cuda"])
    workload = Workload(rows, dtype, device)
    chosen = list(variants(device))
    for variant in chosen:
        workload.check(variant)
    call = workload.both_ways if backward else workload.forward
    jobs = [_job(variant, call) for variant in chosen]
    interleave(jobs, run.rounds, device)
    done = "forward and backward" if backward else "forward"
    shape = f"{rows} x {WIDTH} to {INNER} to {WIDTH} {str(dtype).removeprefix('torch.')}"
    timed = [Row(job.name, job.seconds, None) for job in jobs]
    table = Table(f"SwiGLU, {done}, {shape}, {device}", timed, PLAIN, "")
    table.notes = _notes(workload, chosen, timed, 3 * 2 * (3 if backward else 1) * rows)
    run.tables.append(table)


def _notes(
    workload: Workload, chosen: Sequence[Variant], timed: Sequence[Row], flops: int
) -> list[str]:
    """The second computation of gate and up is not counted: it is no part of the task."""
    return [
        f"{variant.name}: {flops * WIDTH * INNER / row.median / 1e9:.0f} GFLOP/s; keeps "
        f"{in_bytes(workload.kept(variant))} for backward"
        for variant, row in zip(chosen, timed, strict=True)
    ]


def _job(variant: Variant, call: Callable[[Network], object]) -> Job:
    return Job(variant.name, lambda: call(variant.network))
