"""The optimizers in two processes: DDP, DTensor and FSDP2 give the weights of one process.

The gradients are means of products of small whole numbers, so that no sum depends on its order and
the runs must agree bit for bit. Filters and clipping that look at whole tensors add up products of
what is no whole number any more; they agree to the roundings of float32.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Linear, Parameter
from torch.nn.parallel import DistributedDataParallel

from trm_fast import AdamATan2, GradFilter, GrokFastAdamW, GrokFastSGD, WeightEMA

from ..support.processes import needs_gloo, returned, run_cases, run_ranks
from .distributed_checks import STEPS, half, linear, train, whole, whole_numbers

pytestmark = needs_gloo

OPTIONS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "weight_ema": 0.9}
AVERAGES = ("exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema")

CLIP = {"clip_norm": 0.5}
WINDOW = {"filter": "ma", "window": 2}
# Each element for itself: bit for bit.
ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda params: GrokFastAdamW(params, **OPTIONS),
    "atan2_ma": lambda params: AdamATan2(params, **OPTIONS, **WINDOW),
    "sgd_highpass": lambda params: GrokFastSGD(params, **OPTIONS, momentum=0.9, filter="highpass"),
    "around_sgd_ma": lambda params: GradFilter(torch.optim.SGD(params, lr=0.1), **WINDOW),
}
WHOLE: dict[str, Callable[[Any], Any]] = {
    "adamw_projection": lambda params: GrokFastAdamW(params, **OPTIONS, filter="projection"),
    "sgd_gate": lambda params: GrokFastSGD(params, **OPTIONS, filter="cosine_gate"),
    "atan2_clipped": lambda params: AdamATan2(params, **OPTIONS, **CLIP),
    "sgd_both": lambda params: GrokFastSGD(params, **OPTIONS, **CLIP, filter="projection"),
    "sgd_groups": lambda params: GrokFastSGD(
        [{"params": [param], "filter": f} for param, f in zip(params, ("ma", None), strict=True)],
        **OPTIONS,
        **CLIP,
        window=2,
    ),
    "around_sgd_clipped": lambda params: GradFilter(
        torch.optim.SGD(params, lr=0.1), filter="projection", **CLIP
    ),
}
MAKE = ELEMENTWISE | WHOLE


def result(model: torch.nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Weights, states and statistics, gathered from all processes."""
    tensors = {}
    if optimizer.clip_norm is not None:
        tensors["grad_norm"] = optimizer.grad_norm
    for index, found in enumerate(optimizer.statistics()):
        tensors |= {f"statistics {index}": torch.stack(found[1:])}
    for name, param in model.named_parameters():
        name = name.removeprefix("module.")
        states = optimizer.state[param].items()
        tensors |= {name: whole(param)} | {f"{name}.{key}": whole(value) for key, value in states}
    return tensors


def alone(rows: int = 5, make: str = "adamw") -> dict[str, Tensor]:
    model = linear(rows)
    optimizer = MAKE[make](model.parameters())
    train(model, optimizer, rows, slice(None))
    return result(model, optimizer)


# What each of the two processes runs. A case returns tensors to compare, or a plain value.


def ddp(mesh: DeviceMesh, rank: int, view: bool, make: str = "adamw") -> Any:
    model = DistributedDataParallel(linear(5), gradient_as_bucket_view=view)
    optimizer = MAKE[make](model.parameters())
    train(model, optimizer, 5, half(rank))
    return result(model, optimizer)


def fsdp(mesh: DeviceMesh, rank: int, rows: int, make: str = "adamw") -> Any:
    model = linear(rows)
    fully_shard(model, mesh=mesh)
    optimizer = MAKE[make](model.parameters())
    train(model, optimizer, rows, half(rank))
    return result(model, optimizer)


def clipped_parts(mesh: DeviceMesh, rank: int) -> str:
    """Each process has a part of the parameters, thus of the norm; returns the error."""
    with pytest.raises(ValueError) as raised:
        ZeroRedundancyOptimizer(linear(5).parameters(), GrokFastSGD, lr=0.1, clip_norm=0.1)
    return str(raised.value)


