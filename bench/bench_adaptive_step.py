"""The optimizer step: ours beside torch's AdamW, filters in front of it, and other packages.

Each item measures all variants of one model size on one device, in turns, after it has checked
that they take the same step. What is printed below a table is computed from that table.
"""

import pytest
import torch
from torch import Tensor

from ._adaptive_step_variants import (
    ALPHA,
    BETAS,
    EPS,
    FOREACH_FUSED,
    FUSED,
    LAMB,
    LR,
    OFFICIAL_FUSED,
    WEIGHT_DECAY,
    Missing,
    Variant,
    our_name,
    variants,
)
from ._report import Row, Run, Table, in_bytes
from ._timing import Job, extra_bytes, interleave
from ._workload import COPY, SIZES, Workload, copy_job

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


def _checked(workload: Workload, missing: dict[str, str]) -> list[Variant]:
    """Returns the variants that may be timed; the others get a reason."""
    truths = {True: _truth(workload, LAMB), False: _truth(workload, 0.0)}
    kept = []
    for variant in variants(workload.params, workload.device):
        if isinstance(variant, Missing):
            missing[variant.name] = variant.reason
            continue
        try:
            _check(workload, variant, truths[variant.filtered])
        except AssertionError as error:
            if not variant.foreign:
                raise
            missing[variant.name] = f"takes another step: {error}"
            continue
        kept.append(variant)
    return kept


def _measure(workload: Workload, kept: list[Variant], rounds: int) -> list[Row]:
    copy, copied = copy_job(workload)
    jobs = [Job(variant.name, variant.step, workload.backward) for variant in kept]
    extras = []
    for variant in kept:
        extras.append(extra_bytes(workload.backward_into_new, variant.step, workload.device))
    interleave([*jobs, copy], rounds, workload.device)
    rows = [
        _row(workload, variant, job.seconds, extra)
        for variant, job, extra in zip(kept, jobs, extras, strict=True)
    ]
    return [*rows, Row(COPY, copy.seconds, copied)]


def _row(workload: Workload, variant: Variant, seconds: list[float], extra: int) -> Row:
    per_param = variant.bytes_per_param
    moved = None if per_param is None else per_param * workload.size
    state_bytes = sum(state.nbytes for state in variant.states()) / workload.size
    return Row(variant.name, seconds, moved, variant.one_pass, state_bytes, extra)


def _notes(table: Table, backend: str) -> list[str]:
    """Returns the comparisons that every change of the step is judged by."""
    ours, bf16 = table.row(our_name(backend)), table.row(our_name(backend, "bf16 states"))
    official, foreach, fused = (table.row(n) for n in (OFFICIAL_FUSED, FOREACH_FUSED, FUSED))
    notes = [
        f"{ours.name}, of this run:",
        f"  {official.median / ours.median:.2f}x as fast as {OFFICIAL_FUSED}",
        f"  {foreach.median / ours.median:.2f}x as fast as {FOREACH_FUSED}",
        f"  {ours.median / fused.median:.2f}x the time of {FUSED} without filter"
        + _bytes_ratio(ours, fused),
    ]
    if bf16:
        notes.append(
            f"  with bf16 states {bf16.median / fused.median:.2f}x the time of {FUSED} without "
            "filter" + _bytes_ratio(bf16, fused)
        )
    share = table.share(ours)
    if share is not None:
        notes.append(f"  {share:.0%} of the bandwidth of the copy")
    extras = [f"{in_bytes(row.extra)} ({row.name})" for row in (ours, official, foreach, fused)]
    return [*notes, f"  extra memory of a step: {', '.join(extras)}"]


def _bytes_ratio(row: Row, other: Row) -> str:
    return "" if row.moved is None else f", {row.moved / other.moved:.2f}x its bytes"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SIZES)
def test_adaptive_step(name: str, device: str, run: Run) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        run.skipped["cuda"] = "torch finds no CUDA device"
        pytest.skip(run.skipped["cuda"])
    workload = Workload(SIZES[name], device)
    missing: dict[str, str] = {}
    kept = _checked(workload, missing)
    rows = _measure(workload, kept, run.rounds)
    title = f"{name} on {device}: {workload.size:,} parameters in {len(workload.params)} tensors"
    table = Table(title, rows, FUSED, COPY, missing)
    backend = next(row.name for row in rows).removeprefix(our_name(""))
    table.notes = _notes(table, backend)
    run.tables.append(table)
