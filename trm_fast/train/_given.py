"""What a script gives a trainer beside its settings, which a resume compares with what was before.
Values that training moves, as a learning rate does, are those at the start."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trm_fast.train._circumstances import differences
from trm_fast.train.config import TrainerConfig

Given = dict[str, dict[str, Any]]
# Of optimizers, and in no state dict of theirs.
_OPTIONS = ("clip_norm", "_backend", "_state_dtypes")
_OF_LOADERS = ("batch_size", "drop_last")


def given(
    config: TrainerConfig,
    optimizers: Sequence[Optimizer],
    schedules: Sequence[Any],
    stages: Iterable[Any],
) -> Given:
    """Returns what is given as plain values, for a checkpoint.

    Args:
        config: of the trainer.
        optimizers, schedules: of the trainer, which have not moved yet.
        stages: of the trainer.
    """
    held = {
        f"{type(part).__name__}.{index}": _options(part) for index, part in enumerate(optimizers)
    }
    moved = {
        f"{type(part).__name__}.{index}": _plain(part.state_dict())
        for index, part in enumerate(schedules)
        if hasattr(part, "state_dict")
    }
    used = {f"optimizer.{index}": _outside(part) for index, part in enumerate(optimizers)}
    batches = {
        f"batches.{stage.name}": _loader(stage.batches)
        for stage in stages
        if stage.batches is not None
    }
    return {"held": _flat(held | moved), "used": _flat(used | batches), "config": asdict(config)}


def changed(before: Mapping[str, Any], now: Given, reported: Sequence[str]) -> list[str]:
    """Returns what to report of two of these.

    Args:
        before: of the checkpoint; empty if it has none.
        now: of this run.
        reported: lines on other settings, which are not repeated.
    """
    found = {
        name: differences(old, values) if isinstance(old := before.get(name), dict) else []
        for name, values in now.items()
    }
    config = [line for line in found["config"] if not any(old.endswith(line) for old in reported)]
    lines = []
    if found["held"]:
        lines.append(
            "optimizers and schedules are given other options, and go on with those of the "
            f"checkpoint: {'; '.join(found['held'])}"
        )
    if config or found["used"]:
        lines.append(f"what is given has changed: {'; '.join([*config, *found['used']])}")
    return lines


def _options(optimizer: Optimizer) -> dict[str, Any]:
    return {
        str(index): _plain(
            {
                # A schedule has moved the rate from there.
                name: group.get("initial_lr", value) if name == "lr" else value
                for name, value in group.items()
                if name not in ("params", "param_names", "initial_lr")
            }
        )
        for index, group in enumerate(optimizer.param_groups)
    }


def _outside(optimizer: Optimizer) -> dict[str, Any]:
    values = {name: getattr(optimizer, name, None) for name in _OPTIONS}
    return {name.lstrip("_"): value for name, value in _plain(values).items()}


def _loader(batches: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: getattr(batches, name) for name in _OF_LOADERS if hasattr(batches, name)
    }
    for name in ("sampler", "batch_sampler"):
        if hasattr(batches, name):
            found[name] = type(getattr(batches, name)).__name__
    try:
        found["length"] = len(batches)
    except TypeError:
        pass
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    """Returns a value of dicts, lists, numbers and texts; what is something else stands by its
    class, so that two of one class are equal."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else f"a tensor of {value.numel()} numbers"
    if isinstance(value, torch.dtype):
        return str(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    return type(value).__name__


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_leaves(values, ""))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