def averaged(model: torch.nn.Module, part: slice) -> Any:
    """Weights that are averaged beside the optimizer: the average, and the weights afterwards."""
    optimizer, ema = torch.optim.SGD(model.parameters(), lr=0.5), WeightEMA(model, 0.5)
    for _ in range(2):
        train(model, optimizer, 5, part)
        ema.update()
    with ema.swapped():
        swapped = {f"average.{name}": whole(p) for name, p in model.named_parameters()}
    return swapped | {name: whole(param) for name, param in model.named_parameters()}


def averaged_shards(mesh: DeviceMesh, rank: int) -> Any:
    model = linear(5)
    fully_shard(model, mesh=mesh)
    return averaged(model, half(rank))


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


Transfer = Callable[[Linear, Any, Linear, Any], None]


def resumed(mesh: DeviceMesh, rank: int, make: str, transfer: Transfer, rows: int) -> Any:
    """An FSDP2 run that is saved and loaded before its last steps."""
    models = [linear(rows), linear(rows)]
    for model in models:
        fully_shard(model, mesh=mesh)
    first, second = (MAKE[make](model.parameters()) for model in models)
    train(models[0], first, rows, half(rank))
    models[1].load_state_dict(models[0].state_dict())
    transfer(models[0], first, models[1], second)
    train(models[0], first, rows, half(rank))
    train(models[1], second, rows, half(rank))
    return {"first": result(models[0], first), "second": result(models[1], second)}


def directly(_: Linear, source: Any, __: Linear, target: Any) -> None:
    target.load_state_dict(source.state_dict())


def through_files(folder: Path, model: Linear, source: Any, other: Linear, target: Any) -> None:
    """Of torch.distributed.checkpoint, a shard from each process."""
    folder = folder / f"{type(source).__name__}_{len(model.bias)}"
    dcp.save({"optimizer": get_optimizer_state_dict(model, source)}, checkpoint_id=folder)
    state_dict = {"optimizer": get_optimizer_state_dict(other, target)}
    dcp.load(state_dict, checkpoint_id=folder)
    set_optimizer_state_dict(other, target, state_dict["optimizer"])


def through_whole_tensors(model: Linear, source: Any, other: Linear, target: Any) -> None:
    """As one process would have saved them."""
    options = StateDictOptions(full_state_dict=True)
    state_dict = get_optimizer_state_dict(model, source, options=options)
    set_optimizer_state_dict(other, target, state_dict, options=options)


RESUMED = [
    (make, transfer, rows)
    for make, rows in (("adamw", 5), ("atan2_ma", 5), ("atan2_ma", 1), ("adamw_projection", 5))
    for transfer in ("directly", "files", "whole")
]


def resumed_cases(folder: Path) -> dict[str, Callable[[DeviceMesh, int], Any]]:
    transfers: dict[str, Transfer] = {
        "directly": directly,
        "files": partial(through_files, folder),
        "whole": through_whole_tensors,
    }
    return {
        f"resumed_{make}_{transfer}_{rows}": partial(
            resumed, make=make, transfer=transfers[transfer], rows=rows
        )
        for make, transfer, rows in RESUMED
    }


def strided(mesh: DeviceMesh, rank: int, make: str) -> Any:
    """A parameter whose rows take turns between processes, as FSDP2 leaves it with tensor
    parallelism."""
    whole, place = whole_numbers(4, 6, seed=0) / 8, [_StridedShard(0, split_factor=2)]

    def shard(tensor: Tensor) -> DTensor:
        mine = tensor[rank::2].clone()
        return DTensor.from_local(mine, mesh, place, shape=tensor.shape, stride=tensor.stride())

    param, plain = Parameter(shard(whole)), Parameter(whole.clone())
    optimizer, expected = (
        GrokFastSGD([each], lr=0.1, clip_norm=0.5, filter=make, window=2) for each in (param, plain)
    )
    for t in range(STEPS):
        grad = whole_numbers(4, 6, seed=10 + t) / 8
        param.grad, plain.grad = shard(grad), grad
        optimizer.step()
        expected.step()
    found, truth = {"param": param.to_local()}, {"param": plain[rank::2]}
    if make == "ma":
        found["ring"] = optimizer.state[param]["grok_ring"].to_local()
        truth["ring"] = expected.state[plain]["grok_ring"][:, rank::2]
        assert optimizer.state[param]["grok_ring"].placements[0].dim == 1
    return {"found": found, "truth": truth}


