"""The loss of one supervision step: tokens, and whether to halt.

For a batch of B sequences, with the loss of each from ``ops.stablemax_cross_entropy``,

    lm       = sum over B of the loss of the sequence
    halt     = sum over B of BCE(sigmoid(q_halt), exact)
    continue = sum over B of BCE(sigmoid(q_continue), target_continue)
    loss     = (lm + halt_weight * (halt + continue)) / divisor

where exact is 1 if all valid labels of the sequence are predicted right. A sequence without valid
labels, as it fills up a last batch, has no part in any of it: it has nothing to be exact in.

Source: SamsungSAILMontreal/TinyRecursiveModels at e7b6871, which counts sequences without labels as
exact in ``halt``; wherever each sequence has a label the two are the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from trm_fast.ops import TokenLoss, stablemax_cross_entropy


class HaltingLoss(NamedTuple):
    """What ``halting_loss`` returns; only ``loss`` carries a gradient.

    Args:
        loss: the loss, 0-d, float32, or float64 for float64 logits.
        metrics: 0-d tensors by name, all of which can be added up over batches and processes. Over
            the divisor: "lm_loss", "q_halt_loss" and "q_continue_loss", the parts of the loss
            without their weight. Sums over the sequences that are counted, which are means once
            they are divided by "count": "accuracy", the share of right labels; "exact_accuracy";
            "q_halt_accuracy", whether q_halt >= 0 says if the sequence is exact; "steps", 0 if
            none are given. "count" is the number of sequences that halt and have a valid label.
        predictions: index of the largest logit of each token, [batch, length], int64.
        exact: whether a sequence has valid labels and all are predicted right, [batch], bool.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    predictions: Tensor
    exact: Tensor


def halting_loss(
    logits: Tensor,
    labels: Tensor,
    q_halt: Tensor,
    q_continue: Tensor | None = None,
    target_continue: Tensor | None = None,
    *,
    halted: Tensor | None = None,
    steps: Tensor | None = None,
    divisor: float | None = None,
    halt_weight: float = 0.5,
    ignore_index: int = -100,
    kind: str = "stablemax",
    backend: str | None = None,
) -> HaltingLoss:
    """Returns loss and metrics of one supervision step, without waiting for a GPU.

    Args:
        logits: [batch, length, vocabulary], as for ``ops.stablemax_cross_entropy``.
        labels: [batch, length], likewise.
        q_halt: logit of halting, [batch], any floating point dtype.
        q_continue: logit of going on, [batch]; needs ``target_continue``.
        target_continue: its target in [0, 1], [batch]; taken without gradient.
        halted: the sequences that end with this step and enter the metrics, [batch], bool; None
            counts all of them. The loss is over all in either case.
        steps: supervision steps that each sequence has taken, [batch]; only for the metrics.
        divisor: the global batch, if it is another than that of ``logits``.
        halt_weight: weight of the losses of q_halt and q_continue, >= 0; the paper has 1.
        ignore_index: as for ``ops.stablemax_cross_entropy``, like all that follows.
        kind: likewise.
        backend: likewise.

    Returns:
        A ``HaltingLoss``.

    Raises:
        ValueError: a shape does not fit, a number is out of range, or one of ``q_continue`` and
            ``target_continue`` is missing; and as ``ops.stablemax_cross_entropy``.
        TypeError: as ``ops.stablemax_cross_entropy``.
    """
    tokens = stablemax_cross_entropy(
        logits, labels, ignore_index=ignore_index, kind=kind, backend=backend
    )
    batch = logits.shape[0]
    given = {"q_halt": q_halt, "q_continue": q_continue, "target_continue": target_continue}
    _check(batch, given | {"halted": halted, "steps": steps}, divisor, halt_weight)
    scale = 1.0 / (max(batch, 1) if divisor is None else divisor)
    has_labels = tokens.valid > 0

    lm_loss = tokens.loss.sum() * scale
    q_halt_loss = _bce(q_halt, tokens.exact, has_labels) * scale
    loss = lm_loss + halt_weight * q_halt_loss
    q_continue_loss = torch.zeros_like(lm_loss)
    if q_continue is not None and target_continue is not None:
        q_continue_loss = _bce(q_continue, target_continue.detach(), has_labels) * scale
        loss = loss + halt_weight * q_continue_loss
    metrics = {
        "lm_loss": lm_loss.detach(),
        "q_halt_loss": q_halt_loss.detach(),
        "q_continue_loss": q_continue_loss.detach(),
    }
    metrics |= _metrics(tokens, q_halt.detach(), halted, steps)
    return HaltingLoss(loss, metrics, tokens.predictions, tokens.exact)


def _bce(q: Tensor, target: Tensor, has_labels: Tensor) -> Tensor:
    q = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    q = q.masked_fill(~has_labels, 0.0)  # whose gradient is then 0, even where q is NaN
    losses = binary_cross_entropy_with_logits(q, target.to(q.dtype), reduction="none")
    return losses.masked_fill(~has_labels, 0.0).sum()


@torch.no_grad()
def _metrics(
    tokens: TokenLoss, q_halt: Tensor, halted: Tensor | None, steps: Tensor | None
) -> dict[str, Tensor]:
    counted = tokens.valid > 0
    if halted is not None:
        counted = counted & halted
    count, shares = counted.sum(), tokens.correct / tokens.valid.clamp(min=1)
    return {
        "count": count,
        "accuracy": (shares * counted).sum(),
        "exact_accuracy": (tokens.exact & counted).sum(),
        "q_halt_accuracy": (((q_halt >= 0) == tokens.exact) & counted).sum(),
        "steps": torch.zeros_like(count) if steps is None else (steps * counted).sum(),
    }


def _check(
    batch: int, given: dict[str, Tensor | None], divisor: float | None, halt_weight: float
) -> None:
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != (batch,):
            raise ValueError(
                f"halting_loss: {name} must be [{batch}] as the batch; got {tuple(tensor.shape)}"
            )
    halted = given["halted"]
    if halted is not None and halted.dtype != torch.bool:
        raise ValueError(f"halting_loss: halted must be bool; got {halted.dtype}")
    if (given["q_continue"] is None) != (given["target_continue"] is None):
        raise ValueError(
            "halting_loss: q_continue and target_continue must be given together; got one of them"
        )
    if divisor is not None and not divisor > 0:
        raise ValueError(f"halting_loss: divisor must be > 0; got {divisor!r}")
    if not halt_weight >= 0:
        raise ValueError(f"halting_loss: halt_weight must be >= 0; got {halt_weight!r}")
