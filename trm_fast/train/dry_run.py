"""What a run would take, found by taking one step of it."""

import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trm_fast._dispatch import slow_paths
from trm_fast.train.checkpoints.snapshot import snapshot
from trm_fast.train.generators import fork_rng, seed_everything
from trm_fast.train.trainer import Trainer


@dataclass(frozen=True)
class DryRun:
    """What one step has shown; sizes in bytes.

    Args:
        parameters: numbers that are trained.
        weights: of parameters and buffers.
        gradients: of all gradients.
        optimizers: of their states, averages of the weights among them.
        checkpoint: of the tensors of a checkpoint.
        peak: on a GPU most of what was allocated at once; on a CPU most of what the process had in
            memory, torch and data included.
        loss: of the step.
        seconds: of the step, which is slower than later ones.
        slow_paths: one line for each reason why ops did not run as fast as they might.
    """

    parameters: int
    weights: int
    gradients: int
    optimizers: int
    checkpoint: int
    peak: int
    loss: float
    seconds: float
    slow_paths: tuple[str, ...]


def dry_run(trainer: Trainer) -> DryRun:
    """Takes one step and measures it; nothing is written. The trainer is used up by it.

    Raises:
        ValueError: there is no batch.
    """
    with fork_rng(trainer.world.device), slow_paths() as slow:
        seed_everything(trainer.config.seed)
        started = time.perf_counter()
        loss = trainer.try_step()
        seconds = time.perf_counter() - started
    # A state dict names each tensor once, whatever its optimizer.
    states = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
    average = [] if trainer.ema is None else list(trainer.ema.average.values())
    kept = {id(tensor): tensor for tensor in (*_tensors(states), *average)}
    params = list(trainer.model.parameters())
    return DryRun(
        parameters=sum(param.numel() for param in params),
        weights=_bytes(trainer.model.state_dict().values()),
        gradients=_bytes(param for param in params if param.requires_grad),
        optimizers=_bytes(kept.values()),
        checkpoint=_bytes(_tensors(snapshot(trainer))),
        peak=_peak(trainer.world.device),
        loss=loss,
        seconds=seconds,
        slow_paths=tuple(slow.new()),
    )


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
