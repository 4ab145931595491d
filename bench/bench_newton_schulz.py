"""Newton-Schulz: ours by backend, method and dtype beside the loop of torch.optim.Muon.

All take five steps with torch's coefficients from bfloat16 matrices, as a momentum in bfloat16
gives them. Before anything is timed, each result is compared with the same steps in float64. Below
a table stand the rate of each variant, its share of the rate of a plain bf16 product measured in
the same run, its error, and the range of the singular values that it leaves.
"""

import pytest
import torch
from torch import Tensor

from trm_fast.ops import OPS, newton_schulz

from ._newton_schulz_variants import (
    GEMM,
    KELLER,
    STEPS,
    TORCH,
    Variant,
    flops,
    our_variants,
    torch_variant,
)
from ._report import Row, Run, Table
from ._timing import Job, interleave

TRM = [(1536, 512), (512, 512), (3072, 512), (512, 1536)]
SIZES = {
    "TRM 7M": TRM * 2,
    "512x512": [(512, 512)],
    "512x768": [(512, 768)],
    "512x1024": [(512, 1024)],
    "512x1536": [(512, 1536)],
    "128x128": [(128, 128)],
    "8 of 128x128": [(128, 128)] * 8,
    "3072x512": [(3072, 512)],
    "320x1280": [(320, 1280)],
}


class Workload:
    """Matrices that all variants share, and what the steps make of them in float64."""

    def __init__(self, shapes: list[tuple[int, int]], device: str) -> None:
        self.device, self.shapes = device, shapes
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        self.start = [matrix.to(device, torch.bfloat16) for matrix in drawn]
        self.matrices = [matrix.clone() for matrix in self.start]
        self.truth = [newton_schulz(matrix.double(), STEPS, KELLER) for matrix in self.start]

    def reset(self) -> None:
        torch._foreach_copy_(self.matrices, self.start)

    def judge(self, variant: Variant) -> tuple[float, Tensor]:
        """Returns the largest relative error, and the singular values of the first result.

        Raises:
            AssertionError: the error is more than bfloat16 explains.
        """
        self.reset()
        variant.run(self.matrices)
        pairs = zip(self.matrices, self.truth, strict=True)
        error = max(float((found.double() - true).norm() / true.norm()) for found, true in pairs)
        # 15 or 25 stored matrices, each off by 2^-9, and slopes of at most 3.4 at each step.
        if not error <= 25 * 3.4 * 2**-9:
            raise AssertionError(f"{variant.name}: error must be below 0.17; got {error:.2g}")
        return error, torch.linalg.svdvals(self.matrices[0].double())


def _gemm_job(device: str) -> Job:
    a = torch.randn(1024, 1024).to(device, torch.bfloat16)
    return Job(GEMM, lambda: a @ a)


def _notes(workload: Workload, table: Table, judged: dict[str, tuple[float, Tensor]]) -> list[str]:
    peak = 2 * 1024**3 / table.row(GEMM).median
    notes = [f"{GEMM}: {peak / 1e9:.0f} GFLOP/s"]
    for name, (error, values) in judged.items():
        work = sum(flops(shape, name) for shape in workload.shapes)
        rate = work / table.row(name).median
        notes.append(
            f"{name}: {work / 1e9:.3g} GFLOP at {rate / 1e9:.0f} GFLOP/s, {rate / peak:.0%} of the "
            f"product; error {error:.4f}; singular values {values.min():.3f} to {values.max():.3f}"
        )
    return notes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SIZES)
def test_newton_schulz(name: str, device: str, run: Run) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        run.skipped["cuda"] = "torch finds no CUDA device"
        pytest.skip(run.skipped["cuda"])
    workload = Workload(SIZES[name], device)
    ours = our_variants(device)
    judged = {variant.name: workload.judge(variant) for variant in [torch_variant(False), *ours]}
    timed = [torch_variant(True), *ours]
    jobs = [_job(workload, variant) for variant in timed]
    gemm = _gemm_job(device)
    interleave([*jobs, gemm], run.rounds, device)
    rows = [Row(job.name, job.seconds, None) for job in [*jobs, gemm]]
    table = Table(f"Newton-Schulz, {name} on {device}", rows, TORCH, "")
    table.notes = _notes(workload, table, judged)
    run.tables.append(table)


def _job(workload: Workload, variant: Variant) -> Job:
    return Job(variant.name, lambda: variant.run(workload.matrices), workload.reset)


# How the result of 256 x 768 depends on form and dtype: rounding, the condition and the rank.
FORMS = {
    "standard fp32": ("standard", torch.float32),
    "gram fp32": ("gram", torch.float32),
    "standard bf16": ("standard", torch.bfloat16),
    "gram bf16": ("gram", torch.bfloat16),
}


def _inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    gaussian = torch.randn(256, 768, dtype=torch.float64)
    u, _, v = torch.linalg.svd(gaussian, full_matrices=False)
    return {
        "Gaussian": gaussian,
        "Gaussian, square": torch.randn(256, 256, dtype=torch.float64),
        "condition 1e6": u * torch.logspace(0, -6, 256, dtype=torch.float64) @ v,
        "rank 16": gaussian[:, :16] @ torch.randn(16, 768, dtype=torch.float64),
        "rank 1": gaussian[:, :1] @ torch.randn(1, 768, dtype=torch.float64),
    }


@pytest.mark.parametrize("coefficients", ["polar_express", "keller", "you"])
def test_accuracy(coefficients: str, run: Run) -> None:
    """Nothing is timed: error to the same steps in float64, and extreme singular values."""
    notes = []
    for name, x in _inputs().items():
        true = newton_schulz(x, STEPS, coefficients, "standard")
        for form, (method, dtype) in FORMS.items():
            for backend in ("reference", "cpp"):
                if dtype != torch.bfloat16 and backend == "cpp":
                    continue
                found = _result(x, coefficients, method, dtype, backend)
                if found is None:
                    continue
                error = float((found - true).norm() / true.norm())
                values = torch.linalg.svdvals(found)
                assert values.max() < 1.5
                notes.append(
                    f"{name:17} {form:13} {backend:9} error {error:8.1e}  singular values "
                    f"{values.min():.1e} to {values.max():.3f}, median {values.median():.3f}"
                )
    run.tables.append(Table(f"Newton-Schulz, accuracy of {coefficients}", [], "", "", {}, notes))


def _result(
    x: Tensor, coefficients: str, method: str, dtype: torch.dtype, backend: str
) -> Tensor | None:
    if OPS["newton_schulz"].reason(backend, "cpu", frozenset({dtype})):
        return None
    options = {"dtype": dtype, "backend": backend}
    return newton_schulz(x.float(), STEPS, coefficients, method, **options).double()
