"""Muon and MuGrokfast in two processes: DDP, FSDP2 and DTensor give the weights of one process.

Gradients are means of products of small whole numbers, so that no sum depends on its order, and
whole matrices are orthogonalised on every rank: the runs must agree bit for bit.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor import distribute_tensor as distribute
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from trm_fast import MuGrokfast, Muon

from ..support.processes import needs_gloo, returned, run_cases, run_ranks
from .distributed_checks import STEPS, half, linear, train, whole, whole_numbers

pytestmark = needs_gloo

OPTIONS: dict[str, Any] = {"lr": 0.1, "weight_ema": 0.9, "filter": "ema"}
SPLIT: dict[str, Any] = {"row_splits": (4, 2, 1), "adjust_lr_fn": "match_rms_adamw"}


# Under FSDP2 and DDP: a linear model


def optimizer_of(model: nn.Module, split: dict[str, Any]) -> MuGrokfast:
    hidden = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    rest = [(name, p) for name, p in model.named_parameters() if p.ndim == 1]
    groups = [{"params": hidden, "algorithm": "muon", **split}]
    return MuGrokfast([*groups, {"params": rest, "algorithm": "adamw"}], **OPTIONS, muon_lr=0.2)


def result(optimizer: Any) -> list[dict[str, Tensor]]:
    """Weights and states, gathered from all processes."""
    return [
        {"param": whole(param), **{k: whole(v) for k, v in optimizer.state[param].items()}}
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def alone(rows: int, split: dict[str, Any]) -> Any:
    model = linear(rows)
    optimizer = optimizer_of(model, split)
    train(model, optimizer, rows, slice(None))
    return result(optimizer)


def ddp(mesh: DeviceMesh, rank: int, split: dict[str, Any]) -> Any:
    model = DistributedDataParallel(linear(7))
    optimizer = optimizer_of(model, split)
    train(model, optimizer, 7, half(rank))
    return result(optimizer)


def fsdp(mesh: DeviceMesh, rank: int, rows: int, split: dict[str, Any], dim: int = 0) -> Any:
    model = linear(rows)
    columns = {"shard_placement_fn": lambda p: Shard(1 if p.ndim == 2 else 0)} if dim else {}
    fully_shard(model, mesh=mesh, **columns)
    optimizer = optimizer_of(model, split)
    train(model, optimizer, rows, half(rank))
    return result(optimizer)


def resumed(mesh: DeviceMesh, rank: int) -> Any:
    """A run that is saved and loaded in the middle, and one that is not."""
    models = [linear(7), linear(7)]
    for model in models:
        fully_shard(model, mesh=mesh)
    first, second = (optimizer_of(model, SPLIT) for model in models)
    train(models[0], first, 7, half(rank))
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(first.state_dict())
    train(models[0], first, 7, half(rank))
    train(models[1], second, 7, half(rank))
    return [result(first), result(second)]


# Given gradients: parameters of every shape, sharded in every way.

SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "uneven": ((7, 5), {}),
    "empty": ((1, 5), {}),
    "fused": ((7, 5), SPLIT),
    "experts": ((3, 6, 4), {"batch_dims": 1, "row_splits": (4, 2)}),
    "conv": ((5, 2, 3, 1), {}),
    "even": ((8, 4), {"adjust_lr_fn": "spectral"}),
    "twin of even": ((8, 4), {}),
    "half": ((6, 4), {"ns_dtype": torch.float32}),
    "double": ((5, 6), {}),
}
DTYPES = {"half": torch.bfloat16, "double": torch.float64}


def groups_of(place: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
    """A group for each shape; those alike stand together, as they are gathered together."""
    groups = []
    for seed, (name, (shape, split)) in enumerate(SHAPES.items()):
        dtype = DTYPES.get(name, torch.float32)
        params = [whole_numbers(*shape, seed=seed + 50 * i).to(dtype) / 8 for i in range(2)]
        groups.append({"params": [Parameter(place(param)) for param in params], **split})
    return groups


def given(place: Callable[[Tensor], Tensor], backend: str | None = None, idle: int = -1) -> Any:
    """Steps along the same whole gradients; parameter ``idle`` of each group gets none."""
    optimizer = Muon(groups_of(place), backend=backend, clip_norm=40.0, **OPTIONS)
    for t in range(STEPS):
        for number, group in enumerate(optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                seed = 1000 + 100 * t + 10 * number + index
                grad = place(whole_numbers(*param.shape, seed=seed).to(param.dtype))
                param.grad = grad if index != idle else None
        optimizer.step()
    return result(optimizer)


def distributed(mesh: DeviceMesh, *placements: Placement, **options: Any) -> Any:
    return given(lambda tensor: distribute(tensor, mesh, placements), **options)


def partial_grads(mesh: DeviceMesh, rank: int) -> Any:
    """Copies on each process, whose gradients are still to be summed."""
    param = Parameter(distribute(whole_numbers(7, 5, seed=0), mesh, [Replicate()]))
    optimizer = Muon([param], lr=0.1, row_splits=(4, 3))
    for t in range(STEPS):
        part = whole_numbers(7, 5, seed=10 + t) if rank else whole_numbers(7, 5, seed=20 + t)
        param.grad = DTensor.from_local(part, mesh, [Partial("sum")])
        optimizer.step()
    return param.to_local().detach().clone()


def summed_alone() -> Tensor:
    param = Parameter(whole_numbers(7, 5, seed=0))
    optimizer = Muon([param], lr=0.1, row_splits=(4, 3))
    for t in range(STEPS):
        param.grad = whole_numbers(7, 5, seed=10 + t) + whole_numbers(7, 5, seed=20 + t)
        optimizer.step()
    return param.detach()


def overflow(mesh: DeviceMesh, rank: int) -> Any:
    """Whether a step that is skipped leaves every local bit as it was."""
    optimizer = Muon(groups_of(lambda tensor: distribute(tensor, mesh, [Shard(0)])), **OPTIONS)
    before = result(optimizer)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = distribute(torch.full(param.shape, torch.inf).to(param), mesh, [Shard(0)])
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.full((), 2.0)
    optimizer.step()
    return [before, result(optimizer)]


def state_types(mesh: DeviceMesh, rank: int) -> Any:
    """Whether each state lies like its parameter, before the first step and after it."""
    optimizer = Muon(groups_of(lambda tensor: distribute(tensor, mesh, [Shard(0)])), **OPTIONS)
    found = []
    for _ in range(2):
        for param, state in optimizer.state.items():
            for name in ("momentum_buffer", "grok_exp_avg", "weight_ema"):
                value = state[name]
                local = (value.to_local().shape, param.to_local().shape)
                found.append(isinstance(value, DTensor) and value.placements == param.placements)
                found.append(value.shape == param.shape and local[0] == local[1])
            param.grad = distribute(torch.ones(param.shape).to(param.dtype), mesh, [Shard(0)])
        optimizer.step()
    return found


def shard_sizes(mesh: DeviceMesh, rank: int) -> Any:
    groups = groups_of(lambda tensor: distribute(tensor, mesh, [Shard(0)]))
    sizes = [group["params"][0].to_local().shape[0] for group in groups]
    return dict(zip(SHAPES, sizes, strict=True))


CASES: dict[str, Callable[[DeviceMesh, int], Any]] = {
    "ddp": lambda mesh, rank: ddp(mesh, rank, {}),
    "ddp, split": lambda mesh, rank: ddp(mesh, rank, SPLIT),
    "fsdp": lambda mesh, rank: fsdp(mesh, rank, 7, {}),
    "fsdp, split": lambda mesh, rank: fsdp(mesh, rank, 7, SPLIT),
    "fsdp, empty": lambda mesh, rank: fsdp(mesh, rank, 1, {}),
    "fsdp, columns": lambda mesh, rank: fsdp(mesh, rank, 7, SPLIT, dim=1),
    "rows": lambda mesh, rank: distributed(mesh, Shard(0)),
    "rows, reference": lambda mesh, rank: distributed(mesh, Shard(0), backend="reference"),
    "columns": lambda mesh, rank: distributed(mesh, Shard(1)),
    "copies": lambda mesh, rank: distributed(mesh, Replicate()),
    "missing": lambda mesh, rank: distributed(mesh, Shard(0), idle=1),
    "resumed": resumed,
    "partial": partial_grads,
    "overflow": overflow,
    "types": state_types,
    "sizes": shard_sizes,
}


def all_cases(rank: int) -> dict[str, Any]:
    return run_cases(CASES, init_device_mesh("cpu", (2,)), rank)


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """What the two processes returned, for each case."""
    return run_ranks(all_cases)


def assert_equal(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(actual) == len(expected)
    for index, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert mine.keys() == theirs.keys()
        different = [name for name in theirs if not torch.equal(mine[name], theirs[name])]
        assert not different, f"parameter {index}"


@pytest.mark.parametrize(
    ("case", "rows", "split"),
    [
        ("ddp", 7, {}),
        ("ddp, split", 7, SPLIT),
        ("fsdp", 7, {}),
        ("fsdp, split", 7, SPLIT),
        ("fsdp, empty", 1, {}),
        ("fsdp, columns", 7, SPLIT),
    ],
)
def test_two_processes_equal_one_on_the_whole_batch(
    results: list[Any], case: str, rows: int, split: dict[str, Any]
) -> None:
    for found in returned(results, case):
        assert_equal(found, alone(rows, split))


@pytest.mark.parametrize("case", ["rows", "columns", "copies"])
def test_sharded_parameters_equal_plain_ones(results: list[Any], case: str) -> None:
    expected = given(torch.clone)
    for found in returned(results, case):
        assert_equal(found, expected)


def test_sharded_parameters_equal_plain_ones_on_the_reference(results: list[Any]) -> None:
    expected = given(torch.clone, backend="reference")
    for found in returned(results, "rows, reference"):
        assert_equal(found, expected)


def test_missing_gradients_are_skipped(results: list[Any]) -> None:
    expected = given(torch.clone, idle=1)
    assert all(row["step"].item() == (index + 1) % 2 * STEPS for index, row in enumerate(expected))
    for found in returned(results, "missing"):
        assert_equal(found, expected)


def test_resumed_run_equals_uninterrupted(results: list[Any]) -> None:
    for first, second in returned(results, "resumed"):
        assert_equal(second, first)


def test_unsummed_gradients_are_summed(results: list[Any]) -> None:
    for found in returned(results, "partial"):
        assert torch.equal(found, summed_alone())


def test_skipped_step_changes_nothing(results: list[Any]) -> None:
    for before, after in returned(results, "overflow"):
        assert_equal(after, before)


def test_states_are_sharded_like_their_parameters(results: list[Any]) -> None:
    for found in returned(results, "types"):
        assert len(found) == 2 * 2 * 3 * 2 * len(SHAPES) and all(found)


def test_shards_of_the_cases_are_uneven_or_empty(results: list[Any]) -> None:
    first, second = returned(results, "sizes")
    assert (first["uneven"], second["uneven"]) == (4, 3)
    assert (first["empty"], second["empty"]) == (1, 0)
    assert (first["experts"], second["experts"]) == (2, 1)
    assert (first["even"], second["even"]) == (4, 4)
