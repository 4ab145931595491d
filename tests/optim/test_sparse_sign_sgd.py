"""SparseSignSGD against its formula, written again in float64.

Gradients are small whole numbers where only their sign matters, so that sums have no rounding.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Embedding, Parameter
from torch.nn.parallel import DistributedDataParallel

from trm_fast.optim.sparse_sign_sgd import SparseSignSGD, _signs_of_sums, _step_whole

from ..support.processes import needs_gloo, run_ranks

needs_gpu = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
IDS = torch.tensor([3, 0, 3, 5, 3, 0])
ROWS, WIDTH = 7, 5


def make_table(dtype: torch.dtype = torch.float32, device: str = "cpu", width: int = WIDTH) -> Any:
    generator = torch.Generator().manual_seed(0)
    return Parameter(torch.randn(ROWS, width, generator=generator).to(device, dtype))


def row_grads(ids: Tensor = IDS, width: int = WIDTH, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (len(ids), width), generator=generator).float()


def sparse(ids: Tensor, values: Tensor, rows: int = ROWS) -> Tensor:
    size = (rows, *values.shape[1:])
    return torch.sparse_coo_tensor(ids[None], values, size, check_invariants=True)


def expected(
    table: Tensor, ids: Tensor, values: Tensor, lr: float, decay: float, ascend: bool = False
) -> Tensor:
    result = table.detach().double().cpu().clone()
    for row in ids.unique():
        sign = values[ids == row].double().sum(0).sign()
        result[row] = result[row] * (1 - lr * decay) - lr * (-sign if ascend else sign)
    return result


def assert_near(actual: Tensor, truth: Tensor, lr: float) -> None:
    """The factor, the product, the step and the difference are each rounded once in the dtype of
    the mathematics, at most at the size of the largest weight plus a step; then comes the table's
    own dtype."""
    math_dtype = torch.float64 if actual.dtype == torch.float64 else torch.float32
    scale = truth.abs().max().item() + lr
    bound = (4 * torch.finfo(math_dtype).eps + torch.finfo(actual.dtype).eps) * scale
    assert (actual.detach().double().cpu() - truth).abs().max().item() <= bound


GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sparse": sparse,
    "coalesced": lambda ids, values: sparse(ids, values).coalesce(),
    "dense": lambda ids, values: sparse(ids, values).to_dense(),
}


# The formula


@pytest.mark.parametrize("kind", GRADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ascend", [False, True], ids=["descend", "ascend"])
def test_step_is_the_formula(kind: str, dtype: torch.dtype, ascend: bool) -> None:
    table, values = make_table(dtype), row_grads()
    values[:, 0] = 1.0  # no looked-up row has a gradient of exactly zero
    truth = expected(table, IDS, values, 0.25, 0.5, ascend)
    table.grad = GRADS[kind](IDS, values).to(dtype)
    SparseSignSGD([table], lr=0.25, weight_decay=0.5, maximize=ascend).step()
    assert_near(table, truth, 0.25)


@needs_gpu
@pytest.mark.parametrize("kind", GRADS)
def test_step_on_a_gpu_is_that_on_the_cpu(kind: str) -> None:
    tables = [make_table(torch.float64, device) for device in ("cpu", "cuda")]
    for table in tables:
        table.grad = GRADS[kind](IDS, row_grads().double()).to(table.device)
        SparseSignSGD([table], lr=0.25, weight_decay=0.5).step()
    assert torch.equal(tables[0], tables[1].cpu())


@pytest.mark.parametrize("kind", GRADS)
def test_rows_that_were_not_looked_up_keep_every_bit(kind: str) -> None:
    table, values = make_table(), row_grads()
    table.grad = GRADS[kind](IDS, values)
    before = table.detach().clone()
    SparseSignSGD([table], lr=0.25, weight_decay=0.5).step()
    others = [row for row in range(ROWS) if row not in IDS]
    assert torch.equal(table[others].view(torch.int32), before[others].view(torch.int32))
    assert not torch.equal(table[IDS], before[IDS])


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_embeddings_learn_through_autograd(kind: str) -> None:
    layer = Embedding(ROWS, WIDTH, sparse=kind == "sparse")
    values = row_grads() + 0.5
    truth = expected(layer.weight, IDS, values, 0.1, 1.0)
    (layer(IDS) * values).sum().backward()
    assert layer.weight.grad.is_sparse == (kind == "sparse")
    SparseSignSGD(layer.parameters(), lr=0.1, weight_decay=1.0).step()
    assert_near(layer.weight, truth, 0.1)


def test_accumulated_sparse_gradients_are_summed_before_the_sign() -> None:
    layer, twin = Embedding(ROWS, WIDTH, sparse=True), Embedding(ROWS, WIDTH)
    twin.load_state_dict(layer.state_dict())
    for model in (layer, twin):
        for seed in range(3):
            ids = torch.tensor([seed, 3, 3])
            (model(ids) * row_grads(ids, seed=seed)).sum().backward()
        SparseSignSGD(model.parameters(), lr=0.1, weight_decay=0.0).step()
    assert torch.equal(layer.weight, twin.weight)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_rows_may_have_several_dimensions(kind: str) -> None:
    table = Parameter(make_table(width=6).detach().view(ROWS, 2, 3).clone())
    values = row_grads(width=6) + 0.5
    truth = expected(table, IDS, values.view(-1, 2, 3), 0.25, 0.5)
    grad = sparse(IDS, values.view(-1, 2, 3))
    table.grad = grad if kind == "sparse" else grad.to_dense()
    SparseSignSGD([table], lr=0.25, weight_decay=0.5).step()
    assert_near(table, truth, 0.25)


def test_non_contiguous_table_is_stepped_in_place() -> None:
    storage = torch.randn(WIDTH, ROWS)
    table, values = Parameter(storage.t()), row_grads()
    truth = expected(table, IDS, values, 0.25, 0.5)
    table.grad = sparse(IDS, values)
    SparseSignSGD([table], lr=0.25, weight_decay=0.5).step()
    assert table.data_ptr() == storage.data_ptr()
    assert_near(table, truth, 0.25)


@pytest.mark.parametrize(("kind", "decays"), [("sparse", True), ("dense", False)])
def test_row_with_zero_gradient_decays_only_where_the_gradient_lists_it(
    kind: str, decays: bool
) -> None:
    table, ids = make_table(torch.float64), torch.tensor([2, 4, 2])
    values = torch.tensor([1.0, 0.0, -1.0])[:, None].expand(-1, WIDTH).double()
    before = table.detach().clone()
    table.grad = GRADS[kind](ids, values)
    SparseSignSGD([table], lr=0.5, weight_decay=0.5).step()
    assert torch.equal(table.detach()[[2, 4]], before[[2, 4]] * (0.75 if decays else 1.0))


@pytest.mark.parametrize("device", DEVICES)
def test_16_bit_gradients_are_summed_in_float32(device: str) -> None:
    """256 + 1 is 256 in bfloat16."""
    table = Parameter(torch.zeros(2, 1, dtype=torch.bfloat16, device=device))
    values = torch.tensor([[256.0], [1.0], [-256.0]], dtype=torch.bfloat16)
    table.grad = sparse(torch.zeros(3, dtype=torch.int64), values, rows=2).to(device)
    SparseSignSGD([table], lr=0.5, weight_decay=0.0).step()
    assert table.flatten().tolist() == [-0.5, 0.0]


@pytest.mark.parametrize("kind", GRADS)
def test_nan_has_the_sign_0(kind: str) -> None:
    table = Parameter(torch.ones(ROWS, WIDTH))
    values = torch.full((1, WIDTH), torch.nan)
    values[0, 1] = torch.inf
    table.grad = GRADS[kind](torch.tensor([2]), values)
    SparseSignSGD([table], lr=0.25, weight_decay=1.0).step()
    assert table[2].tolist() == [0.75, 0.5, 0.75, 0.75, 0.75]


@pytest.mark.parametrize("distinct", [False, True])
def test_sums_on_a_gpu_agree_with_coalesce(distinct: bool) -> None:
    """The way of CUDA tensors, which is the same operations on any device."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (300,), generator=generator)
    ids = torch.randperm(40, generator=generator) if distinct else ids
    values = row_grads(ids)
    sums = sparse(ids, values, rows=40).to_dense()
    assert torch.equal(_signs_of_sums(ids, values), sums.sign()[ids])


