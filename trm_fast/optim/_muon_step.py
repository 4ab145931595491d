"""The step of a group of hidden matrices: momentum, orthogonalisation, update."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_fast.ops import AdaptiveStep, Settings, States, adaptive_step_, newton_schulz_
from trm_fast.optim._local import empty_output, local, stacked_like
from trm_fast.optim._plan import CompiledStep, Options, Plan, StepSpec
from trm_fast.optim._states import Keys, State

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


def momentum_keys(keys: Keys) -> Keys:
    """Returns the states of the first pass; the average follows the second one."""
    return {slot: key for slot, key in keys.items() if slot != "weight_ema"}


class Descent:
    """The numbers of the second half of a step, whose learning rate goes by the shape of a block.

    Args:
        settings: those for a ratio of 1.
    """

    def __init__(self, settings: Settings) -> None:
        self._one = settings
        self._by_ratio = {1.0: settings}

    def settings(self, ratio: float, found_inf: Tensor | None) -> Settings:
        """Returns those of a block; the decay goes by the learning rate as it is."""
        found = self._by_ratio.get(ratio)
        if found is None:
            lr, weight_decay = self._one.lr, self._one.weight_decay
            found = replace(self._one, lr=lr * ratio, weight_decay=weight_decay / ratio)
            self._by_ratio[ratio] = found
        found.scale("found_inf", found_inf)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class CompiledMuonStep(CompiledStep):
    """The step of a group of hidden matrices through the dispatcher."""

    def __call__(self) -> None:
        shape, orthogonalise = self.options.spec.matrices
        keys = self.options.spec.keys
        average = keys.get("weight_ema")
        counters = [state["step"].clone() for state in self.states]
        kept = update_dtype(orthogonalise.dtype)
        updates = [empty_output(param, kept) for param in self.params]
        self.write(momentum_keys(keys), updates)
        rows = [block_rows(param, shape) for param in self.params]
        Blocks(updates, rows, shape).orthogonalise(orthogonalise)
        for ratio, part in descents(self.params, updates, shape):
            adaptive_step_(
                [self.params[i] for i in part],
                [updates[i] for i in part],
                [], [],
                [counters[i] for i in part],
                weight_emas=[self.states[i][average] for i in part] if average else [],
                settings=self.options.descent.settings(ratio, self.settings.found_inf),
                backend=self.options.spec.backend,
            )  # fmt: skip


class Second(NamedTuple):
    """The second pass over some parameters: the ratio of their learning rate, their indices and
    their step."""

    ratio: float
    indices: list[int]
    step: AdaptiveStep


class MuonPlan(Plan):
    """The step of a group of hidden matrices.

    The first pass moves the momentum on and writes each update; then whole matrices are
    orthogonalised; the second pass takes the updates. Each pass goes over memory once.
    """

    compiled = CompiledMuonStep

    def __init__(
        self, spec: StepSpec, params: list[Tensor], grads: list[Tensor], states: list[State]
    ) -> None:
        self._shape, self._orthogonalise = spec.matrices
        kept = update_dtype(self._orthogonalise.dtype)
        self._updates = [empty_output(local(param), kept) for param in params]
        # What cannot be orthogonalised must be refused before the momentum moves.
        for device, dtype in {(update.device, update.dtype) for update in self._updates}:
            self._orthogonalise([torch.zeros((1, 1), device=device, dtype=dtype)])
        super().__init__(spec, params, grads, states, momentum_keys(spec.keys), self._updates)
        self._finished = [local(state["step"]) for state in states]
        self._counters = [step.clone() for step in self._finished]  # for the second pass
        self._blocks = self._block_list(params, self._updates) if self.plain else None
        self._gathered: dict[tuple[Any, ...], list[int]] = {}
        for index, param in enumerate(params):
            self._gathered.setdefault(_kind(param), []).append(index)
        self._second = [
            Second(ratio, indices, self._second_step(indices))
            for ratio, indices in descents(params, self._updates, self._shape)
        ]

    def _second_step(self, indices: list[int]) -> AdaptiveStep:
        average = self.spec.keys.get("weight_ema")
        averages = [local(self.states[i][average]) for i in indices] if average else []
        return AdaptiveStep(
            [local(self.params[i]) for i in indices],
            [self._updates[i] for i in indices],
            States(steps=[self._counters[i] for i in indices], weight_emas=averages),
            backend=self.spec.backend,
        )

    def fits(self, params: list[Tensor], grads: list[Tensor]) -> bool:
        """Returns whether the tensors of both passes fit."""
        return super().fits(params, grads) and all(
            second.step.fits(
                [local(self.params[i]) for i in second.indices],
                [self._updates[i] for i in second.indices],
            )
            for second in self._second
        )

    def step(self, grads: list[Tensor], options: Options) -> None:
        """Moves the momentum on, orthogonalises the updates, and takes them."""
        # Both passes count alike, and users who set the state "step" set it for both.
        torch._foreach_copy_(self._counters, self._finished)
        super().step(grads, options)
        if self._blocks is not None:
            self._blocks.orthogonalise(self._orthogonalise)
        else:
            self._orthogonalise_shards()
        for ratio, indices, step in self._second:
            settings = options.descent.settings(ratio, options.settings.found_inf)
            step([self._updates[i] for i in indices], settings)

    def _block_list(self, params: Sequence[Tensor], updates: Sequence[Tensor]) -> "Blocks":
        return Blocks(updates, [block_rows(param, self._shape) for param in params], self._shape)

    def _orthogonalise_shards(self) -> None:
        """Gathers the updates, one all-gather for all alike, orthogonalises them on every rank, and
        keeps the own part of each."""
        for indices in self._gathered.values():
            params = [self.params[i] for i in indices]
            updates = [self._updates[i] for i in indices]
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
    rows = torch.empty(param.shape, device="meta").stride()
    whole = stacked_like(torch.stack(updates), param, len(updates), rows).full_tensor()
    return whole.contiguous()  # type: ignore[no-any-return]


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
