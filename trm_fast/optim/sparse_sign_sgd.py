"""``SparseSignSGD``: sign descent on the rows of a table that a step has looked up.

Source: ``CastedSparseEmbeddingSignSGD_Distributed`` of the official tiny recursive model, which it
uses for puzzle embeddings (SamsungSAILMontreal/TinyRecursiveModels at 2da731c,
``models/sparse_embedding.py``).
"""

from collections.abc import Callable
from math import isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from trm_fast.optim._closure import evaluate

Group = dict[str, Any]


class SparseSignSGD(Optimizer):
    """Moves the rows that got a gradient by the sign of their summed gradient; leaves all others.

        row <- row * (1 - lr * weight_decay) - lr * sign(sum of the gradients of this row)

    A table of which each batch sees a few rows gives Adam almost nothing to average, and Adam
    without averages is the sign. Rows that were not looked up do not even decay.

    Gradients may be sparse (``nn.Embedding(sparse=True)``), where the looked-up rows are those that
    the gradient lists, or dense, where they are those that hold a non-zero: a row whose gradient is
    exactly zero cannot be told from one that was not looked up, so it does not decay. On a CPU only
    rows with a gradient are stepped; on a GPU a dense gradient is handled as a whole table, so
    prefer sparse ones for tables of gigabytes. Nothing waits for a GPU: equal rows are summed there
    without ``coalesce``, which would have to tell the host how many distinct ones there are.

    Sums and steps are computed in float32 (float64 for float64) and rounded once, and equal rows
    are summed in a fixed order. Keep tables in float32: in bfloat16 a step below 1/256 of a weight
    is lost. A NaN has the sign 0, as in torch, so that its element only decays; with ``GradScaler``
    a step with NaN or inf leaves everything untouched, without a host sync, and a scaled gradient
    has the right sign as it is.

    The sum over all ranks has to come before the sign. ``DistributedDataParallel`` sees to that:
    its averaged gradients have the sign of the sum. NCCL reduces dense gradients only, so use
    ``sparse=False`` there; without DDP, gather the ids and the gradients of all ranks and give each
    rank the same ``torch.sparse_coo_tensor(ids[None], grads, table.shape)``, in which equal ids may
    repeat.

    Args:
        params: tables, named tables or groups, as for ``torch.optim``; each at least 2-D, floating
            point, rows along the first dimension.
        lr: size of a step, >= 0; a tensor of one element is read on its device. Published: 1e-4
            (Sudoku, Maze), 1e-2 (ARC).
        weight_decay: decay of a row per step that it takes and unit of ``lr``, >= 0. Published:
            1.0 (Sudoku, Maze), 0.1 (ARC).
        maximize: ascends instead; decays all the same.

    Raises:
        ValueError: an option is out of range or not finite, or a parameter has no rows.

    Example:
        >>> table = torch.nn.Embedding(960_961, 512, sparse=True)
        >>> optimizer = trm_fast.optim.SparseSignSGD(table.parameters(), lr=1e-2, weight_decay=0.1)
        >>> loss_fn(table(ids)).backward()
        >>> optimizer.step()
    """

    # The sign needs no unscaling, and step() itself heeds found_inf.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        weight_decay: float | Tensor = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, as ``torch.optim`` does.

        Raises:
            ValueError: an option is out of range, or a parameter has no rows; no group is added.
            TypeError: an option is of another type; no group is added.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step in place; gradients are only read, and parameters without one skipped.

        Args:
            closure: evaluates the model, with gradients enabled, and returns the loss.

        Returns:
            The loss of ``closure``, or None.

        Raises:
            ValueError: an option was changed to something out of range, or a gradient is sparse in
                more than its rows; nothing is written then.
        """
        loss = evaluate(closure)
        # Every group is checked before the first one moves.
        for group in self.param_groups:
            _check_group(group)
            for param in group["params"]:
                _check_grad(param)
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    _step_table(param, param.grad, group, found_inf)
        return loss


def _step_table(param: Tensor, grad: Tensor, group: Group, found_inf: Tensor | None) -> None:
    taken = None if found_inf is None else found_inf.to(param.device, non_blocking=True) == 0
    if grad.is_sparse:
        _step_rows(param, *_signs(grad, _math_dtype(param)), group, taken)
    elif param.device.type == "cpu":
        rows = _looked_up(grad).nonzero().squeeze(1)
        _step_rows(param, rows, grad.index_select(0, rows).sign_(), group, taken)
    else:
        _step_whole(param, grad, group, taken)


def _step_rows(
    param: Tensor, rows: Tensor, signs: Tensor, group: Group, taken: Tensor | None
) -> None:
    moved = _moved(param.index_select(0, rows), signs, group, taken)
    # A row that is listed twice is written twice, with the same values.
    param.index_copy_(0, rows, moved.to(param.dtype))


def _step_whole(param: Tensor, grad: Tensor, group: Group, taken: Tensor | None) -> None:
    """Computes all rows and keeps those that were looked up, as the host of a GPU does not know how
    many they are."""
    looked_up = _looked_up(grad).view(-1, *[1] * (grad.ndim - 1))
    taken = looked_up if taken is None else looked_up & taken
    param.copy_(_moved(param, grad.sign(), group, taken))


def _moved(old: Tensor, signs: Tensor, group: Group, taken: Tensor | None) -> Tensor:
    """Returns ``old`` after the step, and as it was where ``taken`` is False; uses up ``signs``."""
    lr, weight_decay = _scalar(group["lr"]), _scalar(group["weight_decay"])
    dtype = _math_dtype(old)
    # In place, because fresh memory costs more than the arithmetic.
    moved = old.to(dtype, copy=True).mul_(1 - lr * weight_decay)
    moved.sub_(signs.to(dtype).mul_(-lr if group["maximize"] else lr))
    return moved if taken is None else torch.where(taken, moved, old)


def _signs(grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the rows that a sparse gradient lists, and for each the sign of the sum over all
    equal rows."""
    rows, values = grad._indices()[0], grad._values()
    if grad.is_coalesced() or not rows.numel():
        return rows, values.sign()
    if grad.is_cuda:
        return rows, _signs_of_sums(rows, values.to(dtype))
    summed = grad.to(dtype).coalesce()
    return summed._indices()[0], summed._values().sign_()