@pytest.mark.parametrize("found", [None, 0.0, 1.0], ids=["no_scaler", "finite", "overflow"])
def test_whole_table_step_agrees_with_the_step_of_its_rows(found: float | None) -> None:
    """The way of dense gradients of CUDA tensors."""
    tables, values = [make_table(), make_table()], row_grads() + 0.5
    optimizer = SparseSignSGD([tables[0]], lr=0.25, weight_decay=0.5)
    tables[0].grad = sparse(IDS, values).to_dense()
    if found is not None:
        optimizer.found_inf = torch.tensor(found)
    taken = None if found is None else torch.tensor(found == 0)
    optimizer.step()
    with torch.no_grad():
        _step_whole(tables[1], tables[0].grad, optimizer.param_groups[0], taken)
    assert torch.equal(*tables)


@needs_gpu
@pytest.mark.parametrize("kind", GRADS)
def test_step_does_not_wait_for_a_gpu(kind: str) -> None:
    table = make_table(device="cuda")
    table.grad = GRADS[kind](IDS, row_grads()).cuda()
    optimizer = SparseSignSGD([table], lr=torch.tensor(0.1, device="cuda"))
    optimizer.found_inf = torch.zeros((), device="cuda")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# What torch.optim promises


@pytest.mark.parametrize("kind", GRADS)
def test_gradients_are_only_read(kind: str) -> None:
    table, grad = make_table(), GRADS[kind](IDS, row_grads())
    table.grad = grad
    before = deepcopy(grad)
    SparseSignSGD([table], lr=0.1).step()
    assert table.grad is grad
    read, kept = (grad._values(), before._values()) if grad.is_sparse else (grad, before)
    assert torch.equal(read, kept)


