"""The optimizer step: ours beside torch's AdamW, filters in front of it, and other packages.

A table is one model size on one device with warm or with cold caches. A row is measured after it
has taken the step of the formula in float64.
"""

from typing import Any

import torch
from torch import Tensor

from ._adaptive_step_variants import (
    ALPHA,
    BETAS,
    EPS,
    FUSED,
    LAMB,
    LR,
    WEIGHT_DECAY,
    Variant,
    names,
    variant,
)
from ._tables import DEVICES, Case, Row, Unavailable, rows_of
from ._timing import extra_bytes
from ._workload import CACHES, COPY, SIZES, Workload, copy_row

CHECKED_STEPS = 3


@torch.no_grad()
def _truth(workload: Workload, lamb: float) -> list[Tensor]:
    """Returns the parameters after the checked steps, by the formula in float64."""
    results = []
    for index, start in enumerate(workload.start):
        param = start.double()
        m = v = torch.zeros_like(param)
        mean = workload.grads[0][index].double()
        for t in range(1, CHECKED_STEPS + 1):
            grad = workload.grads[(t - 1) % 2][index].double()
            mean = ALPHA * mean + (1 - ALPHA) * grad
            filtered = grad + lamb * mean
            m = BETAS[0] * m + (1 - BETAS[0]) * filtered
            v = BETAS[1] * v + (1 - BETAS[1]) * filtered**2
            update = m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
            param = param * (1 - LR * WEIGHT_DECAY) - LR * update
        results.append(param)
    return results


# With |grad| in [0.5, 1.5] the filtered gradient is at most 4.5 and the root of the second moment,
# which keeps a third of the first step's square, at least 3 * 0.5 / sqrt(3) = 0.87: an update is
# below 6 LR. Each step rounds at most 4 numbers of the size of a parameter, which is below 1.1, and
# 16 of the size of an update.
U = torch.finfo(torch.float32).eps / 2
FLOAT32_BOUND = CHECKED_STEPS * U * (4 * 1.1 + 16 * 6 * LR)
# A mean of size M in bfloat16 is off by at most 2^-7 M, and by 2^-8 M in the root of the mean
# square since its rounding is stochastic. Two means are stored, LAMB times the one and once the
# other reach the next update, each over 0.87, and two of the three steps read what was stored.
BF16_RMS = 2**-8 * 2 * (4.5 + LAMB * 1.5) / 0.87 * LR
# The largest one: every rounding at its bound, in numerator and denominator alike.
BF16_MAXIMUM = 2 * 2 * BF16_RMS


def _check(workload: Workload, variant: Variant, truth: list[Tensor]) -> None:
    """Takes the checked steps with ``variant``, which also creates its states.

    Raises:
        AssertionError: it arrives elsewhere than the formula.
    """
    workload.reset()
    for _ in range(CHECKED_STEPS):
        workload.backward()
        variant.step()
    with torch.no_grad():
        errors = [param - true for param, true in zip(workload.params, truth, strict=True)]
    maximum = max(float(error.abs().max()) for error in errors)
    rms = (sum(float(error.square().sum()) for error in errors) / workload.size) ** 0.5
    bound = BF16_MAXIMUM + FLOAT32_BOUND if variant.bf16 else FLOAT32_BOUND
    rms_bound = BF16_RMS + FLOAT32_BOUND if variant.bf16 else FLOAT32_BOUND
    # Written so that NaN fails.
    if not (maximum <= bound and rms <= rms_bound):
        raise AssertionError(
            f"{variant.name}: parameters must be within {bound:.1e} of the formula after "
            f"{CHECKED_STEPS} steps, {rms_bound:.1e} in the mean; got {maximum:.1e}, {rms:.1e}"
        )


class AdaptiveStep:
    """Variants of the step on shared parameters."""

    baselines = (FUSED,)
    floor = COPY
    unit = "B"

    def __init__(self, size: str, device: str, caches: str) -> None:
        self.device = device
        self.workload = Workload(SIZES[size], device, caches)
        self.truths: dict[bool, list[Tensor]] = {}

    def row(self, name: str) -> Row:
        if name == COPY:
            return copy_row(self.workload)
        chosen = variant(name, self.workload.params, self.device)
        self._check(chosen)
        size = chosen.bytes_per_param
        work = None if size is None else size * self.workload.size
        return Row(
            chosen.step, self.workload.backward, work=work, least=chosen.one_pass,
            facts=lambda: self._facts(chosen),
        )  # fmt: skip

    def _check(self, chosen: Variant) -> None:
        lamb = LAMB if chosen.filtered else 0.0
        if chosen.filtered not in self.truths:
            self.truths[chosen.filtered] = _truth(self.workload, lamb)
        try:
            _check(self.workload, chosen, self.truths[chosen.filtered])
        except AssertionError as error:
            if not chosen.foreign:
                raise
            raise Unavailable(f"takes another step: {error}") from error

    def _facts(self, chosen: Variant) -> dict[str, Any]:
        states = sum(state.nbytes for state in chosen.states()) / self.workload.size
        extra = extra_bytes(self.workload.backward_into_new, chosen.step, self.device)
        return {"state_bytes_per_parameter": states, "extra_bytes": extra}


def _case(size: str, device: str, caches: str) -> Case:
    rows, more = names(device)
    title = f"GrokFast AdamW, {size}, {caches} caches, {device}"
    # The largest model leaves nothing of itself in a cache: its warm step is a cold one.
    default = size != "TRM 27M"
    return Case(
        f"{size}-{device}-{caches}", title, lambda: AdaptiveStep(size, device, caches),
        (*rows, COPY), more, default,
    )  # fmt: skip


test_adaptive_step = rows_of(
    _case(size, device, caches) for device in DEVICES for size in SIZES for caches in CACHES
)
