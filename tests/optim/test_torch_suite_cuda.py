"""torch's optimizer checks on GrokFastAdamW that need a CUDA device."""

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from .registry import ADAMW, Case, each_adamw
from .torch_checks import (
    assert_same,
    assert_within,
    build,
    clone_params,
    each_float,
    make_grads,
    make_params,
    needs_cuda,
    set_grads,
    snapshot,
    train,
    without_grads,
)

pytestmark = needs_cuda


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    """Libraries load and kernels compile at their first call, which no graph can capture."""
    if torch.cuda.is_available():
        for case in ADAMW.values():
            params = on_cuda(make_params())
            train(case(params, capturable=True), make_grads(params, steps=1))


def on_cuda(params: Sequence[Parameter]) -> list[Parameter]:
    """The same values with the same strides."""
    return [Parameter(torch.empty_like(p, device="cuda").copy_(p.detach())) for p in params]


def to_cuda(grads: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[torch.empty_like(grad, device="cuda").copy_(grad) for grad in row] for row in grads]


class Captured:
    """A step in a CUDA graph, over gradients that stay where they are."""

    def __init__(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
        self.params = params
        for param in params:
            param.grad = torch.zeros_like(param)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            optimizer.step()

    def __call__(self, row: Sequence[Tensor]) -> None:
        for param, grad in zip(self.params, row, strict=True):
            param.grad.copy_(grad)
        self.graph.replay()


# CUDA graphs


@each_adamw
def test_replayed_graph_equals_eager_steps(case: Case) -> None:
    """Capturing runs nothing, so the first replay is the first step and seeds the filter."""
    params = on_cuda(make_params())
    other = clone_params(params)
    grads = to_cuda(make_grads(params, steps=5))
    optimizer, eager = (case(p, capturable=True) for p in (params, other))
    step = Captured(optimizer, params)
    for row in grads:
        step(row)
    train(eager, grads)
    assert_same(without_grads(snapshot(optimizer)), without_grads(snapshot(eager)))


@each_adamw
def test_graph_reads_lr_from_the_device(case: Case) -> None:
    params = on_cuda(make_params())
    lr = torch.tensor(0.01, device="cuda")
    step = Captured(case(params, lr=lr, capturable=True), params)
    grads = to_cuda(make_grads(params, steps=2))
    step(grads[0])
    before = [param.detach().clone() for param in params]
    lr.zero_()
    step(grads[1])
    assert_same([param.detach() for param in params], before)


@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0])
def test_graph_reads_found_inf_from_the_device(found_inf: float) -> None:
    params = on_cuda(make_params())
    optimizer = build(params, capturable=True)
    optimizer.grad_scale = torch.ones((), device="cuda")
    optimizer.found_inf = torch.zeros((), device="cuda")
    step = Captured(optimizer, params)
    before = without_grads(snapshot(optimizer))
    optimizer.found_inf.fill_(found_inf)
    step(to_cuda(make_grads(params, steps=1))[0])
    moved = not torch.equal(before[0]["param"], params[0])
    counted = optimizer.state[params[0]]["step"].item()
    assert (moved, counted) == (found_inf == 0, found_inf == 0)


