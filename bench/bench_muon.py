"""A step of Muon on the hidden matrices of a TRM: ours, torch's, and the share of Newton-Schulz.

A row is measured after it has taken the same steps as the formula in float64.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trm_fast import BackendError, MuGrokfast, Muon
from trm_fast._dispatch import BACKENDS, ORDER
from trm_fast.ops import newton_schulz_

from ._tables import DEVICES, Case, Row, Unavailable, rows_of
from ._timing import extra_bytes
from ._workload import SIZES, Workload

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


def _optimizer(workload: Workload, kind: str, backend: str) -> torch.optim.Optimizer:
    if kind == "torch":
        return torch.optim.Muon(
            workload.params, LR, WEIGHT_DECAY, MOMENTUM, True, COEFFICIENTS, EPS, STEPS
        )
    options: dict[str, Any] = {
        "weight_decay": WEIGHT_DECAY,
        "momentum": MOMENTUM,
        "nesterov": True,
        "ns_coefficients": COEFFICIENTS,
        "eps": EPS,
        "ns_steps": STEPS,
        "backend": backend,
    }
    if kind == "muon":
        return Muon(workload.params, lr=LR, **options)
    hidden = [{"params": workload.params, "algorithm": "muon"}]
    return MuGrokfast(hidden, muon_lr=LR, alpha=ALPHA, lamb=LAMB, filter="ema", **options)


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


class MuonTable:
    """Optimizers on shared parameters, and Newton-Schulz of updates of the same shapes."""

    baselines = (TORCH,)
    floor = None
    unit = "B"

    def __init__(self, device: str) -> None:
        self.device = device
        self.workload = Workload(SHAPES, device)
        self.truths: dict[bool, list[Tensor]] = {}

    def row(self, name: str) -> Row:
        kind, backend = _parts(name)
        if kind == "newton_schulz":
            return self._newton_schulz(backend)
        chosen = Variant(name, _optimizer(self.workload, kind, backend), kind == "mugrokfast")
        if chosen.filtered not in self.truths:
            self.truths[chosen.filtered] = _truth(self.workload, LAMB if chosen.filtered else 0.0)
        try:
            _check(self.workload, chosen, self.truths[chosen.filtered])
        except BackendError as error:
            raise Unavailable(str(error)) from error
        step = chosen.optimizer.step
        return Row(step, self.workload.backward, facts=lambda: self._facts(chosen))

    def _facts(self, chosen: Variant) -> dict[str, Any]:
        extra = extra_bytes(self.workload.backward_into_new, chosen.optimizer.step, self.device)
        return {"state_bytes_per_parameter": chosen.state_bytes(), "extra_bytes": extra}

    def _newton_schulz(self, backend: str) -> Row:
        sources = [grad.bfloat16() for grad in self.workload.grads[0]]
        updates = [source.clone() for source in sources]

        def step() -> None:
            newton_schulz_(updates, STEPS, COEFFICIENTS, eps=EPS, backend=backend)

        try:
            step()
        except BackendError as error:
            raise Unavailable(str(error)) from error
        return Row(step, lambda: torch._foreach_copy_(updates, sources))


def _parts(name: str) -> tuple[str, str]:
    """Returns what a row is, and its backend."""
    if name == TORCH:
        return "torch", ""
    return next(
        (kind, backend)
        for kind, form in NAMES.items()
        for backend in BACKENDS
        if form.format(backend) == name
    )


def _case(device: str) -> Case:
    backends = [backend for backend in ORDER[device] if backend != "reference"]
    ours = [form.format(backend) for backend in backends for form in NAMES.values()]
    reference = tuple(form.format("reference") for form in NAMES.values())
    title = f"Muon, hidden matrices of TRM 7M, {device}"
    return Case(device, title, partial(MuonTable, device), (*ours, TORCH), reference)


test_muon = rows_of(_case(device) for device in DEVICES)
