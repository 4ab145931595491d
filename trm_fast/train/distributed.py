"""Several processes under ``torchrun``: DDP or FSDP2, and state that is whole on each of them."""

import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from trm_fast.train.config import Strategy


class World:
    """The processes of a run; one process is a world of its own.

    Under ``torchrun`` the process group is made here, unless there is one: NCCL for GPUs, gloo for
    the CPU.

    Args:
        device: "auto" (a GPU if there is one), or what ``torch.device`` takes.

    Attributes:
        rank: of this process.
        size: number of processes.
        device: of this process.
    """

    def __init__(self, device: str | torch.device = "auto") -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = _device(device)
        self._control: Any = None
        self._pending: tuple[Tensor, dist.Work] | None = None
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        elif self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if self.size > 1:
            self._control = dist.new_group(backend="gloo")

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module, strategy: Strategy) -> nn.Module:
        """Returns the model to be called: itself, in DDP, or sharded in place by FSDP2."""
        if self.size == 1 and strategy == "ddp":
            return model
        if strategy == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            # Buffers are constants here, or rows that every process moves alike.
            return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
        mesh = init_device_mesh(self.device.type, (self.size,))
        # A recursion calls its network many times in one forward pass: gathered once, kept.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        for name in ("step", "predict"):
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)
        return model

    def add_up(self, tensor: Tensor) -> None:
        """Adds a tensor up over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def all_agree(self, flag: Tensor) -> Tensor:
        """Returns whether a 0-d bool tensor is True in every process, on its device."""
        if self.size == 1:
            return flag
        number = flag.float()
        dist.all_reduce(number, op=dist.ReduceOp.MIN)
        return number > 0

    def latest_signal(self, number: int | None) -> int | None:
        """Returns the signal that any process has caught, one step late, so that all processes stop
        after the same step and none waits for the others."""
        if self.size == 1:
            return number
        found = None
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            found = int(flag) or None
        flag = torch.tensor(number or 0)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control, async_op=True)
        self._pending = None if found else (flag, work)
        return found

    def gather_rows(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the sparse gradients of all: the rows of a puzzle table, which DDP
        does not know. Each process has equally many rows."""
        if self.size == 1:
            return
        for tensor in tensors:
            grad = tensor.grad
            if grad is None or not grad.is_sparse:
                continue
            indices, values = self._gathered(grad._indices()[0]), self._gathered(grad._values())
            tensor.grad = torch.sparse_coo_tensor(
                torch.cat(indices)[None], torch.cat(values) / self.size, grad.shape
            )

    def each(self, state: Any) -> list[Any]:
        """Returns a nested state of every process; tensors have the same shapes in all of them, and
        other values are those of this one."""
        if self.size == 1:
            return [state]
        copies: list[dict[int, Tensor]] = [{} for _ in range(self.size)]
        leaves: list[Tensor] = []
        numbered = tree_map(lambda leaf: _numbered(leaf, leaves), state)
        for place, leaf in enumerate(leaves):
            for copy, value in zip(copies, self._gathered(leaf), strict=True):
                copy[place] = value
        return [_filled(numbered, copy) for copy in copies]

    def gather(self, value: Any) -> list[Any]:
        """Returns a plain value of every process, in the order of their ranks."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self._control)
        return found

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        tensor = tensor.detach().to(self.device).contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier(group=self._control)


class _Place:
    """Stands for a tensor of a nested state."""

    def __init__(self, place: int) -> None:
        self.place = place


def _filled(state: Any, tensors: dict[int, Tensor]) -> Any:
    return tree_map(lambda leaf: tensors[leaf.place] if isinstance(leaf, _Place) else leaf, state)


def _numbered(leaf: Any, leaves: list[Tensor]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaves.append(leaf)
    return _Place(len(leaves) - 1)


def whole(state: Any) -> Any:
    """Returns a nested state with sharded tensors gathered; every process must call it."""
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, state)


def sharded_like(value: Any, like: Any) -> Any:
    """Returns a whole tensor sharded as ``like`` is, and anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def device_name(device: torch.device) -> str:
    """Returns what a device is called, such as "AMD EPYC 9354 (cpu)"."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*: (.+)", text)
    return f"{found[1].strip() if found else platform.machine()} ({device})"


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        # torch says in words and exception types that differ by device why it cannot be used.
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"Trainer: device must be auto or one that torch can use; got {device!r} ({reason})"
        ) from error
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found
