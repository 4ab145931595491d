"""Joint supervision: the loss of several supervision steps, with the memory of one."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trm_fast.losses.halting import HaltingLoss
from trm_fast.losses.supervision import supervision_weights
from trm_fast.nn.carry import Batch
from trm_fast.nn.tiny_recursive_model import TinyRecursiveModel


def joint_supervision(
    model: TinyRecursiveModel,
    batch: Batch,
    steps: int,
    weights: str | Sequence[float] = "uniform",
    *,
    loss: Callable[..., HaltingLoss] | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
    **options: Any,
) -> tuple[Tensor, HaltingLoss]:
    """Takes some supervision steps on a batch from the start, and adds the gradient of

        sum over steps of weight * loss of the step

    to that of the parameters. States carry no gradient from one step to the next, so the backward
    pass of each step runs at once, and memory does not grow with the number of steps. One optimizer
    step follows. No sequence halts, and all are in the metrics.

    Args:
        model: the model.
        batch: as for ``TinyRecursiveModel.initial_carry``, with labels.
        steps: number of supervision steps, >= 1.
        weights: as for ``trm_fast.losses.supervision_weights``, which makes their sum 1.
        loss: ``(carry, outputs, **options)`` to a ``HaltingLoss``; None means ``model.loss``.
        backward: called with each weighted loss; with a ``GradScaler``,
            ``lambda loss: scaler.scale(loss).backward()``.
        **options: of the loss.

    Returns:
        The weighted sum, without gradient, and loss and metrics of the last step.

    Raises:
        ValueError: as ``supervision_weights`` and ``initial_carry``.
    """
    factors = supervision_weights(steps, weights)
    carry = model.initial_carry(batch)._replace(data=dict(batch))
    total, found = None, None
    for factor in factors:
        y, z, outputs = model.step(carry.y, carry.z, carry.data)
        if not model.config.no_ACT_continue:
            target = model.target_continue(y, z, carry.steps + 1, carry.data)
            outputs = outputs._replace(target_continue=target)
        carry = carry._replace(y=y, z=z, steps=carry.steps + 1)
        found = (loss or model.loss)(carry, outputs, **options)
        weighted = factor * found.loss
        backward(weighted)
        total = weighted.detach() if total is None else total + weighted.detach()
    assert total is not None and found is not None
    return total, found
