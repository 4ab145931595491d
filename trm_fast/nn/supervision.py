"""Deep supervision: several steps on one batch, each with a loss, with the memory of one step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from trm_fast.losses.halting import HaltingLoss
from trm_fast.losses.supervision import supervision_weights
from trm_fast.nn.carry import Batch, Carry, Outputs
from trm_fast.nn.tiny_recursive_model import TinyRecursiveModel

State = TypeVar("State")
Out = TypeVar("Out")


def deep_supervision(
    start: Callable[[], State],
    step: Callable[[State], tuple[State, Out]],
    weights: Sequence[float],
) -> Iterator[tuple[float, State, Out]]:
    """Takes one supervision step for each weight; the backward pass of a step has to run before the
    next one is asked for.

        state <- start()
        state, outputs <- step(state)      once for each weight

    No gradient goes from one step to the one before, so that memory does not grow with the number
    of steps. What ``start`` computes with a gradient, such as an embedding, is cut off once: the
    gradients of all steps add up there, and one backward pass through it follows the last step.

    Args:
        start: returns the state before the first step: a tensor, or a tuple, named tuple, list or
            dict of such states and plain values. What a step hands on as it is keeps its gradient.
        step: returns the state after a step, and its outputs.
        weights: of the losses.

    Yields:
        The weight, the state after the step and the outputs.
    """
    state = start()
    roots = {id(tensor): tensor for tensor in _with_gradient(state)}
    cut = {key: root.detach().requires_grad_() for key, root in roots.items()}
    state = _replaced(state, cut)
    leaves = {id(leaf) for leaf in cut.values()}
    for weight in weights:
        state, outputs = step(state)
        new = [tensor for tensor in _with_gradient(state) if id(tensor) not in leaves]
        state = _replaced(state, {id(tensor): tensor.detach() for tensor in new})
        yield weight, state, outputs
        del outputs  # not kept for the next step
    reached = [key for key, leaf in cut.items() if leaf.grad is not None]
    if reached:
        torch.autograd.backward([roots[key] for key in reached], [cut[key].grad for key in reached])


def _with_gradient(state: Any) -> Iterator[Tensor]:
    # Most states have none: pytree would take longer to look than a small step takes.
    if isinstance(state, Tensor):
        if state.requires_grad:
            yield state
    elif isinstance(state, (tuple, list, dict)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _with_gradient(part)


def _replaced(state: State, tensors: dict[int, Tensor]) -> State:
    if not tensors:
        return state
    found: State = tree_map(lambda leaf: tensors.get(id(leaf), leaf), state)
    return found


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

    def start() -> Carry:
        return model.initial_carry(batch)._replace(data=dict(batch))

    def step(carry: Carry) -> tuple[Carry, Outputs]:
        y, z, outputs = model.step(carry.y, carry.z, carry.data)
        if not model.config.no_ACT_continue:
            target = model.target_continue(y, z, carry.steps + 1, carry.data)
            outputs = outputs._replace(target_continue=target)
        return carry._replace(y=y, z=z, steps=carry.steps + 1), outputs

    total, found = None, None
    factors = supervision_weights(steps, weights)
    for factor, carry, outputs in deep_supervision(start, step, factors):
        found = (loss or model.loss)(carry, outputs, **options)
        weighted = factor * found.loss
        backward(weighted)
        total = weighted.detach() if total is None else total + weighted.detach()
    assert total is not None and found is not None
    return total, found
