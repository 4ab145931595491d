"""GrokFastAdamW when parameters, states, gradients or options change, also to what is refused."""

from collections import defaultdict
from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from trm_fast import BackendError, GrokFastAdamW

from .torch_checks import (
    STATES,
    assert_same,
    build,
    clone_params,
    make_grads,
    make_params,
    one,
    randn,
    set_grads,
    snapshot,
    step_with,
    train,
)

# Parameters that come, go and move


def test_frozen_parameter_gets_no_state() -> None:
    frozen = one(1.0).requires_grad_(False)
    optimizer = GrokFastAdamW([frozen, one(1.0)], weight_ema=0.9)
    assert frozen not in optimizer.state


def test_trainable_parameter_gets_its_state_at_construction() -> None:
    param = one(1.0)
    optimizer = GrokFastAdamW([param], weight_ema=0.9)
    assert optimizer.state[param].keys() == {"step", "grok_step", *STATES}


def test_thawed_parameter_equals_one_that_starts_then() -> None:
    frozen, twin = one(1.0, 2.0).requires_grad_(False), one(1.0, 2.0)
    early = one(3.0)
    optimizer = GrokFastAdamW([early, frozen], weight_ema=0.9)
    alone = GrokFastAdamW([twin], weight_ema=0.9)
    step_with(optimizer, torch.ones(1), None)
    frozen.requires_grad_(True)
    step_with(optimizer, torch.ones(1), torch.ones(2))
    step_with(alone, torch.ones(2))
    assert_same(snapshot(optimizer)[1], snapshot(alone)[0])


def test_refrozen_parameter_keeps_its_state() -> None:
    param, other = one(1.0), one(1.0)
    optimizer = GrokFastAdamW([param, other])
    step_with(optimizer, torch.ones(1), torch.ones(1))
    param.requires_grad_(False)
    before = snapshot(optimizer)[0]
    step_with(optimizer, None, torch.ones(1))
    del before["grad"]
    assert_same(snapshot(optimizer)[0], before)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "new_memory": lambda data: data + 1,
    "permuted": lambda data: data.t().contiguous().t(),
    "strided": lambda data: torch.stack([data, data], dim=-1)[..., 0],
    "bfloat16": Tensor.bfloat16,
    "float16": Tensor.half,
    "float64": Tensor.double,
}


