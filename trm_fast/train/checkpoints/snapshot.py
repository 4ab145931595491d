"""The whole state of a training run, for a checkpoint, and back."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trm_fast.train._rng import generators, set_generators
from trm_fast.train.distributed import sharded_like, whole

if TYPE_CHECKING:
    from trm_fast.train.trainer import Trainer


def snapshot(trainer: "Trainer") -> dict[str, Any]:
    """Returns everything that a run needs to go on to the same bits; all processes must call it."""
    world = trainer.world
    own = {
        "objective": trainer.objective.state_dict(),
        "generators": generators(world.device),
        "meter": trainer.meter.state_dict(),
        "batches": trainer.batches.state_dict(),
    }
    state = {
        "model": whole(trainer.model.state_dict()),
        "optim": {str(i): whole(o.state_dict()) for i, o in enumerate(trainer.optimizers)},
        "process": {str(rank): part for rank, part in enumerate(world.collect(own))},
        "trainer": {
            "step": trainer.step,
            "seconds": trainer.elapsed(),
            "world_size": world.size,
            "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
            "schedules": [schedule.state_dict() for schedule in trainer.schedules],
            "callbacks": [
                {"name": type(callback).__name__, "state": callback.state_dict()}
                for callback in _with_state(trainer)
            ],
            "guard": trainer.guard.state_dict(),
            "metrics": dict(trainer.metrics),
            "evaluated_at": trainer.evaluated_at,
            "best": dict(trainer.best),
        },
    }
    if trainer.ema is not None and not trainer.ema.is_of_optimizer:
        state["ema"] = whole(trainer.ema.state_dict())
    return state


def restore(trainer: "Trainer", state: dict[str, Any]) -> str | None:
    """Takes over a snapshot.

    Returns:
        What could not be taken over because there are other processes now, or None.

    Raises:
        ValueError: the snapshot is of another model, or other optimizers or callbacks.
    """
    _check(trainer, state)
    _load_model(trainer.model, state["model"])
    for index, optimizer in enumerate(trainer.optimizers):
        _load_optimizer(optimizer, state["optim"][str(index)])
    if trainer.ema is not None and not trainer.ema.is_of_optimizer:
        average = trainer.ema.average
        loaded = {
            name: sharded_like(value, average[name])
            for name, value in state["ema"]["average"].items()
        }
        trainer.ema.load_state_dict({**state["ema"], "average": loaded})
    run = state["trainer"]
    trainer.step, trainer.seconds = run["step"], run["seconds"]
    for schedule, value in zip(trainer.schedules, run["schedules"], strict=True):
        schedule.load_state_dict(value)
    for callback, value in zip(_with_state(trainer), run["callbacks"], strict=True):
        callback.load_state_dict(value["state"])
    trainer.guard.load_state_dict(run["guard"])
    trainer.metrics, trainer.best = run["metrics"], run["best"]
    trainer.evaluated_at = run["evaluated_at"]
    same_world = run["world_size"] == trainer.world.size
    own = state["process"][str(trainer.world.rank if same_world else 0)]
    trainer.batches.load_state_dict(own["batches"])
    if not same_world:
        return (
            f"the checkpoint is of {run['world_size']} processes, now there are "
            f"{trainer.world.size}: carry and random generators start anew"
        )
    trainer.objective.load_state_dict(own["objective"])
    trainer.meter.load_state_dict(own["meter"])
    set_generators(own["generators"], trainer.world.device)
    return None


def _with_state(trainer: "Trainer") -> list[Any]:
    """Returns the callbacks that keep something: the others may differ from run to run."""
    return [callback for callback in trainer.callbacks if callback.state_dict()]


def _check(trainer: "Trainer", state: dict[str, Any]) -> None:
    """Compares what is there with what is needed, before anything is changed."""
    have, need = state["model"], trainer.model.state_dict()
    for what, found in (("lacks", need.keys() - have.keys()), ("has", have.keys() - need.keys())):
        if found:
            raise ValueError(
                f"Trainer: the checkpoint must be of the same model; it {what} {min(found)}"
            )
    for name, tensor in need.items():
        if isinstance(tensor, Tensor) and _kind(tensor) != _kind(have[name]):
            raise ValueError(
                f"Trainer: {name} of the checkpoint must be {_kind(tensor)} as in the model; "
                f"got {_kind(have[name])}"
            )
    run = state["trainer"]
    averages = trainer.ema is not None and not trainer.ema.is_of_optimizer
    for what, now, saved in (
        ("optimizers", [type(o).__name__ for o in trainer.optimizers], run["optimizers"]),
        ("parameters in groups", [_sizes(o.param_groups) for o in trainer.optimizers],
         [_sizes(saved["param_groups"]) for saved in state["optim"].values()]),
        ("schedules", len(trainer.schedules), len(run["schedules"])),
        ("callbacks with a state", [type(c).__name__ for c in _with_state(trainer)],
         [callback["name"] for callback in run["callbacks"]]),
        ("averages of weights", int(averages), int("ema" in state)),
    ):  # fmt: skip
        if now != saved:
            raise ValueError(
                f"Trainer: the checkpoint must be of a run with the same {what}, {now}; got {saved}"
            )


def _sizes(groups: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _load_model(model: torch.nn.Module, state: dict[str, Any]) -> None:
    current = model.state_dict()
    model.load_state_dict({name: sharded_like(v, current[name]) for name, v in state.items()})


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = {
        index: {
            name: sharded_like(value, params[index]) if _fits(value, params[index]) else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def _fits(value: Any, param: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == param.shape
