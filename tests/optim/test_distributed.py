"""GrokFastAdamW in two processes: DDP, DTensor and FSDP2 give the weights of one process.

The gradients are means of products of small whole numbers, so that no sum depends on its order and
the runs must agree bit for bit.
"""

import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.nn import Linear, Parameter
from torch.nn.parallel import DistributedDataParallel

from trm_fast import GrokFastAdamW

pytestmark = pytest.mark.skipif(
    not dist.is_gloo_available(), reason="this torch is built without gloo"
)

OPTIONS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "weight_ema": 0.9}
AVERAGES = ("exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema")
STEPS = 3


def whole_numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).float()


def linear(rows: int) -> Linear:
    model = Linear(6, rows)
    with torch.no_grad():
        model.weight.copy_(whole_numbers(rows, 6, seed=0) / 8)
        model.bias.copy_(whole_numbers(rows, seed=1) / 8)
    return model


def train(model: torch.nn.Module, optimizer: GrokFastAdamW, rows: int, part: slice) -> None:
    """Steps on its part of each batch of 8; the gradient of the weight is the mean of y x^T."""
    for t in range(STEPS):
        x, y = whole_numbers(8, 6, seed=10 + t)[part], whole_numbers(8, rows, seed=20 + t)[part]
        optimizer.zero_grad()
        (model(x) * y).sum(1).mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def result(model: torch.nn.Module, optimizer: GrokFastAdamW) -> dict[str, Tensor]:
    """Weights and states, gathered from all processes."""
    tensors = {}
    for name, param in model.named_parameters():
        name = name.removeprefix("module.")
        states = optimizer.state[param].items()
        tensors |= {name: whole(param)} | {f"{name}.{key}": whole(value) for key, value in states}
    return tensors


def alone(rows: int = 5) -> dict[str, Tensor]:
    model = linear(rows)
    optimizer = GrokFastAdamW(model.parameters(), **OPTIONS)
    train(model, optimizer, rows, slice(None))
    return result(model, optimizer)


# What each of the two processes runs. A case returns tensors to compare, or a plain value.


def half(rank: int) -> slice:
    return slice(4 * rank, 4 * rank + 4)


def ddp(mesh: DeviceMesh, rank: int, view: bool) -> Any:
    model = DistributedDataParallel(linear(5), gradient_as_bucket_view=view)
    optimizer = GrokFastAdamW(model.parameters(), **OPTIONS)
    train(model, optimizer, 5, half(rank))
    return result(model, optimizer)


def fsdp(mesh: DeviceMesh, rank: int, rows: int) -> Any:
    model = linear(rows)
    fully_shard(model, mesh=mesh)
    optimizer = GrokFastAdamW(model.parameters(), **OPTIONS)
    train(model, optimizer, rows, half(rank))
    return result(model, optimizer)


def distributed(mesh: DeviceMesh, rows: int, placement: Placement) -> Linear:
    model = linear(rows)
    for name, param in list(model.named_parameters()):
        setattr(model, name, Parameter(distribute_tensor(param.detach(), mesh, [placement])))
    return model


def given_grads(mesh: DeviceMesh, rank: int, rows: int) -> Any:
    """Sharded parameters that get the sharded gradients of the run in one process."""
    model, plain = distributed(mesh, rows, Shard(0)), linear(rows)
    optimizer = GrokFastAdamW(model.parameters(), **OPTIONS)
    for t in range(STEPS):
        x, y = whole_numbers(8, 6, seed=10 + t), whole_numbers(8, rows, seed=20 + t)
        plain.zero_grad()
        (plain(x) * y).sum(1).mean().backward()
        for param, twin in zip(model.parameters(), plain.parameters(), strict=True):
            param.grad = distribute_tensor(twin.grad, mesh, [Shard(0)])
        optimizer.step()
    return result(model, optimizer)


def partial_grads(mesh: DeviceMesh, rank: int) -> Any:
    """Copies of the parameters on each process, whose gradients are still to be summed."""
    model, half_model = distributed(mesh, 5, Replicate()), linear(5)
    optimizer = GrokFastAdamW(model.parameters(), **OPTIONS)
    for t in range(STEPS):
        x, y = whole_numbers(8, 6, seed=10 + t), whole_numbers(8, 5, seed=20 + t)
        half_model.zero_grad()
        ((half_model(x[half(rank)]) * y[half(rank)]).sum(1).sum() / 8).backward()
        for param, twin in zip(model.parameters(), half_model.parameters(), strict=True):
            param.grad = DTensor.from_local(twin.grad.clone(), mesh, [Partial("sum")])
        optimizer.step()
    return {name: param.to_local().detach() for name, param in model.named_parameters()}


def shard_sizes(mesh: DeviceMesh, rank: int, rows: int) -> Any:
    return [param.to_local().numel() for param in distributed(mesh, rows, Shard(0)).parameters()]


