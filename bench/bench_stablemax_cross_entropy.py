"""stablemax_cross_entropy: ours by backend and compiled, beside what it replaces.

The official formulation computes in float64; torch's own cross-entropy is softmax, and is timed
with the argmax and the counts that a training step needs of either. All start from the same
float32 logits. A row is measured after loss and gradient were compared with the formula in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trm_fast.ops import OPS, stablemax_cross_entropy

from ._tables import DEVICES, Case, Row, Unavailable, rows_of

IGNORED = -100
SIZES = {
    "B 4 x L 81 x V 11": (4, 81, 11),
    "B 16 x L 81 x V 11": (16, 81, 11),
    "B 64 x L 81 x V 11": (64, 81, 11),
    "B 4 x L 128 x V 50257": (4, 128, 50257),
}
OFFICIAL, SOFTMAX = "float64 formulation, eager", "F.cross_entropy + argmax"
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


def _variant(name: str, device: str) -> Variant:
    """Returns a variant by its name.

    Raises:
        Unavailable: its backend cannot run here.
    """
    what, _, how = name.rpartition(", ")
    if what == "float64 formulation":
        run, kind = official, "stablemax"
    elif what == SOFTMAX:
        run, kind = torch_softmax, "softmax"
    else:
        kind = "softmax" if what.endswith(" softmax") else "stablemax"
        backend = what.removeprefix("trm_fast").removesuffix(" softmax").strip() or None
        op = OPS["stablemax_cross_entropy"]
        reason = backend and op.reason(backend, device, frozenset({torch.float32}))
        if reason:
            raise Unavailable(reason)
        run = _ours(kind, backend)
    return Variant(name, torch.compile(run) if how == "compiled" else run, kind)


def _true(logits: Tensor, labels: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Returns loss and gradient in float64, one sequence at a time to bound the memory."""
    parts = []
    run = official if kind == "stablemax" else torch_softmax
    for x, y in zip(logits.detach().double().split(1), labels.split(1), strict=True):
        (loss, *_) = run(x.requires_grad_(), y)
        parts.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    losses, gradients = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(gradients)


def _errors(
    variant: Variant, logits: Tensor, labels: Tensor, true: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Returns the largest errors of loss and gradient, relative to the largest value.

    Raises:
        AssertionError: an error is larger than float32 explains.
    """
    (loss, *_) = variant.run(logits, labels)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    pairs = zip((loss.detach(), gradient), true, strict=True)
    errors = [float((found - real).abs().max() / real.abs().max()) for found, real in pairs]
    if not max(errors) <= BOUND:
        raise AssertionError(f"{variant.name}: errors must be below {BOUND:.1e}; got {errors}")
    return {"error": errors[0], "gradient_error": errors[1]}


class StablemaxTable:
    """Variants on the same logits and labels, in one pass."""

    baselines = (OFFICIAL,)
    floor = None
    unit = "B"

    def __init__(self, size: str, device: str, pass_: str) -> None:
        self.device, self.backward = device, pass_ == "backward"
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.logits = torch.randn(SIZES[size]).mul_(3).to(device).requires_grad_()
        labels = torch.randint(SIZES[size][2], SIZES[size][:2])
        labels[:, ::9] = IGNORED
        self.labels = labels.to(device)
        self.truths: dict[str, tuple[Tensor, Tensor]] = {}
        # The floor of the page: the logits once, 12 bytes per token; back both and the gradient.
        passes = 3 if self.backward else 1
        self.work = passes * self.logits.nbytes + (1 + self.backward) * 12 * labels.numel()

    def row(self, name: str) -> Row:
        chosen = _variant(name, self.device)
        if chosen.kind not in self.truths:
            self.truths[chosen.kind] = _true(self.logits, self.labels, chosen.kind)
        errors = _errors(chosen, self.logits, self.labels, self.truths[chosen.kind])

        def step() -> None:
            if self.backward:
                loss = chosen.run(self.logits, self.labels)[0]
                torch.autograd.grad(loss.sum(), self.logits)
            else:
                with torch.no_grad():
                    chosen.run(self.logits, self.labels)

        step()
        return Row(step, work=self.work, facts=lambda: errors)


def _case(size: str, device: str, pass_: str) -> Case:
    order = OPS["stablemax_cross_entropy"].order[device]
    ours = [f"trm_fast {backend}" for backend in (*order, "reference")]
    eager = ("float64 formulation", SOFTMAX, *dict.fromkeys(ours))
    rows = tuple(f"{name}, eager" for name in eager)
    more = [f"{name} softmax, eager" for name in dict.fromkeys(ours)]
    more += [f"{name}, compiled" for name in ("float64 formulation", SOFTMAX, "trm_fast")]
    more += ["trm_fast softmax, compiled"]
    return Case(
        f"{size}-{device}-{pass_}", f"Stablemax cross entropy, {pass_}, {size}, {device}",
        partial(StablemaxTable, size, device, pass_), rows, tuple(more),
        default=size == "B 16 x L 81 x V 11",
    )  # fmt: skip


test_stablemax_cross_entropy = rows_of(
    _case(size, device, pass_)
    for device in DEVICES
    for size in SIZES
    for pass_ in ("forward", "backward")
)
