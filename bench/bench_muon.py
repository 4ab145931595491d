"""A step of Muon on the hidden matrices of a TRM: ours, torch's, and the share of Newton-Schulz.

All variants are measured in turns, after they have taken the same steps as the formula in float64.
The notes below a table are computed from that table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from trm_fast import BackendError, MuGrokfast, Muon
from trm_fast._dispatch import BACKENDS
from trm_fast.ops import newton_schulz_

from ._report import Row, Run, Table
from ._timing import Job, extra_bytes, interleave
from .bench_adaptive_step import SIZES, Workload

SHAPES = [shape for shape in SIZES["TRM 7M"] if min(shape) > 64]  # without the two heads
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS, EPS = 5, 1e-7
LR, WEIGHT_DECAY, MOMENTUM = 0.02, 0.1, 0.95
ALPHA, LAMB = 0.98, 0.3
CHECKED_STEPS = 3
# bfloat16 rounds by 2^-9, of which five steps of Newton-Schulz make 1 % of an update of a random
# matrix; three times that is a step, and half as much again no longer is.
BOUND = 0.03

TORCH = "torch.optim.Muon"
NAMES = {
    "muon": "trm_fast Muon {}",
    "mugrokfast": "trm_fast MuGrokfast {}, ema",
    "newton_schulz": "newton_schulz_ {} alone",
}


@dataclass(frozen=True)
class Variant:
    """An optimizer on the shared parameters."""

    name: str
    optimizer: torch.optim.Optimizer
    filtered: bool

    def state_bytes(self) -> float:
        """Returns bytes of all states, without counters, per parameter."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        return sum(s.nbytes for s in states if s.dim()) / sum(param.numel() for param in params)


def _variants(workload: Workload, backend: str) -> list[Variant]:
    options: dict[str, Any] = {
        "weight_decay": WEIGHT_DECAY,
        "momentum": MOMENTUM,
        "nesterov": True,
        "ns_coefficients": COEFFICIENTS,
        "eps": EPS,
        "ns_steps": STEPS,
    }
    hidden = [{"params": workload.params, "algorithm": "muon"}]
    both = MuGrokfast(
        hidden, muon_lr=LR, alpha=ALPHA, lamb=LAMB, filter="ema", backend=backend, **options
    )
    ours = Muon(workload.params, lr=LR, backend=backend, **options)
    return [
        Variant(NAMES["muon"].format(backend), ours, False),
        Variant(NAMES["mugrokfast"].format(backend), both, True),
    ]


def _orthogonal(update: Tensor) -> Tensor:
    """Returns the polynomials of all singular values, by the eigenvalues of the smaller product."""
    x = update / max(float(update.norm()), EPS)
    x = x if x.shape[0] <= x.shape[1] else x.mT
    squares, vectors = torch.linalg.eigh(x @ x.mT)
    factors = torch.ones_like(squares)
    for _ in range(STEPS):
        a, b, c = COEFFICIENTS
        step = a + b * squares + c * squares**2
        factors, squares = factors * step, squares * step**2
    result = (vectors * factors) @ (vectors.mT @ x)
    return result if result.shape == update.shape else result.mT


@torch.no_grad()
def _truth(workload: Workload, lamb: float) -> list[Tensor]:
    """Returns the parameters after the checked steps, by the formula in float64."""
    results = []
    for index, start in enumerate(workload.start):
        param, mean = start.double(), workload.grads[0][index].double()
        buffer = torch.zeros_like(param)
        for t in range(CHECKED_STEPS):
            grad = workload.grads[t % 2][index].double()
            mean = ALPHA * mean + (1 - ALPHA) * grad
            grad = grad + lamb * mean
            buffer = MOMENTUM * buffer + (1 - MOMENTUM) * grad
            update = _orthogonal((1 - MOMENTUM) * grad + MOMENTUM * buffer)
            ratio = max(1.0, param.shape[0] / param.shape[1]) ** 0.5
            param = param * (1 - LR * WEIGHT_DECAY) - LR * ratio * update
        results.append(param)
    return results


