"""``Carry``, what a batch keeps between supervision steps, and what a step returns."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]


class Carry(NamedTuple):
    """A batch between two supervision steps; each slot works on a sequence until it halts.

    Args:
        y, z: answer and latent, [batch, length, width], without gradient.
        steps: supervision steps that the sequence in a slot has taken, [batch], int32.
        halted: whether the slot is finished and takes a new sequence at the next step, [batch].
        data: the sequences on which the slots work: "inputs", "labels" [batch, seq_len],
            "puzzle_identifiers" [batch], and whatever else a batch has, batch first.
    """

    y: Tensor
    z: Tensor
    steps: Tensor
    halted: Tensor
    data: dict[str, Tensor]


class Outputs(NamedTuple):
    """What a supervision step returns besides its states.

    Args:
        logits: of the tokens, [batch, seq_len, vocab_size], in the dtype of the activations.
        q_halt: logit of halting, [batch], float32 (float64 for float64).
        q_continue: logit of going on, [batch], likewise.
        target_continue: what q_continue is to learn, [batch], without gradient; None unless it is
            trained.
    """

    logits: Tensor
    q_halt: Tensor
    q_continue: Tensor
    target_continue: Tensor | None = None


@torch.no_grad()
def refill(carry: Carry, batch: Batch, y_init: Tensor, z_init: Tensor) -> Carry:
    """Returns the carry with the sequences of a batch in all slots that have halted.

    Rows of the batch for other slots are dropped, as in the official code.

    Args:
        carry: before the step.
        batch: of the keys, shapes and dtypes of ``carry.data``.
        y_init, z_init: where the states start, [width].

    Raises:
        ValueError: keys or shapes are not those of the carry.
    """
    _check(carry, batch)
    new = carry.halted
    data = {key: torch.where(_column(new, old), batch[key], old) for key, old in carry.data.items()}
    return Carry(
        torch.where(new[:, None, None], y_init.to(carry.y.dtype), carry.y),
        torch.where(new[:, None, None], z_init.to(carry.z.dtype), carry.z),
        carry.steps.masked_fill(new, 0),
        new,
        data,
    )


def _column(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.dim() - 1))


def _check(carry: Carry, batch: Batch) -> None:
    if batch.keys() != carry.data.keys():
        raise ValueError(
            "TinyRecursiveModel: a batch must have what its carry has, "
            f"{', '.join(sorted(carry.data))}; got {', '.join(sorted(batch))}"
        )
    for key, old in carry.data.items():
        if batch[key].shape != old.shape:
            raise ValueError(
                f"TinyRecursiveModel: {key} must be {tuple(old.shape)} as in its carry; got "
                f"{tuple(batch[key].shape)}"
            )
