"""The sums of two filters and of clipping: ours beside the torch operators that give the same.

Each item measures all variants of one model size on one device, in turns, after it has checked
that their sums are right.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import trm_fast
from trm_fast._dispatch import ORDER
from trm_fast.ops import FilterSums

from ._report import Row, Run, Table
from ._timing import Job, interleave
from .bench_adaptive_step import COPY, SIZES

DOTS = "torch dots of each tensor"
NORM = "torch._foreach_norm, squares alone"


@dataclass(eq=False)
class Variant:
    """A way to take the sums.

    Args:
        name: its row in the table.
        step: takes the sums, and returns them as a tensor of shape [tensors, 3].
        bytes_per_element: what it reads.
        means: whether it takes the sums with means too.
        one_pass: ``bytes_per_element`` is the least that can be read.
    """

    name: str
    step: Callable[[], Tensor]
    bytes_per_element: int
    means: bool = True
    one_pass: bool = True


def _variants(grads: list[Tensor], means: list[Tensor], device: str) -> Iterator[Variant]:
    states = trm_fast.backends()["filter_sums"][device]
    for backend in ORDER[device]:
        if states[backend] in ("usable", "chosen"):
            for kept in (means, []):
                yield _our(grads, kept, backend)

    def dots() -> Tensor:
        """One reduction for each tensor and sum; each reads both of its operands."""
        flat = [(g.view(-1), mu.view(-1)) for g, mu in zip(grads, means, strict=True)]
        sums = [torch.dot(x, y) for g, mu in flat for x, y in ((g, mu), (g, g), (mu, mu))]
        return torch.stack(sums).view(-1, 3)

    def norms() -> Tensor:
        square = torch.stack(torch._foreach_norm(grads)).square()
        return torch.stack((0 * square, square, 0 * square), 1)

    yield Variant(DOTS, dots, 16, one_pass=False)
    yield Variant(NORM, norms, 4, means=False)


def _our(grads: list[Tensor], means: list[Tensor], backend: str) -> Variant:
    call = FilterSums(grads, means, backend=backend)
    name = f"trm_fast {backend}" + ("" if means else ", squares alone")
    one_pass = backend != "reference"
    return Variant(name, lambda: call(grads), 8 if means else 4, bool(means), one_pass)


def _check(variant: Variant, grads: list[Tensor], means: list[Tensor]) -> None:
    """Raises AssertionError where a sum is off: all terms are below 1, and no variant adds more
    than 4096 of them in float32 before it goes on in pairs or in float64."""
    for row, g, mu in zip(variant.step().double(), grads, means, strict=True):
        g, mu = g.double(), mu.double() * variant.means
        true = torch.stack([(g * mu).sum(), (g * g).sum(), (mu * mu).sum()])
        if not bool(((row - true).abs() <= 4096 * 2.0**-24 * g.numel()).all()):
            raise AssertionError(f"{variant.name}: sums must be {true}; got {row}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SIZES)
def test_filter_sums(name: str, device: str, run: Run) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        run.skipped["cuda"] = "torch finds no CUDA device"
        pytest.skip(run.skipped["cuda"])
    generator = torch.Generator().manual_seed(0)
    grads, means = (
        [(torch.rand(shape, generator=generator) * 2 - 1).to(device) for shape in SIZES[name]]
        for _ in range(2)
    )
    variants = list(_variants(grads, means, device))
    for variant in variants:
        _check(variant, grads, means)
    size = sum(grad.numel() for grad in grads)
    source = torch.rand(size, device=device)
    target = torch.empty_like(source)
    # What a backward pass has just written is warm, as is what a step has written before.
    jobs = [Job(variant.name, variant.step) for variant in variants]
    copy = Job(COPY, lambda: target.copy_(source))
    interleave([*jobs, copy], run.rounds, device)
    rows = [
        Row(variant.name, job.seconds, variant.bytes_per_element * size, variant.one_pass)
        for variant, job in zip(variants, jobs, strict=True)
    ]
    title = f"sums, {name} on {device}: {size:,} elements in {len(grads)} tensors"
    table = Table(title, [*rows, Row(COPY, copy.seconds, 2 * source.nbytes)], DOTS, COPY)
    table.notes = _notes(table, rows[0].name)
    run.tables.append(table)


def _notes(table: Table, ours: str) -> list[str]:
    both, alone = table.row(ours), table.row(f"{ours}, squares alone")
    dots, norm = table.row(DOTS), table.row(NORM)
    return [
        f"{ours}, of this run:",
        f"  {dots.median / both.median:.2f}x as fast as {DOTS}",
        f"  {norm.median / alone.median:.2f}x as fast as {NORM}",
    ]
