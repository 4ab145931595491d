"""Newton-Schulz: ours by backend, method and dtype beside the loop of torch.optim.Muon.

All take five steps with torch's coefficients from bfloat16 matrices, as a momentum in bfloat16
gives them. A row is measured after its result was compared with the same steps in float64.
"""

from functools import partial

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
    our_names,
    torch_alone,
    variant,
)
from ._session import Bench
from ._tables import DEVICES, MORE, Case, Row, rows_of

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
# Those that are measured by default.
FEW = ("TRM 7M", "512x512", "128x128", "8 of 128x128")


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


class NewtonSchulz:
    """Variants on shared matrices, beside one large product."""

    baselines = (TORCH,)
    floor = GEMM
    unit = "FLOP"

    def __init__(self, size: str, device: str) -> None:
        self.device = device
        self.workload = Workload(SIZES[size], device)

    def row(self, name: str) -> Row:
        if name == GEMM:
            a = torch.randn(1024, 1024).to(self.device, torch.bfloat16)
            return Row(lambda: a @ a, work=2 * 1024**3)
        error, values = self.workload.judge(variant(name, self.device))
        timed = torch_alone if name == TORCH else variant(name, self.device).run
        matrices = self.workload.matrices
        facts = {"error": error, "singular_values": f"{values.min():.2f}-{values.max():.2f}"}
        work = sum(flops(shape, name) for shape in self.workload.shapes)
        return Row(lambda: timed(matrices), self.workload.reset, work=work, facts=lambda: facts)


def _case(size: str, device: str) -> Case:
    fast, more = our_names(device)
    return Case(
        f"{size}-{device}", f"Newton-Schulz, {size}, {device}",
        partial(NewtonSchulz, size, device), (TORCH, *fast, GEMM), more, default=size in FEW,
    )  # fmt: skip


test_newton_schulz = rows_of(_case(size, device) for device in DEVICES for size in SIZES)


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


@getattr(pytest.mark, MORE)
@pytest.mark.parametrize("coefficients", ["polar_express", "keller", "you"])
def test_accuracy(coefficients: str, bench: Bench) -> None:
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
    bench.notes[f"Newton-Schulz, accuracy of {coefficients}"] = notes


def _result(
    x: Tensor, coefficients: str, method: str, dtype: torch.dtype, backend: str
) -> Tensor | None:
    if OPS["newton_schulz"].reason(backend, "cpu", frozenset({dtype})):
        return None
    options = {"dtype": dtype, "backend": backend}
    return newton_schulz(x.float(), STEPS, coefficients, method, **options).double()