@pytest.mark.parametrize("kind", GRADS)
def test_table_without_gradient_or_rows_is_left_alone(kind: str) -> None:
    first, second = make_table(), make_table()
    before = first.detach().clone()
    second.grad = GRADS[kind](IDS[:0], row_grads(IDS[:0]))
    SparseSignSGD([first, second], lr=0.1, weight_decay=1.0).step()
    assert torch.equal(first, before) and torch.equal(second, before)


@pytest.mark.parametrize("kind", GRADS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_options_may_be_tensors(kind: str, shape: tuple[int, ...]) -> None:
    tables = [make_table(torch.float64), make_table(torch.float64)]
    given = torch.full(shape, 0.25, dtype=torch.float64), torch.full(shape, 0.5)
    for table, (lr, decay) in zip(tables, [(0.25, 0.5), given], strict=True):
        table.grad = GRADS[kind](IDS, row_grads().double())
        SparseSignSGD([table], lr=lr, weight_decay=decay).step()
    assert torch.equal(*tables)


def test_learning_rate_0_changes_nothing() -> None:
    table = make_table()
    before = table.detach().clone()
    table.grad = sparse(IDS, row_grads())
    SparseSignSGD([table], lr=0.0, weight_decay=1.0).step()
    assert torch.equal(table, before)


def test_groups_schedulers_closures_and_hooks_work_as_in_torch() -> None:
    tables = [make_table(torch.float64) for _ in range(2)]
    optimizer = SparseSignSGD(
        [{"params": tables[:1], "weight_decay": 0.0}, {"params": tables[1:], "lr": 1.0}], lr=0.5
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    values = row_grads().double()
    truths = [table.detach() for table in tables]

    def closure() -> str:
        assert torch.is_grad_enabled()
        for table in tables:
            table.grad = sparse(IDS, values)
        return "loss"

    for t in range(2):
        options = [(0.5 * 0.5**t, 0.0), (1.0 * 0.5**t, 1e-2)]
        truths = [
            expected(table, IDS, values, *option)
            for table, option in zip(truths, options, strict=True)
        ]
        assert optimizer.step(closure) == "loss"
        scheduler.step()
    assert seen == ["pre", "post"] * 2
    for table, truth in zip(tables, truths, strict=True):
        assert_near(table, truth, 1.0)


def test_state_dict_holds_options_and_no_state() -> None:
    first = SparseSignSGD([make_table()], lr=0.5, weight_decay=0.25, maximize=True)
    first.param_groups[0]["params"][0].grad = sparse(IDS, row_grads())
    first.step()
    saved = first.state_dict()
    assert saved["state"] == {}
    second = SparseSignSGD([make_table()])
    second.load_state_dict(saved)
    assert second.state_dict() == saved


def test_older_state_dict_gets_the_default_of_a_missing_option() -> None:
    optimizer = SparseSignSGD([make_table()])
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["maximize"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["maximize"] is False


# Mixed precision


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", GRADS)
def test_overflow_leaves_every_bit(kind: str, device: str) -> None:
    table, values = make_table(device=device), row_grads()
    table.data[0, 0] = -0.0
    values[1, 2] = torch.inf
    table.grad = GRADS[kind](IDS, values).to(device)
    before = table.detach().clone()
    scaler = torch.amp.GradScaler(device)
    scaler.scale(torch.ones((), device=device))
    scaler.step(SparseSignSGD([table], lr=0.1, weight_decay=1.0))
    scaler.update()
    assert torch.equal(table.view(torch.int32), before.view(torch.int32))
    assert scaler.get_scale() == 2.0**15  # the scaler has seen it, and halves its scale


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_scaled_gradients_give_the_plain_step(unscaled_before: bool) -> None:
    layer = Embedding(ROWS, WIDTH, sparse=True)
    values = row_grads()
    truth = expected(layer.weight, IDS, values, 0.1, 1.0)
    optimizer = SparseSignSGD(layer.parameters(), lr=0.1, weight_decay=1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((layer(IDS) * values).sum()).backward()
    if unscaled_before:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert_near(layer.weight, truth, 0.1)


# Refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0; got -1.0"),
        ({"lr": torch.inf}, "lr must be finite and >= 0; got inf"),
        ({"weight_decay": torch.nan}, "weight_decay must be finite and >= 0; got nan"),
        ({"lr": torch.ones(2)}, r"lr must have one element; got shape \(2,\)"),
    ],
    ids=str,
)
def test_wrong_option_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"SparseSignSGD: {text}"):
        SparseSignSGD([make_table()], **options)


@pytest.mark.parametrize(
    "param", [torch.ones(3), torch.ones(()), torch.ones(2, 2, dtype=torch.complex64)], ids=str
)
def test_parameter_that_is_no_table_is_refused_and_not_added(param: Tensor) -> None:
    optimizer = SparseSignSGD([make_table()])
    with pytest.raises(ValueError, match="SparseSignSGD: a parameter must be a floating point"):
        optimizer.add_param_group({"params": [Parameter(param)]})
    assert len(optimizer.param_groups) == 1


def bad_lr(optimizer: SparseSignSGD) -> None:
    optimizer.param_groups[1]["lr"] = -1.0


def bad_grad(optimizer: SparseSignSGD) -> None:
    table = optimizer.param_groups[1]["params"][0]
    table.grad = torch.ones(ROWS, WIDTH).to_sparse()


@pytest.mark.parametrize("spoil", [bad_lr, bad_grad])
def test_refused_step_writes_nothing(spoil: Callable[[SparseSignSGD], None]) -> None:
    tables = [make_table(), make_table()]
    optimizer = SparseSignSGD([{"params": [table]} for table in tables], lr=0.1)
    for table in tables:
        table.grad = sparse(IDS, row_grads())
    before = tables[0].detach().clone()
    spoil(optimizer)
    with pytest.raises(ValueError, match="SparseSignSGD: "):
        optimizer.step()
    assert torch.equal(tables[0], before)


# Two processes


def tables_of(rank: int) -> dict[str, Tensor]:
    tables = {}
    for kind in ("sparse", "dense"):
        layer = Embedding.from_pretrained(make_table().detach(), False, sparse=kind == "sparse")
        model = DistributedDataParallel(layer)
        optimizer = SparseSignSGD(model.parameters(), lr=0.25, weight_decay=0.5)
        half = slice(3 * rank, 3 * rank + 3)
        (model(IDS[half]) * (row_grads() + 0.5)[half]).sum().backward()
        optimizer.step()
        tables[kind] = layer.weight.detach()
    return tables


@needs_gloo
def test_ddp_sums_rows_of_all_ranks_before_the_sign() -> None:
    truth = expected(make_table(), IDS, row_grads() + 0.5, 0.25, 0.5)
    first, second = run_ranks(tables_of)
    for kind in ("sparse", "dense"):
        assert torch.equal(first[kind], second[kind])
        assert_near(first[kind], truth, 0.25)
