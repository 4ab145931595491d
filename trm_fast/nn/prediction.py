"""Answers of a trained model, and the official evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trm_fast.nn.carry import Batch

if TYPE_CHECKING:
    from trm_fast.nn.tiny_recursive_model import TinyRecursiveModel


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
    model: TinyRecursiveModel,
    inputs: Tensor,
    puzzle_ids: Tensor | None,
    max_steps: int | None,
    early_halt: bool,
) -> Prediction:
    """See ``TinyRecursiveModel.predict``."""
    most = model.config.halt_max_steps if max_steps is None else max_steps
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(
            f"TinyRecursiveModel.predict: max_steps must be a whole number >= 1; got {max_steps!r}"
        )
    if puzzle_ids is None:
        puzzle_ids = inputs.new_zeros(inputs.shape[0])
    data = {"inputs": inputs, "puzzle_identifiers": puzzle_ids}
    with evaluating(model):
        return _run(model, data, most, early_halt)


def _run(model: TinyRecursiveModel, data: dict[str, Tensor], most: int, early: bool) -> Prediction:
    y, z, *_ = model.initial_carry(data)
    left = torch.arange(y.shape[0], device=y.device)
    tokens = torch.zeros_like(data["inputs"], dtype=torch.int64)
    q_halt = model.q_head(y)[:, 0]
    steps = torch.zeros_like(left)
    for step in range(1, most + 1):
        y, z, outputs = model.step(y, z, data)
        tokens[left] = outputs.logits.argmax(-1)
        q_halt[left] = outputs.q_halt
        steps[left] = step
        if not early or step == most:
            continue
        going = (~model.wants_halt(outputs)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(left):
            left, y, z = left[going], y[going], z[going]
            data = {name: value[going] for name, value in data.items()}
    return Prediction(tokens, q_halt, steps)


@torch.no_grad()
def evaluate(
    model: TinyRecursiveModel, batches: Iterable[Batch], options: dict[str, Any]
) -> dict[str, float]:
    """See ``TinyRecursiveModel.evaluate``."""
    sums: dict[str, Tensor] = {}
    with evaluating(model):
        for batch in batches:
            carry = model.initial_carry(batch)
            for _ in range(model.config.halt_max_steps):
                carry, outputs = model(carry, batch)
            found = model.loss(carry, outputs, divisor=1, **options)
            for name, value in found.metrics.items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()
    count = float(sums.pop("count", torch.tensor(0.0)))
    return {"count": count} | {name: float(total) / max(count, 1.0) for name, total in sums.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
