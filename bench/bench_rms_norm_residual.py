"""RMS norm of a sum: ours beside plain torch, torch's own norm, and torch.compile.

Each table is one size, dimension and dtype, forward alone (without gradients) or forward and
backward. Before anything is timed, the results of each variant are compared with the formula in
float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import trm_fast
from trm_fast.ops import OPS, rms_norm_residual

from ._report import Row, Run, Table
from ._timing import Job, interleave

PLAIN = "torch operators"
COPY = "copy_"
LENGTH, WIDTH, EPS = 97, 512, 1e-5
# Samples of a batch, dtype.
SIZES = {
    "cpu": [(4, torch.float32), (16, torch.float32), (16, torch.bfloat16)],
    "cuda": [(768, torch.float32), (768, torch.bfloat16)],
}
CASES = [(device, *size) for device, sizes in SIZES.items() for size in sizes]

Norm = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Variant:
    """A way to take the norm; ``one_pass`` says that it reads and writes each tensor once."""

    name: str
    norm: Norm
    one_pass: bool


def plain(x: Tensor, residual: Tensor, dim: int) -> Tensor:
    h = x + residual
    return h * torch.rsqrt(h.square().mean(dim, keepdim=True) + EPS)


def variants(dim: int, device: str) -> Iterator[Variant]:
    states = trm_fast.backends()["rms_norm_residual"][device]
    for backend in OPS["rms_norm_residual"].order[device]:
        if states[backend] in ("usable", "chosen"):
            yield Variant(f"trm_fast {backend}", _ours(dim, backend), backend != "reference")
    yield Variant(PLAIN, lambda x, y: plain(x, y, dim), False)
    if dim == -1:
        theirs = torch.nn.functional.rms_norm
        yield Variant("add, F.rms_norm", lambda x, y: theirs(x + y, (WIDTH,), eps=EPS), False)
    torch._dynamo.reset()  # or the compiler gives up on what it has compiled for many sizes
    yield Variant("torch.compile", torch.compile(_ours(dim, "reference"), dynamic=False), True)


def _ours(dim: int, backend: str) -> Norm:
    return lambda x, y: rms_norm_residual(x, y, dim=dim, eps=EPS, backend=backend)


class Workload:
    """The tensors that all variants share, and the truth."""

    def __init__(self, samples: int, dtype: torch.dtype, device: str, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randn(samples, LENGTH, WIDTH, generator=generator) for _ in range(3))
        self.x, self.residual, self.dout = (tensor.to(device, dtype) for tensor in drawn)
        self.leaves = [t.clone().requires_grad_() for t in (self.x, self.residual)]
        doubles = [t.detach().double().requires_grad_() for t in self.leaves]
        out = plain(*doubles, dim)
        self.truth = out.detach(), *torch.autograd.grad(out, doubles, self.dout.double())

    def both_ways(self, norm: Norm) -> tuple[Tensor, ...]:
        out = norm(*self.leaves)
        return out, *torch.autograd.grad(out, self.leaves, self.dout)

    def forward(self, norm: Norm) -> Tensor:
        with torch.no_grad():
            return norm(self.x, self.residual)

    def check(self, variant: Variant) -> None:
        """Raises AssertionError where a result is off by more than eight roundings of its dtype,
        of which plain torch makes six, or by sums of hundreds of terms in float32."""
        bound = 8 * torch.finfo(self.x.dtype).eps + 512 * 2.0**-24
        for found, true in zip(self.both_ways(variant.norm), self.truth, strict=True):
            error = float((found.detach().double() - true).abs().max() / true.abs().max())
            if not error <= bound:
                raise AssertionError(f"{variant.name}: error must be <= {bound:.1g}; got {error}")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize(("device", "samples", "dtype"), CASES, ids=str)
def test_rms_norm_residual(
    device: str, samples: int, dtype: torch.dtype, dim: int, backward: bool, run: Run
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        run.skipped["cuda"] = "torch finds no CUDA device"
        pytest.skip(run.skipped["cuda"])
    workload = Workload(samples, dtype, device, dim)
    chosen = list(variants(dim, device))
    for variant in chosen:
        workload.check(variant)
    call = workload.both_ways if backward else workload.forward
    jobs = [_job(variant, call) for variant in chosen]
    target = torch.empty_like(workload.x)
    copy = Job(COPY, lambda: target.copy_(workload.x))
    interleave([*jobs, copy], run.rounds, device)
    moved = (6 if backward else 3) * workload.x.nbytes
    rows = [
        Row(job.name, job.seconds, moved if variant.one_pass else None)
        for variant, job in zip(chosen, jobs, strict=True)
    ]
    rows.append(Row(COPY, copy.seconds, 2 * target.nbytes))
    over = "features" if dim == -1 else "sequence"
    done = "forward and backward" if backward else "forward"
    shape = f"{samples} x {LENGTH} x {WIDTH} {str(dtype).removeprefix('torch.')}"
    run.tables.append(
        Table(f"RMS norm over the {over}, {done}, {shape}, {device}", rows, PLAIN, COPY)
    )


def _job(variant: Variant, call: Callable[[Norm], object]) -> Job:
    return Job(variant.name, lambda: call(variant.norm))