def _signs_of_sums(rows: Tensor, values: Tensor) -> Tensor:
    """Returns, for each listed row, the sign of the sum over all equal rows.

    On a GPU coalesce() would wait for the device, to tell the host how many rows are distinct.
    """
    ordered, order = rows.sort(stable=True)
    starts = torch.ones_like(ordered)
    starts[1:] = ordered[1:] != ordered[:-1]
    # Number of each listed row among the distinct ones, of which there are at most as many.
    number = torch.empty_like(rows).scatter_(0, order, starts.cumsum(0) - 1)
    # Unlike index_add_, this adds in a fixed order on a GPU.
    sums = torch.zeros_like(values).index_put_((number,), values, accumulate=True)
    return sums.sign_().index_select(0, number)


def _looked_up(grad: Tensor) -> Tensor:
    return grad.flatten(1).any(1)  # any() takes what is not zero as true, a NaN too


def _math_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _scalar(value: float | Tensor) -> float | Tensor:
    return value.reshape(()) if isinstance(value, Tensor) else value


def _check_group(group: Group) -> None:
    for name in ("lr", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"SparseSignSGD: {name} must have one element; got shape {tuple(value.shape)}"
                )
        elif not isinstance(value, Real):
            raise TypeError(f"SparseSignSGD: {name} must be a number or a tensor; got {value!r}")
        elif not (isfinite(value) and float(value) >= 0):
            raise ValueError(f"SparseSignSGD: {name} must be finite and >= 0; got {value}")
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"SparseSignSGD: maximize must be True or False; got {group['maximize']!r}")
    for param in group["params"]:
        if param.ndim < 2 or not param.is_floating_point():
            raise ValueError(
                "SparseSignSGD: a parameter must be a floating point table of 2 or more "
                f"dimensions; got {tuple(param.shape)} {param.dtype}"
            )


def _check_grad(param: Tensor) -> None:
    grad = param.grad
    if grad is None or grad.layout == torch.strided:
        return
    if grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
        kind = f" in {grad.sparse_dim()} dimensions" if grad.is_sparse else ""
        raise ValueError(
            "SparseSignSGD: a gradient must be dense, or sparse in its rows alone; got "
            f"{grad.layout}{kind}"
        )