@torch.no_grad()
def _check(workload: Workload, variant: Variant, truth: list[Tensor]) -> None:
    """Takes the checked steps with ``variant``, which also creates its states.

    Raises:
        AssertionError: it arrives elsewhere than the formula.
    """
    workload.reset()
    for _ in range(CHECKED_STEPS):
        workload.backward()
        variant.optimizer.step()
    for param, start, true in zip(workload.params, workload.start, truth, strict=True):
        error = float((param - true).norm() / (start - true).norm())
        # Written so that NaN fails.
        if not error <= BOUND:
            raise AssertionError(
                f"{variant.name}: {CHECKED_STEPS} steps of a {tuple(param.shape)} must be within "
                f"{BOUND:.0%} of the formula; got {error:.1%}"
            )


def _usable(device: str, missing: dict[str, str]) -> list[str]:
    """Returns the backends that run a whole step; the others get a reason."""
    usable = []
    for backend in BACKENDS:
        param = torch.nn.Parameter(torch.ones(16, 16, device=device))
        param.grad = torch.ones_like(param)
        try:
            Muon([param], backend=backend).step()
        except BackendError as error:
            missing[NAMES["muon"].format(backend)] = str(error)
        else:
            usable.append(backend)
    return usable


def _newton_schulz(workload: Workload, backend: str) -> Job:
    """Returns a job that orthogonalises updates of these shapes."""
    sources = [grad.bfloat16() for grad in workload.grads[0]]
    updates = [source.clone() for source in sources]

    def prepare() -> None:
        torch._foreach_copy_(updates, sources)

    def step() -> None:
        newton_schulz_(updates, STEPS, COEFFICIENTS, eps=EPS, backend=backend)

    prepare()
    step()
    return Job(NAMES["newton_schulz"].format(backend), step, prepare)


def _measure(
    workload: Workload, kept: Sequence[Variant], alone: Sequence[Job], rounds: int
) -> list[Row]:
    extras = [
        extra_bytes(workload.backward_into_new, variant.optimizer.step, workload.device)
        for variant in kept
    ]
    jobs = [Job(variant.name, variant.optimizer.step, workload.backward) for variant in kept]
    interleave([*jobs, *alone], rounds, workload.device)
    rows = [
        Row(job.name, job.seconds, None, True, variant.state_bytes(), extra)
        for job, variant, extra in zip(jobs, kept, extras, strict=True)
    ]
    return rows + [Row(job.name, job.seconds, None) for job in alone]


def _notes(table: Table, backends: Sequence[str]) -> list[str]:
    """Returns the comparisons that a change of the step is judged by."""
    theirs = table.row(TORCH).median
    notes = []
    for backend in backends:
        ours, both, alone = (table.row(name.format(backend)).median for name in NAMES.values())
        notes += [
            f"{backend}: {theirs / ours:.2f}x as fast as {TORCH}",
            f"  with the filter in front {theirs / both:.2f}x, {both / ours:.2f}x the time without",
            f"  Newton-Schulz alone takes {alone / ours:.0%} of the step",
        ]
    return notes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_muon(device: str, run: Run) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        run.skipped["cuda"] = "torch finds no CUDA device"
        pytest.skip(run.skipped["cuda"])
    workload = Workload(SHAPES, device)
    missing: dict[str, str] = {}
    backends = _usable(device, missing)
    torchs = torch.optim.Muon(
        workload.params, LR, WEIGHT_DECAY, MOMENTUM, True, COEFFICIENTS, EPS, STEPS
    )
    kept = [variant for backend in backends for variant in _variants(workload, backend)]
    kept.append(Variant(TORCH, torchs, False))
    truths = {filtered: _truth(workload, LAMB if filtered else 0.0) for filtered in (True, False)}
    for variant in kept:
        _check(workload, variant, truths[variant.filtered])
    alone = [_newton_schulz(workload, backend) for backend in backends]
    rows = _measure(workload, kept, alone, run.rounds)
    title = f"Muon, TRM on {device}: {workload.size:,} parameters in {len(workload.params)} tensors"
    table = Table(title, rows, TORCH, "", missing)
    table.notes = _notes(table, backends)
    run.tables.append(table)
