"""The step of a group of hidden matrices: momentum, orthogonalisation, update."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_fast.ops import AdaptiveStep, Settings, adaptive_step_, newton_schulz_
from trm_fast.optim._group_step import CompiledStep
from trm_fast.optim._plan import Keys, Plan, empty_output, local
from trm_fast.optim._states import State, one_dim_on

RATIOS = ("original", "match_rms_adamw", "spectral")


class Shape(NamedTuple):
    """How the orthogonalised matrices of a group lie in its parameters.

    Args:
        row_splits: number of equal blocks of rows, or the rows of each block.
        batch_dims: leading dimensions that count matrices.
        ratio: what the learning rate of a block depends on.
        owner: who speaks in an error.
    """

    row_splits: int | tuple[int, ...]
    batch_dims: int
    ratio: str
    owner: str


class Orthogonaliser(NamedTuple):
    """The arguments of ``newton_schulz_``."""

    steps: int
    coefficients: Any
    method: str
    dtype: torch.dtype | None
    eps: float
    backend: str | None

    def __call__(self, matrices: Sequence[Tensor]) -> None:
        newton_schulz_(
            matrices, self.steps, self.coefficients, self.method,
            dtype=self.dtype, eps=self.eps, backend=self.backend,
        )  # fmt: skip


def update_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Returns the dtype in which updates are kept for Newton-Schulz steps in ``dtype``.

    Not float16: before its norm divides it, an update has the range of the gradients.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def block_rows(param: Tensor, shape: Shape, label: str = "a parameter") -> list[int]:
    """Returns the rows of each block of ``param``, whose other dimensions behind the batch are
    flattened into columns.

    ``label`` is what an error calls it.

    Raises:
        ValueError: the parameter has too few dimensions, or its rows cannot be split so.
    """
    if param.dim() < 2 + shape.batch_dims:
        raise ValueError(
            f"{shape.owner}: {label} must have at least {2 + shape.batch_dims} dimensions with "
            f"batch_dims={shape.batch_dims}; got {tuple(param.shape)}: leave others to another "
            "optimizer"
        )
    rows, splits = param.shape[shape.batch_dims], shape.row_splits
    blocks = [rows // splits] * splits if isinstance(splits, int) else list(splits)
    if sum(blocks) != rows or (0 in blocks and rows):
        raise ValueError(
            f"{shape.owner}: {label} must have rows that row_splits={splits!r} divides; got {rows} "
            "rows: give it a group of its own"
        )
    return blocks


def blocks_of(tensor: Tensor, rows: list[int], batch_dims: int) -> list[Tensor]:
    """Returns views of the matrices in ``tensor``."""
    if tensor.dim() == 2:
        return list(tensor.split(rows))
    matrices = tensor.flatten(batch_dims + 1).flatten(0, batch_dims - 1) if batch_dims else None
    split = [tensor.flatten(1)] if matrices is None else matrices.unbind()
    return [block for matrix in split for block in matrix.split(rows)]


def _columns(tensor: Tensor, batch_dims: int) -> int:
    columns = 1
    for size in tensor.shape[batch_dims + 1 :]:
        columns *= size
    return columns


def ratio_of(block: Tensor, ratio: str) -> float:
    """Returns what the learning rate of a block is multiplied by."""
    rows, columns = block.shape
    if block.numel() == 0:
        return 1.0
    if ratio == "match_rms_adamw":
        return 0.2 * sqrt(max(rows, columns))
    share = rows / columns
    return sqrt(share) if ratio == "spectral" else sqrt(max(1.0, share))


class MuonPlan(Plan):
    """The step of a group of hidden matrices, checked once, as long as the same tensors take it.

    ``step`` moves the momentum on and writes each update, ``descend`` orthogonalises the updates,
    whole matrices at a time, and takes them. Both pass over memory once.
    """

    def __init__(
        self,
        keys: Keys,
        needed: tuple[str, ...],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        fixed: tuple[Any, ...],
    ) -> None:
        backend, self._shape, self._orthogonalise = fixed
        kept = update_dtype(self._orthogonalise.dtype)
        self.updates = [empty_output(local(param), kept) for param in params]
        # Whatever cannot be orthogonalised has to show before the momentum moves.
        for device, dtype in {(update.device, update.dtype) for update in self.updates}:
            self._orthogonalise([torch.zeros((1, 1), device=device, dtype=dtype)])
        momentum = {slot: key for slot, key in keys.items() if slot != "weight_ema"}
        super().__init__(momentum, needed, params, grads, states, fixed, self.updates)
        self._all_keys = keys
        self._finished = [local(state["step"]) for state in states]
        self._counters = [step.clone() for step in self._finished]  # for the second pass
        self._blocks = self._block_list(params, self.updates) if self.plain else None
        self._gathered: dict[tuple[Any, ...], list[int]] = {}
        for index, param in enumerate(params):
            self._gathered.setdefault(_kind(param), []).append(index)
        self._descents = self._make_descents(keys, states, backend)

    def _make_descents(
        self, keys: Keys, states: list[State], backend: str | None
    ) -> list[tuple[float, list[int], AdaptiveStep]]:
        averages = keys.get("weight_ema")
        return [
            (
                ratio,
                indices,
                AdaptiveStep(
                    [local(self._params[i]) for i in indices],
                    [self.updates[i] for i in indices],
                    [], [],
                    [self._counters[i] for i in indices],
                    weight_emas=[local(states[i][averages]) for i in indices] if averages else [],
                    backend=backend,
                ),
            )
            for ratio, indices in descents(self._params, self.updates, self._shape)
        ]  # fmt: skip

    def holds(
        self,
        keys: Keys,
        needed: tuple[str, ...],
        params: list[Tensor],
        grads: list[Tensor],
        fixed: tuple[Any, ...],
    ) -> bool:
        """Returns whether these tensors and options are still those that were checked."""
        momentum = {slot: key for slot, key in keys.items() if slot != "weight_ema"}
        return (
            keys == self._all_keys
            and super().holds(momentum, needed, params, grads, fixed)
            and all(
                step.fits([local(self._params[i]) for i in part], [self.updates[i] for i in part])
                for _, part, step in self._descents
            )
        )

    def step(self, grads: list[Tensor], settings: Settings) -> None:
        """Moves the momentum on and writes the updates."""
        # Both passes count alike, and whoever sets the state "step" sets it for both.
        torch._foreach_copy_(self._counters, self._finished)
        super().step(grads, settings)

    def descend(self, settings: Settings) -> None:
        """Orthogonalises the updates that ``step`` has written, and takes them."""
        if self._blocks is not None:
            self._blocks.orthogonalise(self._orthogonalise)
        else:
            self._orthogonalise_shards()
        lr, weight_decay = settings.lr, settings.weight_decay
        for ratio, part, step in self._descents:
            # The decay goes by the learning rate as it is.
            settings.lr, settings.weight_decay = lr * ratio, weight_decay / ratio
            step([self.updates[i] for i in part], settings)
        settings.lr, settings.weight_decay = lr, weight_decay

    def _block_list(self, params: Sequence[Tensor], updates: Sequence[Tensor]) -> "Blocks":
        return Blocks(updates, [block_rows(param, self._shape) for param in params], self._shape)

    def _orthogonalise_shards(self) -> None:
        """Gathers the updates, one all-gather for all alike, orthogonalises them on every rank, and
        keeps the own part of each."""
        for indices in self._gathered.values():
            params = [self._params[i] for i in indices]
            updates = [self.updates[i] for i in indices]
            if not hasattr(params[0], "to_local"):
                self._block_list(params, updates).orthogonalise(self._orthogonalise)
                continue
            whole = _gather(updates, params[0]).unbind()
            self._block_list(params, whole).orthogonalise(self._orthogonalise)
            for update, matrix in zip(updates, whole, strict=True):
                update.copy_(_own_part(matrix, params[0]))


class Blocks:
    """The matrices in whole updates.

    Args:
        updates: whole updates; overwritten by ``orthogonalise``.
        rows: the rows of the blocks of each update.
        shape: how the matrices lie in the updates.
    """

    def __init__(self, updates: Sequence[Tensor], rows: list[list[int]], shape: Shape) -> None:
        # More than two dimensions can be flattened in place only in row-major order.
        flat = [u if u.dim() == 2 or u.is_contiguous() else u.contiguous() for u in updates]
        self._copied = [
            (update, copy) for update, copy in zip(updates, flat, strict=True) if copy is not update
        ]
        self._matrices: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self._uneven: list[tuple[Tensor, float]] = []
        for update, sizes in zip(flat, rows, strict=True):
            blocks = blocks_of(update, sizes, shape.batch_dims)
            ratios = [ratio_of(block, shape.ratio) for block in blocks]
            self._matrices.setdefault((update.device, update.dtype), []).extend(blocks)
            for block, ratio in zip(blocks, ratios, strict=True):
                if ratio != ratios[0]:
                    self._uneven.append((block, ratio / ratios[0]))

    def orthogonalise(self, by: Orthogonaliser) -> None:
        """Orthogonalises every block; a block whose ratio differs from that of the first one in its
        update is scaled by the quotient, because the update is taken as a whole."""
        for update, copy in self._copied:
            copy.copy_(update)
        for matrices in self._matrices.values():
            by(matrices)
        # Not torch._foreach_mul_, which rounds factors to the dtype of the blocks.
        for block, factor in self._uneven:
            block.mul_(factor)
        for update, copy in self._copied:
            update.copy_(copy)


def first_ratio(param: Tensor, shape: Shape) -> float:
    """Returns the ratio of the learning rate of the first block of a parameter."""
    rows = block_rows(param, shape)
    first = torch.empty((rows[0], _columns(param, shape.batch_dims)), device="meta")
    return ratio_of(first, shape.ratio)


def descents(
    params: Sequence[Tensor], updates: Sequence[Tensor], shape: Shape
) -> list[tuple[float, list[int]]]:
    """Returns ratios of the learning rate with the indices that take their update in one call: one
    ratio, one device, one arithmetic."""
    members: dict[tuple[float, torch.device, bool], list[int]] = {}
    for index, (param, update) in enumerate(zip(params, updates, strict=True)):
        kind = (first_ratio(param, shape), update.device, update.dtype == torch.float64)
        members.setdefault(kind, []).append(index)
    return [(ratio, indices) for (ratio, *_), indices in members.items()]


def _kind(param: Tensor) -> tuple[Any, ...]:
    place = (getattr(param, "device_mesh", None), getattr(param, "placements", None))
    return (param.shape, param.dtype, param.device, *place)


def _gather(updates: list[Tensor], param: Tensor) -> Tensor:
    """Returns the whole updates of parameters that are sharded as ``param`` is, stacked."""
    from torch.distributed.tensor import DTensor

    placements = list(map(one_dim_on, param.placements))  # type: ignore[attr-defined]
    stacked = DTensor.from_local(
        torch.stack(updates),
        param.device_mesh,  # type: ignore[attr-defined]
        placements,
        shape=torch.Size((len(updates), *param.shape)),
        stride=(param.numel(), *torch.empty(param.shape, device="meta").stride()),
    )
    return stacked.full_tensor().contiguous()


def _own_part(matrix: Tensor, param: Tensor) -> Tensor:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(
        param.shape,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
    )
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        matrix = matrix.narrow(dim, min(offset, matrix.shape[dim] - size), size)
    return matrix


@dataclass(frozen=True, slots=True)
class MuonStep:
    """The step of a group, checked and ready to be taken."""

    plan: MuonPlan
    grads: list[Tensor]
    settings: Settings
    descent: Settings

    def measure(self) -> list[Tensor]:
        """Returns sums as ``FilterSums`` does, over means too if the filter needs them."""
        return self.plan.measure(self.grads, self.settings.reduces)

    def __call__(self) -> None:
        self.plan.step(self.grads, self.settings)
        self.descent.scale("found_inf", self.settings.found_inf)
        self.plan.descend(self.descent)


@dataclass(frozen=True, slots=True)
class CompiledMuonStep:
    """The same, through the dispatcher."""

    momentum: CompiledStep
    shape: Shape
    orthogonalise: Orthogonaliser
    descent: Settings

    @property
    def settings(self) -> Settings:
        """Those of the momentum."""
        return self.momentum.settings

    def measure(self) -> list[Tensor]:
        """As that of ``CompiledStep``."""
        return self.momentum.measure()

    def __call__(self) -> None:
        call = self.momentum
        steps = [state["step"].clone() for state in call.states]
        averages = call.keys.get("weight_ema")
        keys = {slot: key for slot, key in call.keys.items() if slot != "weight_ema"}
        kept = update_dtype(self.orthogonalise.dtype)
        updates = [empty_output(param, kept) for param in call.params]
        replace(call, keys=keys, params=updates)()
        rows = [block_rows(param, self.shape) for param in call.params]
        Blocks(updates, rows, self.shape).orthogonalise(self.orthogonalise)
        for ratio, part in descents(call.params, updates, self.shape):
            adaptive_step_(
                [call.params[i] for i in part],
                [updates[i] for i in part],
                [], [],
                [steps[i] for i in part],
                weight_emas=[call.states[i][averages] for i in part] if averages else [],
                settings=replace(
                    self.descent,
                    lr=self.descent.lr * ratio,
                    weight_decay=self.descent.weight_decay / ratio,
                    found_inf=self.settings.found_inf,
                ),
                backend=call.backend,
            )  # fmt: skip
