"""Several processes under ``torchrun``: data parallel or FSDP2, and state that is whole on each."""

import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from trm_fast.train._launch import check_master, launched, local_rank, timeout
from trm_fast.train.checkpoints.state import (
    dumps,
    flatten,
    from_safetensors,
    loads,
    to_safetensors,
    unflatten,
)
from trm_fast.train.config import Strategy

_NONE, _DENSE, _SPARSE = range(3)  # kinds of gradients
# The modules through which everything goes from one process to another.
_EXCHANGES = {"torch.distributed.distributed_c10d", "torch.distributed._functional_collectives"}


@contextmanager
def lost_processes() -> Iterator[None]:
    """Says in one line that an exchange has failed, whoever has begun it: FSDP2 does so within the
    passes.

    Raises:
        ConnectionError: in the place of what torch raises then.
    """
    try:
        yield
    except RuntimeError as error:
        # torch has no type of its own for most of these errors, but one place for each exchange.
        frames = (frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__))
        if not isinstance(error, dist.DistError) and _EXCHANGES.isdisjoint(frames):
            raise
        raise _lost(error) from error


def _lost(error: RuntimeError) -> ConnectionError:
    # Without the place in the source of gloo, and its advice.
    reason = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
    return ConnectionError(
        f"Trainer: all processes must answer within {timeout().total_seconds():g} s "
        f"(TRM_FAST_TIMEOUT); one has ended or stands still, as its log may tell: {reason}"
    )


