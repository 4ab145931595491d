"""What goes on from one ``Trainer`` of an ``EpochTrainer`` to the next, beside weights and
optimizer: averages, schedules, the scale of float16, stages, objective and callbacks."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trm_fast.train import Callback, Trainer
from trm_fast.train.callbacks import by_name
from trm_fast.train.checkpoints.snapshot import restore, snapshot
from trm_fast.train.generators import fork_rng

State = dict[str, Any]


def further_state(trainer: Trainer, own: Sequence[Callback], staged: bool) -> State:
    """Returns the state, empty if there is nothing but weights and optimizer; all processes must
    call it.

    Args:
        trainer: whose state it is.
        own: the callbacks whose state belongs to it.
        staged: whether stages and the places of their batches belong to it.
    """
    state = snapshot(trainer)
    names = by_name(own)
    for part in state["process"].values():
        part["callbacks"] = {k: v for k, v in part["callbacks"].items() if k in names}
        if not staged:
            part["batches"] = {}  # an EpochTrainer knows its place itself
    kept: State = {name: state[name] for name in ("trainer", "process", "ema") if name in state}
    parts = state["process"].values()
    has_any = (
        "ema" in state
        or staged
        or state["trainer"]["schedules"]
        or state["trainer"]["scaler"] is not None
        or any(part["objective"] or part["callbacks"] for part in parts)
    )
    return kept if has_any else {}


def with_weights(state: State, model: nn.Module, optimizer: Optimizer) -> State:
    """Returns a ``further_state`` with the weights and options as they are now, for ``go_on``: the
    schedules of a new trainer change the options."""
    if not state:
        return {}
    return {**state, "model": model.state_dict(), "optim": {"0": optimizer.state_dict()}}


def go_on(trainer: Trainer, state: State) -> None:
    """Takes over what ``with_weights`` returned; nothing if that was empty.

    Raises:
        ValueError: the state is of other optimizers, schedules, callbacks or stages.
    """
    if not state:
        return
    with fork_rng(trainer.world.device):
        restore(trainer, state)
