"""The plain tensors behind DTensors and complex tensors, on which a step really works."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trm_fast.ops._tensors import is_dense


def is_plain(param: Tensor) -> bool:
    """Returns whether a parameter is neither complex nor of a tensor subclass such as DTensor."""
    return type(param) in (torch.nn.Parameter, Tensor) and not param.is_complex()


def local(tensor: Tensor) -> Tensor:
    """Returns the plain real tensor behind a DTensor or a complex tensor."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def local_grad(grad: Tensor, param: Tensor) -> Tensor:
    """Returns the part of a gradient that belongs to the local part of its parameter."""
    if hasattr(grad, "placements") and grad.placements != param.placements:  # type: ignore[attr-defined]
        # Backward may leave partial sums, one on each rank.
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def like(tensor: Tensor, param: Tensor) -> Tensor:
    """Reverses ``local``: returns the complex tensor or DTensor whose local part is ``tensor``."""
    if param.is_complex():
        tensor = torch.view_as_complex(tensor)
    if not hasattr(param, "to_local"):
        return tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        tensor,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        shape=param.shape,
        stride=param.stride(),
    )


def stacked_like(tensor: Tensor, param: Tensor, count: int, inner: Sequence[int]) -> Any:
    """Returns the DTensor of shape [count, *param.shape] whose local part is ``tensor``, sharded
    behind its first dimension as ``param`` is; ``inner`` are its strides there."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        tensor,
        param.device_mesh,  # type: ignore[attr-defined]
        list(map(_behind_one_dim, param.placements)),  # type: ignore[attr-defined]
        shape=torch.Size((count, *param.shape)),
        stride=(param.numel(), *inner),
    )


def _behind_one_dim(place: Any) -> Any:
    """Returns the placement of a tensor with one more dimension in front."""
    if not hasattr(place, "dim"):
        return place
    strided = {name: getattr(place, name) for name in ("split_factor",) if hasattr(place, name)}
    return type(place)(place.dim + 1, **strided)


def empty_output(param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns memory for what a rule with an output writes, in the order of the states of a plain
    parameter; float64 stays float64."""
    order = torch.preserve_format if is_dense(param) else torch.contiguous_format
    kept = param.dtype if dtype is None or param.dtype == torch.float64 else dtype
    return torch.empty_like(param, dtype=kept, requires_grad=False, memory_format=order)


def add_shards(sums: Tensor, params: Sequence[Tensor]) -> None:
    """Adds up, in place, the rows of parameters that lie in parts on several ranks: one all-reduce
    for each dimension of a mesh that they are sharded over."""
    rows: dict[tuple[Any, int], list[int]] = {}
    for row, param in enumerate(params):
        for dim, place in enumerate(getattr(param, "placements", ())):
            if not place.is_replicate():  # is_shard() leaves out strided shards
                rows.setdefault((param.device_mesh, dim), []).append(row)  # type: ignore[attr-defined]
    for (mesh, dim), members in rows.items():
        index = torch.tensor(members, device=sums.device)
        shared = sums.index_select(0, index)
        torch.distributed.all_reduce(shared, group=mesh.get_group(dim))
        sums.index_copy_(0, index, shared)
