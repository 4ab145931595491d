"""stablemax_cross_entropy: ours by backend and compiled, beside what it replaces.

The official formulation computes in float64; torch's own cross-entropy is softmax, and is timed
with the argmax and the counts that a training step needs of either. All start from the same
float32 logits. The notes below a table give the largest relative error of loss and gradient to the
formula in float64, before anything is timed; a variant that is off by more than float32 explains
stops the run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trm_fast.ops import OPS, stablemax_cross_entropy

from ._report import Row, Run, Table
from ._timing import Job, interleave

IGNORED = -100
SIZES = {
    "B 4 x L 81 x V 11": (4, 81, 11),
    "B 16 x L 81 x V 11": (16, 81, 11),
    "B 64 x L 81 x V 11": (64, 81, 11),
    "B 4 x L 128 x V 50257": (4, 128, 50257),
}
OFFICIAL = "float64 formulation, eager"
# Some forty roundings in float32, and those of logarithm and exponential of scores up to 10.
BOUND = 128 * 2.0**-24

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Variant:
    """A function of logits and labels; the first of its outputs is the loss per sequence."""

    name: str
    run: Callable[[Tensor, Tensor], Outputs]
    kind: str = "stablemax"


def _counted(loss: Tensor, logits: Tensor, labels: Tensor) -> Outputs:
    """Adds predictions, numbers of right and of valid labels, and exactness."""
    with torch.no_grad():
        valid, predictions = labels != IGNORED, logits.argmax(-1)
        correct, count = (valid & (predictions == labels)).sum(-1), valid.sum(-1)
        return loss, predictions, correct, count, (correct == count) & (count > 0)


def _mean(token: Tensor, labels: Tensor) -> Tensor:
    return token.sum(-1) / (labels != IGNORED).sum(-1).clamp(min=1)


def official(logits: Tensor, labels: Tensor) -> Outputs:
    wide, valid = logits.double(), labels != IGNORED
    s = torch.where(wide < 0, 1 / (1 - wide + 1e-30), wide + 1)
    log_p = torch.log(s / s.sum(-1, keepdim=True))
    token = -log_p.gather(-1, labels.where(valid, 0)[..., None])[..., 0]
    return _counted(_mean(token.where(valid, 0.0), labels), logits, labels)


def torch_softmax(logits: Tensor, labels: Tensor) -> Outputs:
    token = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return _counted(_mean(token.view(labels.shape), labels), logits, labels)


def _ours(kind: str, backend: str | None) -> Callable[[Tensor, Tensor], Outputs]:
    return lambda logits, labels: stablemax_cross_entropy(
        logits, labels, kind=kind, backend=backend
    )


def _variants(device: str) -> list[Variant]:
    op = OPS["stablemax_cross_entropy"]
    usable = [b for b in op.implementations if not op.reason(b, device, frozenset({torch.float32}))]
    eager = [
        Variant("float64 formulation", official),
        Variant("F.cross_entropy + argmax", torch_softmax, "softmax"),
    ]
    compiled = [
        *eager,
        Variant("trm_fast", _ours("stablemax", None)),
        Variant("trm_fast softmax", _ours("softmax", None), "softmax"),
    ]
    eager += [Variant(f"trm_fast {b}", _ours("stablemax", b)) for b in usable]
    eager += [Variant(f"trm_fast {b} softmax", _ours("softmax", b), "softmax") for b in usable]
    return [
        *(Variant(f"{v.name}, eager", v.run, v.kind) for v in eager),
        *(Variant(f"{v.name}, compiled", torch.compile(v.run), v.kind) for v in compiled),
    ]


def _true(logits: Tensor, labels: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Returns loss and gradient in float64, one sequence at a time to bound the memory."""
    parts = []
    run = official if kind == "stablemax" else torch_softmax
    for x, y in zip(logits.detach().double().split(1), labels.split(1), strict=True):
        (loss, *_) = run(x.requires_grad_(), y)
        parts.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    losses, gradients = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(gradients)


def _judge(variant: Variant, logits: Tensor, labels: Tensor, true: tuple[Tensor, Tensor]) -> str:
    """Returns the note about the errors of a variant.

    Raises:
        AssertionError: an error is larger than float32 explains.
    """
    (loss, *_) = variant.run(logits, labels)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    pairs = zip((loss.detach(), gradient), true, strict=True)
    errors = [float((found - real).abs().max() / real.abs().max()) for found, real in pairs]
    if not max(errors) <= BOUND:
        raise AssertionError(f"{variant.name}: errors must be below {BOUND:.1e}; got {errors}")
    return f"{variant.name}: error of the loss {errors[0]:.1e}, of the gradient {errors[1]:.1e}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SIZES)
def test_stablemax_cross_entropy(name: str, device: str, run: Run) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        run.skipped["cuda"] = "torch finds no CUDA device"
        pytest.skip(run.skipped["cuda"])
    torch.manual_seed(0)
    torch._dynamo.reset()
    logits = torch.randn(SIZES[name]).mul_(3).to(device).requires_grad_()
    labels = torch.randint(SIZES[name][2], SIZES[name][:2])
    labels[:, ::9] = IGNORED
    labels = labels.to(device)
    variants = _variants(device)
    true = {kind: _true(logits, labels, kind) for kind in ("stablemax", "softmax")}
    notes = [_judge(variant, logits, labels, true[variant.kind]) for variant in variants]

    def forward(variant: Variant) -> None:
        with torch.no_grad():
            variant.run(logits, labels)

    def both(variant: Variant) -> None:
        torch.autograd.grad(variant.run(logits, labels)[0].sum(), logits)

    # The floor of the page: the logits once, 12 bytes per token; back the same and the gradient.
    size, tokens = logits.nbytes, labels.numel()
    for title, step, moved in (
        ("forward", forward, size + 12 * tokens),
        ("forward and backward", both, 3 * size + 24 * tokens),
    ):
        jobs = [Job(v.name, lambda v=v, step=step: step(v)) for v in variants]
        for job in jobs:
            job.step()
        interleave(jobs, run.rounds, device)
        rows = [Row(job.name, job.seconds, moved) for job in jobs]
        heading = f"stablemax_cross_entropy, {title}, {name} on {device}"
        run.tables.append(Table(heading, rows, OFFICIAL, "", {}, notes))
