"""RMS norm of a sum: ours beside plain torch, torch's own norm, and torch.compile.

Each table is one size, dimension and dtype, forward alone (without gradients) or forward and
backward. A row is measured after its results were compared with the formula in float64.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import trm_fast
from trm_fast.ops import OPS, rms_norm_residual

from ._tables import DEVICES, Case, Row, Unavailable, rows_of

OURS, PLAIN, TORCH, COMPILED = "trm_fast ", "torch operators", "add, F.rms_norm", "torch.compile"
COPY = "copy_"
# They read and write each tensor once.
FAST = ("trm_fast cpp", "trm_fast cuda", "trm_fast triton")
LENGTH, WIDTH, EPS = 97, 512, 1e-5
# Samples of a batch, dtype.
SIZES = {
    "cpu": [(4, torch.float32), (16, torch.float32), (16, torch.bfloat16)],
    "cuda": [(768, torch.float32), (768, torch.bfloat16)],
}

Norm = Callable[[Tensor, Tensor], Tensor]


def plain(x: Tensor, residual: Tensor, dim: int) -> Tensor:
    h = x + residual
    return h * torch.rsqrt(h.square().mean(dim, keepdim=True) + EPS)


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

    def check(self, name: str, norm: Norm) -> None:
        """Raises AssertionError where a result is off by more than eight roundings of its dtype,
        of which plain torch makes six, or by sums of hundreds of terms in float32."""
        bound = 8 * torch.finfo(self.x.dtype).eps + 512 * 2.0**-24
        for found, true in zip(self.both_ways(norm), self.truth, strict=True):
            error = float((found.detach().double() - true).abs().max() / true.abs().max())
            if not error <= bound:
                raise AssertionError(f"{name}: error must be <= {bound:.1g}; got {error}")


class RMSNormTable:
    """Variants of one size, dimension and pass."""

    baselines = (PLAIN,)
    floor = COPY
    unit = "B"

    def __init__(self, device: str, samples: int, dtype: torch.dtype, dim: int, pass_: str) -> None:
        self.device, self.dim, self.backward = device, dim, pass_ == "backward"
        self.workload = Workload(samples, dtype, device, dim)
        torch._dynamo.reset()  # or the compiler gives up on what it has compiled for many sizes

    def row(self, name: str) -> Row:
        work = self.workload
        if name == COPY:
            target = torch.empty_like(work.x)
            return Row(lambda: target.copy_(work.x), work=2 * target.nbytes)
        norm = self._norm(name)
        work.check(name, norm)
        one_pass = name in (COMPILED, *FAST)
        moved = (6 if self.backward else 3) * work.x.nbytes if one_pass else None
        call = work.both_ways if self.backward else work.forward
        return Row(lambda: call(norm), work=moved)

    def _norm(self, name: str) -> Norm:
        dim = self.dim
        if name == PLAIN:
            return lambda x, y: plain(x, y, dim)
        if name == TORCH:
            theirs = torch.nn.functional.rms_norm
            return lambda x, y: theirs(x + y, (WIDTH,), eps=EPS)
        if name == COMPILED:
            return torch.compile(_ours(dim, "reference"), dynamic=False)
        backend = name.removeprefix(OURS)
        reason = trm_fast.backends()["rms_norm_residual"][self.device][backend]
        if reason not in ("usable", "chosen"):
            raise Unavailable(reason)
        return _ours(dim, backend)


def _case(device: str, samples: int, dtype: torch.dtype, dim: int, pass_: str) -> Case:
    over, short = {-1: "features", -2: "sequence"}[dim], str(dtype).removeprefix("torch.")
    names = [f"{OURS}{backend}" for backend in OPS["rms_norm_residual"].order[device]]
    rows = (*names, PLAIN, *([TORCH] if dim == -1 else []), COMPILED, COPY)
    return Case(
        f"{device}-{samples}-{short}-{over}-{pass_}",
        f"RMS norm over the {over}, {pass_}, {samples} x {LENGTH} x {WIDTH} {short}, {device}",
        partial(RMSNormTable, device, samples, dtype, dim, pass_), rows,
        default=(samples, dtype) in ((16, torch.bfloat16), (768, torch.bfloat16)) and dim == -2,
    )  # fmt: skip


test_rms_norm_residual = rows_of(
    _case(device, *size, dim, pass_)
    for device in DEVICES
    for size in SIZES[device]
    for dim in (-1, -2)
    for pass_ in ("forward", "backward")
)
