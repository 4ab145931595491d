"""The loops behind ``predict`` and ``evaluate``, for any model with supervision steps."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from trm_fast.losses.halting import HaltingLoss
from trm_fast.nn.carry import Batch, Outputs

States = tuple[Tensor, ...]
Carried = TypeVar("Carried")


class Prediction(NamedTuple):
    """Answers to some puzzles.

    Args:
        tokens: the most likely ids, [batch, seq_len], int64.
        q_halt: logit of halting at the step of the answer, [batch].
        steps: supervision steps taken, [batch], int64.
    """

    tokens: Tensor
    q_halt: Tensor
    steps: Tensor


@torch.no_grad()
def predict(
    start: Callable[[Batch], States],
    step: Callable[[States, Batch], tuple[States, Outputs]],
    wants_halt: Callable[[Outputs], Tensor],
    data: Batch,
    *,
    max_steps: int,
    early_halt: bool = True,
) -> Prediction:
    """Returns the answers to some puzzles.

    A sequence that wants to halt is finished, and leaves the batch, so that later steps cost only
    what is left.

    Args:
        start: data to the states before the first step, each of them batch first.
        step: states and data to the next states and the outputs of the step.
        wants_halt: outputs to a bool for each sequence, [batch].
        data: tensors by name, batch first.
        max_steps: supervision steps at most, >= 1.
        early_halt: whether sequences halt before that.

    Returns:
        A ``Prediction``.
    """
    states, outputs = step(start(data), data)
    tokens, q_halt = outputs.logits.argmax(-1), outputs.q_halt.clone()
    steps = torch.ones(len(tokens), dtype=torch.int64, device=tokens.device)
    left = torch.arange(len(tokens), device=tokens.device)
    for number in range(2, max_steps + 1):
        if early_halt:
            going = (~wants_halt(outputs)).nonzero()[:, 0]
            if not len(going):
                break
            if len(going) < len(left):
                left, states = left[going], tuple(state[going] for state in states)
                data = {name: value[going] for name, value in data.items()}
        states, outputs = step(states, data)
        tokens[left] = outputs.logits.argmax(-1)
        q_halt[left] = outputs.q_halt
        steps[left] = number
    return Prediction(tokens, q_halt, steps)


@torch.no_grad()
def evaluate(
    start: Callable[[Batch], Carried],
    step: Callable[[Carried, Batch], tuple[Carried, Outputs]],
    loss: Callable[[Carried, Outputs], HaltingLoss],
    batches: Iterable[Batch],
    steps: int,
) -> dict[str, float]:
    """Returns the means of the official evaluation: each batch starts anew and takes all steps, of
    which the last one counts.

    Args:
        start: a batch to the carry before the first step.
        step: carry and batch to the next carry and the outputs of the step.
        loss: carry and outputs to loss and metrics, which are sums over "count" sequences.
        batches: the data.
        steps: supervision steps, >= 1.

    Returns:
        "count", and means over the sequences.
    """
    sums: dict[str, Tensor] = {}
    for batch in batches:
        carry = start(batch)
        for _ in range(steps):
            carry, outputs = step(carry, batch)
        for name, value in loss(carry, outputs).metrics.items():
            sums[name] = sums[name] + value.double() if name in sums else value.double()
    count = float(sums.pop("count", torch.tensor(0.0)))
    return {"count": count} | {name: float(total) / max(count, 1.0) for name, total in sums.items()}