@pytest.mark.parametrize("steps", [0, 2], ids=["before_its_first_step", "between_steps"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_parameter_may_be_moved(move: Callable[[Tensor], Tensor], steps: int) -> None:
    """As if the state had been saved and loaded into an optimizer of the moved parameter."""
    param = Parameter(randn(4, 3))
    optimizer = GrokFastAdamW([param], lr=0.1)
    train(optimizer, make_grads([param], steps))
    param.grad = None
    param.data = move(param.data)
    twin = GrokFastAdamW(clone_params([param]), lr=0.1)
    twin.load_state_dict(optimizer.state_dict())
    rows = make_grads([param], 2, seed=7)
    train(twin, rows)
    train(optimizer, rows)
    assert_same(snapshot(optimizer), snapshot(twin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_model_may_be_cast_after_construction(dtype: torch.dtype) -> None:
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    optimizer = GrokFastAdamW(model.parameters())
    model.to(dtype)
    fresh = GrokFastAdamW(other.to(dtype).parameters())
    rows = make_grads(list(model.parameters()), 2)
    train(fresh, rows)
    train(optimizer, rows)
    assert_same(snapshot(optimizer), snapshot(fresh))


def test_state_tensor_may_be_replaced() -> None:
    param = one(1.0, 2.0)
    optimizer = GrokFastAdamW([param], betas=(0.5, 0.9))
    train(optimizer, [[torch.ones(2)]] * 2)
    old = optimizer.state[param]["exp_avg"]
    optimizer.state[param]["exp_avg"] = torch.tensor([8.0, 16.0])
    step_with(optimizer, torch.ones(2))
    # g = 1 and mean = 1, so that ghat = 3 and m = 0.5 * m + 1.5, all of them exact.
    assert_same(optimizer.state[param]["exp_avg"], torch.tensor([5.5, 9.5]))
    assert old is not optimizer.state[param]["exp_avg"]


def clear_all(optimizer: GrokFastAdamW) -> None:
    optimizer.state.clear()


def assign_new(optimizer: GrokFastAdamW) -> None:
    optimizer.state = defaultdict(dict)


def replace_each(optimizer: GrokFastAdamW) -> None:
    for param, state in list(optimizer.state.items()):
        optimizer.state[param] = {name: torch.zeros_like(t) for name, t in state.items()}


def empty_each(optimizer: GrokFastAdamW) -> None:
    for state in optimizer.state.values():
        state.clear()


@pytest.mark.parametrize("reset", [clear_all, assign_new, replace_each, empty_each])
def test_state_may_be_reset(reset: Callable[[GrokFastAdamW], None]) -> None:
    """The common ways to restart an optimizer; the next step equals the first of a new one."""
    params = make_params()
    optimizer = GrokFastAdamW(params)
    train(optimizer, make_grads(params, 2))
    fresh = GrokFastAdamW(clone_params(params))
    reset(optimizer)
    rows = make_grads(params, 1, seed=7)
    train(optimizer, rows)
    train(fresh, rows)
    assert_same(snapshot(optimizer), snapshot(fresh))


def test_parameters_of_a_group_may_be_replaced() -> None:
    old, new = one(1.0, 2.0), one(3.0, 4.0)
    twin = clone_params([new])
    optimizer = GrokFastAdamW([old])
    step_with(optimizer, torch.ones(2))
    before = old.detach().clone()
    optimizer.param_groups[0]["params"] = [new]
    step_with(optimizer, torch.ones(2))
    step_with(GrokFastAdamW(twin), torch.ones(2))
    assert_same([old.detach(), new], [before, twin[0]])


def assign_list(group: dict[str, Any], param: Parameter) -> None:
    group["params"] = [param]


def assign_item(group: dict[str, Any], param: Parameter) -> None:
    group["params"][0] = param


@pytest.mark.parametrize("assign", [assign_list, assign_item])
def test_new_parameter_over_the_same_memory_has_its_own_state(
    assign: Callable[[dict[str, Any], Parameter], None],
) -> None:
    old = one(1.0, 2.0)
    optimizer = GrokFastAdamW([old])
    step_with(optimizer, torch.ones(2))
    new = Parameter(old.detach())
    assign(optimizer.param_groups[0], new)
    step_with(optimizer, torch.ones(2))
    assert [optimizer.state[param]["step"].item() for param in (old, new)] == [1, 1]


def test_parameter_may_be_appended_to_a_group() -> None:
    first, second = one(1.0, 2.0), one(3.0)
    twins = clone_params([first, second])
    optimizer = GrokFastAdamW([first])
    step_with(optimizer, torch.ones(2))
    optimizer.param_groups[0]["params"].append(second)
    step_with(optimizer, torch.ones(2), torch.ones(1))
    train(GrokFastAdamW(twins), [[torch.ones(2), None], [torch.ones(2), torch.ones(1)]])
    assert_same([first, second], twins)


def test_parameter_may_leave_a_group() -> None:
    first, second = one(1.0, 2.0), one(3.0)
    optimizer = GrokFastAdamW([first, second])
    step_with(optimizer, torch.ones(2), torch.ones(1))
    before = snapshot(optimizer)[0]
    del optimizer.param_groups[0]["params"][0]
    optimizer.step()
    assert_same(first.detach(), before["param"])


def test_parameter_that_shares_memory_is_refused() -> None:
    param = one(1.0, 2.0)
    optimizer = GrokFastAdamW([param, Parameter(param.detach()[:1])])
    with pytest.raises(ValueError, match="disjoint in memory"):
        step_with(optimizer, torch.ones(2), torch.ones(1))


def test_refused_parameter_leaves_everything_unchanged() -> None:
    param = one(1.0, 2.0)
    optimizer = GrokFastAdamW([one(3.0), param, Parameter(param.detach()[:1])])
    set_grads(optimizer.param_groups[0]["params"], [torch.ones(1), torch.ones(2), torch.ones(1)])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="disjoint in memory"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


# Gradients


def test_sparse_gradient_is_refused_with_the_remedy() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    optimizer = GrokFastAdamW(table.parameters())
    with pytest.raises(RuntimeError, match=r"sparse gradients.*SparseAdam or.*sparse=False"):
        optimizer.step()


def test_sparse_gradient_leaves_everything_unchanged() -> None:
    param, table = one(1.0), Parameter(torch.ones(4, 2))
    optimizer = GrokFastAdamW([param, table])
    param.grad, table.grad = torch.ones(1), torch.ones(4, 2).to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same([row["param"] for row in snapshot(optimizer)], [row["param"] for row in before])


@pytest.mark.parametrize("filter", ["ema", "highpass"])
def test_gradients_are_only_read(filter: str) -> None:
    params = make_params()
    grads = make_grads(params, 1)[0]
    set_grads(params, grads)
    GrokFastAdamW(params, filter=filter, maximize=True).step()
    assert_same([param.grad for param in params], grads)


@pytest.mark.parametrize("steps", [0, 1], ids=["first_step", "kept_step"])
def test_versions_of_gradients_stay(steps: int) -> None:
    params = make_params()
    optimizer = GrokFastAdamW(params)
    train(optimizer, make_grads(params, steps))
    set_grads(params, make_grads(params, 1)[0])
    held = [(id(param.grad), param.grad._version) for param in params]
    optimizer.step()
    assert [(id(param.grad), param.grad._version) for param in params] == held


@pytest.mark.parametrize("steps", [0, 1], ids=["first_step", "kept_step"])
def test_versions_of_parameters_rise(steps: int) -> None:
    params = make_params()
    optimizer = GrokFastAdamW(params)
    train(optimizer, make_grads(params, steps))
    before = [param._version for param in params]
    train(optimizer, make_grads(params, 1))
    assert all(p._version > version for p, version in zip(params, before, strict=True))


def test_stale_backward_is_refused() -> None:
    param = one(1.0, 2.0)
    optimizer = GrokFastAdamW([param])
    loss = param.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_steady_step_needs_no_memory() -> None:
    """Copies of the gradients or of any state would be 28 MB each."""

    def allocated(backend: str) -> int:
        param = Parameter(torch.zeros(1000, 7000))
        optimizer = build([param], backend=backend)
        param.grad = torch.ones_like(param)
        optimizer.step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            optimizer.step()
        return sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())

    assert allocated("cpp") < 2**20
    assert allocated("reference") > 2**20, "the profiler sees what a step allocates"


# Options that cannot be


NUMBERS = ("lr", "eps", "weight_decay", "alpha", "lamb", "after_step", "weight_ema")
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name}={value}": (name, {name: value})
    for name in NUMBERS
    for value in (-0.5, nan, inf, "1", [])
}
BAD |= {f"{name}=None": (name, {name: None}) for name in NUMBERS if name != "weight_ema"}
BAD |= {f"{name}=1.5": (name, {name: 1.5}) for name in ("alpha", "weight_ema", "after_step")}
BAD |= {
    f"betas={value}": ("beta", {"betas": value})
    for value in (
        (-0.1, 0.9), (0.9, 1.0), (nan, 0.9), (0.9, inf), ("a", 0.9), (0.9, None),
        (0.9,), (0.9, 0.9, 0.9), 0.9, None,
    )
}  # fmt: skip
BAD |= {f"filter={value}": ("filter", {"filter": value}) for value in ("emma", "", 3, ["ema"])}
BAD |= {
    f"normalized {name}={value}": (name, {name: value, "normalize_lr": True})
    for name, value in (("lamb", -1.0), ("lamb", nan), ("lamb", "2"), ("lr", "1"), ("lr", -1.0))
}
each_bad = pytest.mark.parametrize(("named", "options"), BAD.values(), ids=BAD)


def refused(named: str) -> Any:
    """An error in the name of the optimizer, of the option that was at fault."""
    return pytest.raises((ValueError, TypeError), match=rf"^GrokFastAdamW: {named}")


@each_bad
def test_bad_option_is_refused_by_name(named: str, options: dict[str, Any]) -> None:
    with refused(named):
        GrokFastAdamW([one(1.0)], **options)


@each_bad
def test_bad_option_of_a_group_is_refused_by_name(named: str, options: dict[str, Any]) -> None:
    with refused(named):
        GrokFastAdamW([{"params": [one(1.0)]}, {"params": [one(2.0)]} | options])


@each_bad
def test_group_with_a_bad_option_is_refused_by_name(named: str, options: dict[str, Any]) -> None:
    optimizer = GrokFastAdamW([one(1.0)])
    with refused(named):
        optimizer.add_param_group({"params": [one(2.0)]} | options)


@each_bad
def test_group_with_a_bad_option_is_not_added(named: str, options: dict[str, Any]) -> None:
    optimizer = GrokFastAdamW([one(1.0)])
    with pytest.raises(Exception):  # noqa: B017, the test above says which
        optimizer.add_param_group({"params": [one(2.0)]} | options)
    assert (len(optimizer.param_groups), len(optimizer.state)) == (1, 1)


@each_bad
def test_bad_option_set_between_steps_is_refused_by_name(
    named: str, options: dict[str, Any]
) -> None:
    param = one(1.0)
    optimizer = GrokFastAdamW([param])
    step_with(optimizer, torch.ones(1))
    optimizer.param_groups[0].update(options)
    with refused(named):
        optimizer.step()


@each_bad
def test_bad_option_set_between_steps_changes_nothing(named: str, options: dict[str, Any]) -> None:
    optimizer = GrokFastAdamW([one(1.0), one(2.0)])
    step_with(optimizer, torch.ones(1), torch.ones(1))
    before = snapshot(optimizer)
    optimizer.param_groups[0].update(options)
    with pytest.raises(Exception):  # noqa: B017, the test above says which
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_bad_option_of_the_last_group_keeps_the_first_from_its_step() -> None:
    optimizer = GrokFastAdamW([{"params": [one(1.0)]}, {"params": [one(2.0)]}])
    step_with(optimizer, torch.ones(1), torch.ones(1))
    before = snapshot(optimizer)
    optimizer.param_groups[1]["lr"] = -1.0
    with refused("lr"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_unknown_filter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r" or None; got 'emma'"):
        GrokFastAdamW([one(1.0)], filter="emma")


def test_unknown_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(BackendError, match=r"'cp'; did you mean 'cpp'\?"):
        GrokFastAdamW([one(1.0)], backend="cp")


def test_backend_that_cannot_run_is_refused_with_nothing_changed() -> None:
    param = one(1.0)
    optimizer = GrokFastAdamW([param], backend="cuda")
    param.grad = torch.ones(1)
    before = snapshot(optimizer)
    with pytest.raises(BackendError, match="'cuda' cannot run"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