def test_capture_without_a_gradient_is_refused() -> None:
    """A parameter without a gradient would be left out of every replay."""
    params = on_cuda(make_params())
    optimizer = build(params, capturable=True)
    set_grads(params, [None, *to_cuda(make_grads(params, steps=1))[0][1:]])
    with pytest.raises(RuntimeError, match="gradient"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_capture_without_capturable_is_refused() -> None:
    params = on_cuda(make_params())
    with pytest.raises(RuntimeError, match="capturable"):
        Captured(build(params), params)


@each_adamw
def test_capturable_step_does_not_wait_for_the_device(case: Case) -> None:
    params = on_cuda(make_params())
    lr = torch.tensor(0.01, device="cuda")
    optimizer = case(params, lr=lr, capturable=True)
    rows = to_cuda(make_grads(params, steps=2))
    train(optimizer, rows[:1])
    set_grads(params, rows[1])
    optimizer.grad_scale = torch.ones((), device="cuda")
    optimizer.found_inf = torch.zeros((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.state[params[0]]["step"].item() == 2


# Several devices


@each_adamw
def test_mixed_devices_equal_an_optimizer_for_each(case: Case) -> None:
    params = [*make_params(), *on_cuda(make_params())]
    apart = clone_params(params)
    grads = make_grads(params, steps=3)
    half = len(params) // 2
    together = case(params)
    train(together, grads)
    for part in (slice(half), slice(half, None)):
        alone = case(apart[part])
        train(alone, [row[part] for row in grads])
        assert_same(snapshot(together)[part], snapshot(alone))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_found_inf_stops_the_step_on_every_device(device: str) -> None:
    params = [*make_params(), *on_cuda(make_params())]
    optimizer = build(params)
    set_grads(params, make_grads(params, steps=1)[0])
    before = snapshot(optimizer)
    optimizer.grad_scale = torch.ones((), device=device)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    assert_same(snapshot(optimizer), before)


@each_adamw
def test_lr_on_the_cpu_equals_lr_on_the_device(case: Case) -> None:
    params = on_cuda(make_params())
    other = clone_params(params)
    grads = make_grads(params, steps=3)
    train(case(params, lr=torch.tensor(2.0**-7)), grads)
    train(case(other, lr=torch.tensor(2.0**-7, device="cuda")), grads)
    assert_same(params, other)


@each_float
@each_adamw
def test_cuda_step_equals_cpu_step(case: Case, dtype: torch.dtype) -> None:
    """Of the first step, whose update is lr in size. Two runs of 10 roundings, half an ulp each, in
    float32 (float64 for float64), and one to the dtype of the parameter, which is an ulp where the
    two lie on two sides of a tie."""
    params = make_params(dtype)
    copies = on_cuda(params)
    row = make_grads(params, steps=1)
    train(case(params, lr=0.01), row)
    train(case(copies, lr=0.01), to_cuda(row))
    math = torch.float64 if dtype == torch.float64 else torch.float32
    for param, copy in zip(params, copies, strict=True):
        size = param.detach().double().abs() + 0.01
        bound = 10 * torch.finfo(math).eps * size
        if dtype != math:
            bound = bound + torch.finfo(dtype).eps * size
        assert_within(copy.cpu(), param, bound, "param")


# State dicts that cross devices


@each_adamw
def test_state_dict_moves_to_the_device(case: Case) -> None:
    params = make_params()
    optimizer = case(params)
    train(optimizer, make_grads(params, steps=3))
    state_dict = deepcopy(optimizer.state_dict())
    copies = on_cuda(params)
    other = case(copies)
    other.load_state_dict(state_dict)
    assert_same(state_dict, optimizer.state_dict())
    for param, copy in zip(params, copies, strict=True):
        moved = {key: value.cpu() for key, value in other.state[copy].items()}
        assert_same(moved, optimizer.state[param])
        assert other.state[copy]["exp_avg"].is_cuda


@pytest.mark.parametrize("flag", ["fused", "capturable"])
def test_state_saved_on_the_cpu_continues_on_the_device(flag: str) -> None:
    """As after `torch.load(..., map_location="cpu")` of what a GPU run has saved."""
    params = on_cuda(make_params())
    optimizer = build(params, **{flag: True})
    train(optimizer, make_grads(params, steps=2))
    state_dict = deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state.update({key: value.cpu() for key, value in state.items()})
    other = build(clone_params(params), **{flag: True})
    other.load_state_dict(state_dict)
    more = make_grads(params, steps=2, seed=7)
    train(optimizer, more)
    train(other, more)
    assert_same(snapshot(other), snapshot(optimizer))


# GradScaler and memory


@each_adamw
def test_scaled_training_equals_unscaled_on_the_device(case: Case) -> None:
    """Scales are powers of two, and the overflow in between changes nothing but the scale."""
    params = on_cuda(make_params())
    plain = clone_params(params)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=2)
    optimizer, expected = case(params), case(plain)
    grads = to_cuda(make_grads(params, steps=4))
    bad = [torch.full_like(grad, torch.inf) for grad in grads[0]]
    for row in [*grads[:2], bad, *grads[2:]]:
        scale = scaler.scale(torch.ones((), device="cuda"))
        set_grads(params, [grad * scale for grad in row])
        scaler.step(optimizer)
        scaler.update()
    train(expected, grads)
    assert_same(without_grads(snapshot(optimizer)), without_grads(snapshot(expected)))


@each_adamw
def test_step_needs_no_memory_of_the_size_of_a_parameter(case: Case) -> None:
    params = [Parameter(torch.ones(1 << 20, device="cuda")) for _ in range(2)]
    optimizer = case(params, fused=True)
    row = [torch.ones_like(param) for param in params]
    train(optimizer, [row, row])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < (1 << 20)
