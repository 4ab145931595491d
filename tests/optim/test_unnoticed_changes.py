"""What a user may change between two steps behind the back of the optimizer's cached plan."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import trm_fast
from trm_fast import GrokFastAdamW

pytestmark = pytest.mark.skipif(
    trm_fast.backends()["adaptive_step"]["cpu"]["cpp"] not in ("usable", "chosen"),
    reason="only native steps are cached by address, and the C++ library is not built",
)


def stepped(**options: object) -> tuple[GrokFastAdamW, Parameter]:
    param = Parameter(torch.linspace(-1, 1, 5))
    param.grad = torch.ones(5)
    optimizer = GrokFastAdamW([param], **options)
    optimizer.step()
    return optimizer, param


def ran_on(optimizer: GrokFastAdamW) -> str:
    return optimizer._plans[0]._steps[0].choice.backend


def test_a_backend_named_later_is_used() -> None:
    optimizer, _ = stepped()
    with trm_fast.use_backend("reference"):
        optimizer.step()
        assert ran_on(optimizer) == "reference"


def test_a_backend_named_for_a_while_is_left_again() -> None:
    with trm_fast.use_backend("reference"):
        optimizer, _ = stepped()
    optimizer.step()
    assert ran_on(optimizer) == "cpp"


def test_fused_set_to_false_runs_the_reference() -> None:
    optimizer, _ = stepped()
    optimizer.param_groups[0]["fused"] = False
    optimizer.step()
    assert ran_on(optimizer) == "reference"


def in_new_memory(optimizer: GrokFastAdamW) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def in_shared_memory(optimizer: GrokFastAdamW) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.share_memory_()


@pytest.mark.parametrize("move", [in_new_memory, in_shared_memory])
def test_states_are_stepped_where_they_lie_now(move: Callable[[GrokFastAdamW], None]) -> None:
    optimizer, param = stepped(weight_ema=0.9)
    expected, same = stepped(weight_ema=0.9)
    move(optimizer)
    optimizer.step()
    expected.step()
    for name, value in expected.state[same].items():
        assert torch.equal(optimizer.state[param][name], value), name


def test_betas_changed_in_place_count() -> None:
    def run(change: bool) -> Tensor:
        param = Parameter(torch.zeros(3))
        optimizer = GrokFastAdamW([{"params": [param], "betas": [0.9, 0.99]}])
        for grad in (1.0, -1.0):
            param.grad = torch.full((3,), grad)
            optimizer.step()
            if change:
                optimizer.param_groups[0]["betas"][0] = 0.0
        return param.detach()

    assert not torch.equal(run(change=True), run(change=False))


def test_a_number_as_loss_scale_is_refused_by_name() -> None:
    optimizer, param = stepped()
    before = param.detach().clone()
    optimizer.grad_scale = 2.0
    with pytest.raises(TypeError, match=r"grad_scale must be a tensor or None; got 2\.0"):
        optimizer.step()
    assert torch.equal(param, before)


def test_a_step_count_may_be_set_to_a_number() -> None:
    optimizer, param = stepped()
    optimizer.state[param]["step"] = 3
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 4


def test_differentiable_refuses_a_backend_that_autograd_does_not_see() -> None:
    with pytest.raises(ValueError, match="backend must be 'reference' with differentiable"):
        GrokFastAdamW([Parameter(torch.zeros(1))], differentiable=True, backend="cpp")