def state_types(mesh: DeviceMesh, rank: int, rows: int) -> Any:
    """Whether each state lies like its parameter before the first step."""
    model = distributed(mesh, rows, Shard(0))
    optimizer = GrokFastAdamW(model.parameters(), **OPTIONS)
    return [
        isinstance(state[name], DTensor)
        and state[name].placements == param.placements
        and state[name].shape == param.shape
        and state[name].to_local().shape == param.to_local().shape
        for param, state in optimizer.state.items()
        for name in AVERAGES
    ]


def resumed(mesh: DeviceMesh, rank: int) -> Any:
    """An FSDP2 run that is saved and loaded before its last steps."""
    models = [linear(5), linear(5)]
    for model in models:
        fully_shard(model, mesh=mesh)
    first, second = (GrokFastAdamW(model.parameters(), **OPTIONS) for model in models)
    train(models[0], first, 5, half(rank))
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(first.state_dict())
    train(models[0], first, 5, half(rank))
    train(models[1], second, 5, half(rank))
    return {"first": result(models[0], first), "second": result(models[1], second)}


CASES: dict[str, Callable[[DeviceMesh, int], Any]] = {
    "ddp_view": lambda mesh, rank: ddp(mesh, rank, True),
    "ddp_copy": lambda mesh, rank: ddp(mesh, rank, False),
    "fsdp_5_rows": lambda mesh, rank: fsdp(mesh, rank, 5),
    "fsdp_1_row": lambda mesh, rank: fsdp(mesh, rank, 1),
    "fsdp_resumed": resumed,
    "dtensor_5_rows": lambda mesh, rank: given_grads(mesh, rank, 5),
    "dtensor_1_row": lambda mesh, rank: given_grads(mesh, rank, 1),
    "partial_grads": partial_grads,
    "sizes_5_rows": lambda mesh, rank: shard_sizes(mesh, rank, 5),
    "sizes_1_row": lambda mesh, rank: shard_sizes(mesh, rank, 1),
    "types_5_rows": lambda mesh, rank: state_types(mesh, rank, 5),
    "types_1_row": lambda mesh, rank: state_types(mesh, rank, 1),
}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store, timeout, world_size=2, rank=rank)
    mesh = init_device_mesh("cpu", (2,))
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            results[name] = case(mesh, rank)
        except Exception:
            results[name] = traceback.format_exc()
        torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes returned, for each case."""
    folder = tmp_path_factory.mktemp("two_processes")
    # Not torch.multiprocessing: a spawned process could not import this module by the name that
    # pytest's importlib mode gives it.
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    saved = [folder / f"{rank}.pt" for rank in range(2)]
    assert all(path.exists() for path in saved), "\n".join(outputs)
    return [torch.load(path) for path in saved]


def returned(results: list[dict[str, Any]], case: str) -> list[Any]:
    """What both processes returned; a failure shows the traceback of the process."""
    values = [result.get(case, "the process ended before this case") for result in results]
    for value in values:
        assert not isinstance(value, str), value
    return values


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


@pytest.mark.parametrize("case", ["ddp_view", "ddp_copy"])
def test_ddp_equals_one_process_on_the_whole_batch(results: list[Any], case: str) -> None:
    for found in returned(results, case):
        assert_equal(found, alone())


@pytest.mark.parametrize(("case", "rows"), [("fsdp_5_rows", 5), ("fsdp_1_row", 1)])
def test_fsdp2_equals_one_process_on_the_whole_batch(
    results: list[Any], case: str, rows: int
) -> None:
    for found in returned(results, case):
        assert_equal(found, alone(rows))


def test_resumed_fsdp2_run_equals_uninterrupted(results: list[Any]) -> None:
    for found in returned(results, "fsdp_resumed"):
        assert_equal(found["second"], found["first"])


@pytest.mark.parametrize(("case", "rows"), [("dtensor_5_rows", 5), ("dtensor_1_row", 1)])
def test_step_of_sharded_parameters_equals_the_plain_step(
    results: list[Any], case: str, rows: int
) -> None:
    for found in returned(results, case):
        assert_equal(found, alone(rows))


def test_unsummed_gradients_are_summed_as_in_torch(results: list[Any]) -> None:
    """torch.optim does so; otherwise the copies of a parameter drift apart without a word."""
    expected = alone()
    for found in returned(results, "partial_grads"):
        assert_equal(found, {name: expected[name] for name in found})


@pytest.mark.parametrize(
    ("case", "sizes"), [("sizes_5_rows", [[18, 3], [12, 2]]), ("sizes_1_row", [[6, 1], [0, 0]])]
)
def test_shards_of_the_cases_are_uneven_or_empty(
    results: list[Any], case: str, sizes: list[list[int]]
) -> None:
    assert returned(results, case) == sizes


@pytest.mark.parametrize("case", ["types_5_rows", "types_1_row"])
def test_states_are_sharded_like_their_parameters_at_construction(
    results: list[Any], case: str
) -> None:
    assert returned(results, case) == [[True] * 2 * len(AVERAGES)] * 2


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