CASES: dict[str, Callable[[DeviceMesh, int], Any]] = {
    "clipped_parts": clipped_parts,
    "ddp_view": lambda mesh, rank: ddp(mesh, rank, True),
    "ddp_copy": lambda mesh, rank: ddp(mesh, rank, False),
    "fsdp_5_rows": lambda mesh, rank: fsdp(mesh, rank, 5),
    "fsdp_1_row": lambda mesh, rank: fsdp(mesh, rank, 1),
    "dtensor_5_rows": lambda mesh, rank: given_grads(mesh, rank, 5),
    "dtensor_1_row": lambda mesh, rank: given_grads(mesh, rank, 1),
    "partial_grads": partial_grads,
    "averaged": averaged_shards,
    "sizes_5_rows": lambda mesh, rank: shard_sizes(mesh, rank, 5),
    "sizes_1_row": lambda mesh, rank: shard_sizes(mesh, rank, 1),
    "types_5_rows": lambda mesh, rank: state_types(mesh, rank, 5),
    "types_1_row": lambda mesh, rank: state_types(mesh, rank, 1),
}
for make in MAKE:
    CASES[f"ddp_{make}"] = lambda mesh, rank, make=make: ddp(mesh, rank, True, make)
    for rows in (5, 1):
        CASES[f"fsdp_{rows}_{make}"] = lambda mesh, rank, rows=rows, make=make: fsdp(
            mesh, rank, rows, make
        )
for make in ("projection", "ma"):
    CASES[f"strided_{make}"] = lambda mesh, rank, make=make: strided(mesh, rank, make)


def all_cases(rank: int, folder: Path) -> dict[str, Any]:
    return run_cases(CASES | resumed_cases(folder), init_device_mesh("cpu", (2,)), rank)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes returned, for each case."""
    return run_ranks(all_cases, tmp_path_factory.mktemp("checkpoints"))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, but for statistics, which are sums in any case."""
    assert actual.keys() == expected.keys()
    exact = [name for name in expected if not name.startswith("statistics")]
    assert not [name for name in exact if not torch.equal(actual[name], expected[name])]


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


@pytest.mark.parametrize(("make", "transfer", "rows"), RESUMED)
def test_resumed_fsdp2_run_equals_uninterrupted(
    results: list[Any], make: str, transfer: str, rows: int
) -> None:
    """Rings in the middle of their window too, and the empty shards of a single row."""
    for found in returned(results, f"resumed_{make}_{transfer}_{rows}"):
        assert_equal(found["second"], found["first"])


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Sums over parts and over the whole differ by roundings of 2**-24 of their largest value, and
    three steps hand them on with gains below 50."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).abs().max() if value.numel() else 0
        assert error <= 3 * 50 * 2**-24 * (1 + value.abs().max()), f"{name}: {error}"


@pytest.mark.parametrize("case", ["ddp", "fsdp_5", "fsdp_1"])
@pytest.mark.parametrize("make", MAKE)
def test_every_filter_equals_one_process_on_the_whole_batch(
    results: list[Any], make: str, case: str
) -> None:
    """Uneven and empty shards included: what looks at whole tensors looks at all shards."""
    expected = alone(1 if case == "fsdp_1" else 5, make)
    for found in returned(results, f"{case}_{make}"):
        assert_near(found, expected)
        if make in ELEMENTWISE:
            assert_equal(found, expected)


def test_norm_of_a_part_of_the_parameters_is_refused(results: list[Any]) -> None:
    for found in returned(results, "clipped_parts"):
        assert "GrokFastSGD: clip_norm must be an argument" in found
        assert "Under ZeroRedundancyOptimizer" in found


def test_weight_average_of_shards_equals_that_of_one_process(results: list[Any]) -> None:
    for found in returned(results, "averaged"):
        assert_equal(found, averaged(linear(5), slice(None)))


@pytest.mark.parametrize("make", ["projection", "ma"])
def test_strided_shards_are_shards(results: list[Any], make: str) -> None:
    """``Placement.is_shard`` leaves them out."""
    for found in returned(results, f"strided_{make}"):
        assert_near(found["found"], found["truth"])


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