class World:
    """The processes of a run; one process is a world of its own.

    Under ``torchrun`` the process group is made here, unless there is one: NCCL for GPUs, gloo for
    the CPU. A process that ends without a word ends the others with their next exchange, and one
    that stands still after TRM_FAST_TIMEOUT seconds (600 if that is not set). What processes tell
    each other are tensors and JSON.

    Args:
        device: "auto" (a GPU if there is one), or what ``torch.device`` takes.

    Raises:
        ValueError: the device cannot be used, or the environment says only half of the processes,
            such as RANK without WORLD_SIZE.
        ConnectionError: the other processes have not come in time.

    Attributes:
        rank: of this process.
        size: number of processes.
        device: of this process.
    """

    def __init__(self, device: str | torch.device = "auto") -> None:
        grouped = dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if grouped else launched()
        self.device = _device(device, self.size)
        self._control: Any = None
        self._pending: tuple[Tensor, dist.Work] | None = None
        if self.size == 1:
            return
        with lost_processes():
            if not grouped:
                check_master(self.rank)
                backend = "nccl" if self.device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=timeout())
            self._control = dist.new_group(backend="gloo", timeout=timeout())

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @lost_processes()
    def prepare(self, model: nn.Module, strategy: Strategy) -> None:
        """Gives every process the weights and buffers of the first one; with "fsdp2" shards the
        weights in place. Nothing overwrites a buffer after that: each process has its own."""
        if self.size == 1 and strategy == "ddp":
            return
        for tensor in model.state_dict().values() if self.size > 1 else ():
            dist.broadcast(tensor, 0)
        if strategy == "fsdp2":
            mesh = init_device_mesh(self.device.type, (self.size,))
            # A recursion calls its network many times in one forward pass: gathered once, kept.
            fully_shard(model, mesh=mesh, reshard_after_forward=False)
            if hasattr(model, "start"):  # the first pass of deep supervision uses weights too
                register_fsdp_forward_method(model, "start")
            model.register_forward_pre_hook(_bring_out)

    def average_gradients(self, params: Sequence[Tensor]) -> None:
        """Gives every process the mean of all dense gradients, in one exchange for each dtype. A
        process that lacks a gradient which another one has counts as zeros.

        It comes after the last backward pass of an update, and not inside of it as in DDP: an
        objective decides with its last loss how many backward passes there are, and weights that
        several of them reach are exchanged once. Sharded gradients are exchanged already.
        """
        if self.size > 1:
            self._average_gradients(params)

    @torch.no_grad()
    def _average_gradients(self, params: Sequence[Tensor]) -> None:
        whole = [param for param in params if not isinstance(param, DTensor)]
        if not whole:
            return
        kinds = torch.tensor([_kind(param.grad) for param in whole], dtype=torch.uint8)
        dist.all_reduce(kinds, op=dist.ReduceOp.MAX, group=self._control)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for param, kind in zip(whole, kinds.tolist(), strict=True):
            if kind == _DENSE:
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
                by_dtype.setdefault(param.grad.dtype, []).append(param.grad)
        for grads in by_dtype.values():
            flat = torch.cat([grad.reshape(-1) for grad in grads]).div_(self.size)
            dist.all_reduce(flat)
            parts = flat.split([grad.numel() for grad in grads])
            pairs = zip(parts, grads, strict=True)
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in pairs])

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
            try:
                work.wait()
            except RuntimeError as error:
                raise _lost(error) from error
            found = int(flag) or None
        flag = torch.tensor(number or 0)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control, async_op=True)
        self._pending = None if found else (flag, work)
        return found

    def gather_rows(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the sparse gradients of all: the rows of a puzzle table. On a GPU
        each process must have equally many rows."""
        if self.size == 1:
            return
        for tensor in tensors:
            grad = tensor.grad
            if grad is None or not grad.is_sparse:
                continue
            rows, values = self._padded(grad._indices()[0], grad._values())
            rows, values = torch.cat(self._gathered(rows)), torch.cat(self._gathered(values))
            tensor.grad = torch.sparse_coo_tensor(
                rows[None], values / self.size, grad.shape, check_invariants=False
            )

    def _padded(self, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns as many rows as the process with most of them has. On the CPU, sums of sparse
        gradients merge some equal rows; on a GPU none, and asking for their number would wait."""
        if rows.device.type != "cpu":
            return rows, values
        missing = int(max(self._gathered(torch.tensor(len(rows))))) - len(rows)
        # Zeros for a row that is there, so that no other one is taken for looked up.
        return (
            torch.cat([rows, rows[-1:].expand(missing)]),
            torch.cat([values, values.new_zeros(missing, *values.shape[1:])]),
        )

    def gather(self, value: Any) -> list[Any]:
        """Returns a plain value of every process, in the order of their ranks: None, bool, int,
        float, str, or lists, tuples and dicts of these."""
        if self.size == 1:
            return [value]
        parts = self._padded_bytes(_packed(value))
        found = [torch.empty_like(parts) for _ in range(self.size)]
        dist.all_gather(found, parts, group=self._control)
        return [_unpacked(part) for part in found]

    def collect(self, state: Any) -> list[Any]:
        """Returns a nested state of each process, on the CPU, to the first one; the others get an
        empty list. A state is what a checkpoint can hold."""
        if self.size == 1:
            return [state]
        own = self._padded_bytes(_packed(state))
        found = [torch.empty_like(own) for _ in range(self.size)] if self.is_main else None
        dist.gather(own, found, group=self._control)
        return [_unpacked(part) for part in found or ()]

    def _padded_bytes(self, data: bytearray) -> Tensor:
        """Returns bytes, with zeros behind them up to the length of the longest of all."""
        most = torch.tensor(len(data))
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._control)
        data.extend(bytes(int(most) - len(data)))
        return torch.frombuffer(data, dtype=torch.uint8)

    def own_values(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns those of some tensors, of the same names and shapes everywhere, that differ from
        those of the first process; to that one none."""
        own: dict[str, Tensor] = {}
        for name, tensor in tensors.items() if self.size > 1 else ():
            first = tensor.detach().clone()
            dist.broadcast(first, 0)
            if not torch.equal(first, tensor):
                own[name] = tensor.detach().clone()
        return own

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """Returns the means over processes, weighted by the "count" of each, if they have one. A
        process that has counted nothing need not have the metrics."""
        if self.size == 1:
            return dict(metrics)
        found = self.gather(metrics)
        counts = [float(part.get("count", 1.0)) for part in found]
        if not sum(counts):
            return dict(found[0])
        sums: dict[str, float] = {}
        for part, count in zip(found, counts, strict=True):
            for name, value in part.items() if count else ():
                sums[name] = sums.get(name, 0.0) + value * count
        means = {name: total / sum(counts) for name, total in sums.items()}
        return means | ({"count": sum(counts)} if "count" in means else {})

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        tensor = tensor.detach().to(self.device).contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier(group=self._control)


def _packed(state: Any) -> bytearray:
    """Returns a state as its tree in JSON and a safetensors file of its tensors, each behind its
    length."""
    tensors, tree = flatten(state, "state")
    data = bytearray()
    for part in (dumps(tree), b"".join(to_safetensors(tensors)) if tensors else b""):
        data += len(part).to_bytes(8, "little") + part
    return data


def _unpacked(data: Tensor) -> Any:
    raw, parts, start = data.numpy().tobytes(), [], 0
    for _ in range(2):
        length = int.from_bytes(raw[start : start + 8], "little")
        parts.append(raw[start + 8 : start + 8 + length])
        start += 8 + length
    tensors = from_safetensors(parts[1]) if parts[1] else {}
    return unflatten(loads(parts[0], "state of a process"), tensors)


def whole(state: Any) -> Any:
    """Returns a nested state with sharded tensors gathered; every process must call it."""
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, state)


def sharded_like(value: Any, like: Any) -> Any:
    """Returns a whole tensor sharded as ``like`` is, and anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Has the weights of an FSDP2 model gathered on every process, as they are at the beginning;
    processes may then call it differently often. Other models are left alone."""
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        yield
    finally:
        # Else the next step would go on with these weights, whatever has happened to them since.
        if isinstance(model, FSDPModule):
            model.reshard()


class _Hidden:
    """A value in which nobody looks for tensors."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _bring_out(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.value if isinstance(arg, _Hidden) else arg for arg in args)


def call_with_state(model: Any, state: Any, batch: Any) -> Any:
    """Returns ``model(state, batch)``, where the state may need a gradient. FSDP2 would exchange
    the gradients of all weights as soon as that of an input is there, which may be too early."""
    return model(_Hidden(state) if isinstance(model, FSDPModule) else state, batch)


def reduces_gradients(model: nn.Module, now: bool) -> None:
    """Says whether the next backward passes of an FSDP2 model exchange the gradients that have come
    together; exchanges add up. Other models are left alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def _kind(grad: Tensor | None) -> int:
    if grad is None:
        return _NONE
    return _SPARSE if grad.is_sparse else _DENSE


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


def _device(device: str | torch.device, size: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", local_rank(torch.cuda.device_count(), size))
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
