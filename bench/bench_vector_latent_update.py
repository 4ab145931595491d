"""The recursion on vectors: ours beside eager torch and torch.compile, forward and whole step.

T = 3 levels of n = 6 steps, y once per level, gradients of the last level, as a classifier trains.
Before anything is timed, results are compared with the same recursion in float64. Below a table
stand the rates: of torch.mm at the shape of the batch, and of each forward pass, by the
multiply-adds of the formula read literally, 81 h^2 for each row, of which ours computes 49 h^2.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from trm_fast.ops import OPS, vector_latent_update

from ._report import Row, Run, Table
from ._timing import Job, interleave

SIZES = [(128, 32), (128, 256), (256, 32), (256, 256)]
N, T = 6, 3
EAGER, COMPILED, GEMM = "eager", "torch.compile", "torch.mm, 20 times"
PRODUCTS = 20
Recursion = Callable[..., tuple[Tensor, Tensor]]


def plain(x: Tensor, y: Tensor, z: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The recursion as one writes it in torch."""
    for level in range(T):
        with torch.set_grad_enabled(torch.is_grad_enabled() and level == T - 1):
            for _ in range(N):
                z = z + _network(torch.cat((x, y, z), 1), *weights[:6])
            y = y + _network(torch.cat((y, z), 1), *weights[6:])
    return y, z


def _network(
    v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gain: Tensor, shift: Tensor
) -> Tensor:
    return layer_norm(linear(gelu(linear(v, w1, b1)), w2, b2), gain.shape, gain, shift)


class Workload:
    """States, weights and a gradient of y, shared by all variants."""

    def __init__(self, hidden: int, batch: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.x, self.y, self.z, self.grad = (draw(batch, hidden) for _ in range(4))
        self.x.requires_grad_()
        self.weights = []
        for parts in (3, 2):
            for columns in (parts * hidden, hidden):
                self.weights += [draw(hidden, columns) / columns**0.5, 0.3 * draw(hidden)]
            self.weights += [1 + 0.3 * draw(hidden), 0.3 * draw(hidden)]
        self.leaves = [self.x, *(weight.requires_grad_() for weight in self.weights)]
        with torch.no_grad():
            doubles = [t.double() for t in (self.x, self.y, self.z, *self.weights)]
            self.truth = plain(*doubles[:3], doubles[3:])

    def forward(self, run: Recursion) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return run(self.x, self.y, self.z, self.weights)

    def step(self, run: Recursion) -> tuple[Tensor, ...]:
        y, _ = run(self.x, self.y, self.z, self.weights)
        return torch.autograd.grad(y, self.leaves, self.grad)

    def judge(self, name: str, run: Recursion) -> None:
        """Raises an AssertionError if the states are wrong."""
        for found, true in zip(self.forward(run), self.truth, strict=True):
            error = float((found.double() - true).norm() / true.norm())
            # 21 updates, each with some roundings.
            if not error < 1e-5:
                raise AssertionError(f"{name}: error must be below 1e-5; got {error:.2g}")


def _variants(device: str, hidden: int) -> dict[str, Recursion]:
    backend = "cpp" if device == "cpu" else "triton"
    found: dict[str, Recursion] = {EAGER: plain, COMPILED: torch.compile(plain)}
    reason = OPS["vector_latent_update"].reason(backend, device, frozenset({torch.float32}))
    if reason is None:
        for recompute in (True, False):

            def ours(
                x: Tensor, y: Tensor, z: Tensor, weights: list[Tensor], recompute: bool = recompute
            ) -> tuple[Tensor, Tensor]:
                return vector_latent_update(
                    x, y, z, weights, n=N, T=T, recompute=recompute, backend=backend
                )

            found[f"trm_fast {backend}" + ("" if recompute else ", kept")] = ours
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("hidden", "batch"), SIZES)
def test_vector_latent_update(hidden: int, batch: int, device: str, run: Run) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        run.skipped["cuda"] = "torch finds no CUDA device"
        pytest.skip(run.skipped["cuda"])
    if device == "cuda" and hidden > 128:
        pytest.skip("triton runs hidden sizes up to 128")
    torch._dynamo.reset()
    workload = Workload(hidden, batch, device)
    variants = _variants(device, hidden)
    for name, variant in variants.items():
        workload.judge(name, variant)
        workload.step(variant)
    for what, method in (("forward", workload.forward), ("step", workload.step)):
        # What is kept makes no difference without a backward pass.
        names = [name for name in variants if what == "step" or not name.endswith("kept")]
        jobs = [Job(name, partial(method, variants[name])) for name in names]
        gemm = _gemm_job(hidden, batch, device)
        interleave([*jobs, gemm], run.rounds, device)
        rows = [Row(job.name, job.seconds, None) for job in [*jobs, gemm]]
        table = Table(f"Vectors, {what}, h{hidden} B{batch} on {device}", rows, COMPILED, "")
        if what == "forward":
            table.notes = _notes(table, hidden, batch)
        run.tables.append(table)


def _gemm_job(hidden: int, batch: int, device: str) -> Job:
    a, b = (torch.randn(rows, hidden, device=device) for rows in (batch, hidden))

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b)

    return Job(GEMM, products)


def _notes(table: Table, hidden: int, batch: int) -> list[str]:
    peak = PRODUCTS * 2 * batch * hidden**2 / table.row(GEMM).median
    notes = [f"torch.mm [{batch}, {hidden}] x [{hidden}, {hidden}]: {peak / 1e9:.0f} GFLOP/s"]
    for row in table.rows:
        if row.name != GEMM:
            rate = 2 * 81 * batch * hidden**2 / row.median
            notes.append(f"{row.name}: {rate / 1e9:.0f} GFLOP/s, {rate / peak:.0%} of torch.mm")
    return notes
