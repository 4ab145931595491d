"""GrokFastOptimizer: its filters in float64, what it wraps, its state, and what it leaves alone."""

import io
import pickle
from copy import deepcopy

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from trm_fast.ops import FILTERS
from trm_fast.optim import GradFilter, GrokFastAdamW
from trm_fast.recipes.classify import GrokFastOptimizer

from ...optim.filter_checks import assert_close, filtered

MODES = {
    "highpass": {"lamb": 0.1},
    "ema": {"lamb": 2.0},
    "ma": {"lamb": 5.0},
    "projection": {"lamb": 0.2},
    "cosine_gate": {"lamb": 3.0},
}
BASES = {
    "own": lambda params: None,
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01),
    "amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-3, amsgrad=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}
FUSED = {"own", "adamw"}
each_base = pytest.mark.parametrize("base", BASES)


def params(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(4, 3), (5,), ()]
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def rows(count, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    like = params()
    return [
        [torch.randn(p.shape, generator=generator).to(dtype) for p in like] for _ in range(count)
    ]


def give(tensors, row):
    for tensor, grad in zip(tensors, row, strict=True):
        tensor.grad = grad.clone()


def make(base="own", dtype=torch.float32, **options):
    tensors = params(dtype)
    return tensors, GrokFastOptimizer(tensors, BASES[base](tensors), **options)


def same(first, second):
    """Whether two nested states are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("filter", MODES)
@each_base
def test_each_filter_is_its_formula(filter, base):
    lamb = MODES[filter]["lamb"]
    tensors, optimizer = make(base, torch.float64, filter=filter, alpha=0.9, lambda_=lamb)
    for group in optimizer.param_groups:
        group["window"] = 4  # of "ma"; it starts anew
    for tensor in tensors:
        optimizer.state[tensor].pop("grok_ring", None)
        optimizer.state[tensor].pop("grok_sum", None)
    truth = params(torch.float64)
    make_base = BASES["adamw" if base == "own" else base]
    plain = make_base(truth)
    grads = rows(12, torch.float64)
    for row, wanted in zip(
        grads, filtered(grads, filter=filter, alpha=0.9, lamb=lamb, window=4), strict=True
    ):
        give(tensors, row)
        optimizer.step()
        give(truth, wanted)
        plain.step()
        assert all(torch.equal(t.grad, g) for t, g in zip(tensors, row, strict=True))
    assert_close(tensors, truth)


@each_base
def test_filter_and_adamw_are_one_call_where_they_can_be(base):
    _, optimizer = make(base)
    assert isinstance(optimizer.inner, GrokFastAdamW if base in FUSED else GradFilter)


def test_hooks_of_the_base_are_run():
    tensors = params()
    base, seen = torch.optim.AdamW(tensors), []
    base.register_step_post_hook(lambda *_: seen.append(1))
    optimizer = GrokFastOptimizer(tensors, base)
    give(tensors, rows(1)[0])
    optimizer.step()
    assert seen == [1]


def test_an_adamw_that_has_taken_steps_goes_on():
    tensors, truth = params(torch.float64), params(torch.float64)
    base, plain = torch.optim.AdamW(tensors, lr=0.1), torch.optim.AdamW(truth, lr=0.1)
    grads = rows(6, torch.float64)
    for row in grads[:3]:
        give(tensors, row)
        base.step()
        give(truth, row)
        plain.step()
    optimizer = GrokFastOptimizer(tensors, base, filter="ema", alpha=0.9, lambda_=2.0)
    for row, wanted in zip(grads[3:], filtered(grads[3:], alpha=0.9, lamb=2.0), strict=True):
        give(tensors, row)
        optimizer.step()
        give(truth, wanted)
        plain.step()
    assert_close(tensors, truth)


@each_base
def test_the_first_step_of_highpass_is_not_filtered(base):
    tensors, optimizer = make(base, torch.float64)
    truth = params(torch.float64)
    plain = BASES["adamw" if base == "own" else base](truth)
    give(tensors, rows(1, torch.float64)[0])
    give(truth, rows(1, torch.float64)[0])
    optimizer.step()
    plain.step()
    assert_close(tensors, truth)


@each_base
def test_the_state_has_the_named_keys_and_comes_back_to_the_bit(base):
    tensors, optimizer = make(base, filter="ema", alpha=0.9, lambda_=2.0)
    grads = rows(8)
    for row in grads[:4]:
        give(tensors, row)
        optimizer.step()
    state = optimizer.state_dict()
    assert state.keys() == {"optimizer", "grad_ema", "alpha", "lambda", "filter"}
    assert (state["alpha"], state["lambda"], state["filter"]) == (0.9, 2.0, "ema")
    assert state["grad_ema"].keys() == {0, 1, 2}
    assert not any(
        name.startswith("grok") for own in state["optimizer"]["state"].values() for name in own
    )
    buffer = io.BytesIO()
    torch.save({"params": tensors, "state": state}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)

    # Other options than those that are loaded.
    others, loaded = make(base, alpha=0.5, lambda_=0.3)
    for other, tensor in zip(others, saved["params"], strict=True):
        other.data.copy_(tensor)
    loaded.load_state_dict(saved["state"])
    assert (loaded.alpha, loaded.lambda_, loaded.filter) == (0.9, 2.0, "ema")
    assert same(loaded.state_dict(), state)
    for row in grads[4:]:
        for these, stepper in ((tensors, optimizer), (others, loaded)):
            give(these, row)
            stepper.step()
    assert all(map(torch.equal, tensors, others))


@each_base
def test_float32_buffers_of_bfloat16_parameters_stay_float32(base):
    tensors, optimizer = make(base, torch.bfloat16)
    for row in rows(3, torch.bfloat16):
        give(tensors, row)
        optimizer.step()
    _, loaded = make(base, torch.bfloat16)
    loaded.load_state_dict(optimizer.state_dict())
    means = [own["grok_exp_avg"] for own in loaded.state_dict()["grad_ema"].values()]
    assert len(means) == 3 and all(mean.dtype == torch.float32 for mean in means)
    # They hold what 16 bits cannot.
    assert any(not torch.equal(mean, mean.bfloat16().float()) for mean in means)


BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


@each_base
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_gradient_that_is_not_finite_changes_nothing(base, bad):
    tensors, optimizer = make(base)
    twin_tensors, twin = make(base)
    grads = rows(4)
    for index, row in enumerate(grads):
        for these, stepper in ((tensors, optimizer), (twin_tensors, twin)):
            give(these, row)
            stepper.step()
        if index != 1:
            continue
        before = deepcopy(optimizer.state_dict())
        give(tensors, grads[0])
        tensors[1].grad[2] = bad
        optimizer.step()
        assert same(optimizer.state_dict(), before)
        assert all(map(torch.equal, tensors, twin_tensors))
    assert all(map(torch.equal, tensors, twin_tensors))


@each_base
def test_schedulers_of_the_wrapper_move_the_step(base):
    tensors, optimizer = make(base)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.0)
    give(tensors, rows(1)[0])
    optimizer.step()
    scheduler.step()
    before = [tensor.clone() for tensor in tensors]
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_schedulers_of_the_base_move_the_step(base):
    tensors = params()
    inside = BASES[base](tensors)
    scheduler = StepLR(inside, step_size=1, gamma=0.0)
    optimizer = GrokFastOptimizer(tensors, inside)
    give(tensors, rows(1)[0])
    optimizer.step()
    inside.step()  # for the scheduler, which would warn otherwise
    scheduler.step()
    before = [tensor.clone() for tensor in tensors]
    optimizer.step()
    assert all(map(torch.equal, tensors, before))


@each_base
def test_groups_can_be_added(base):
    _, optimizer = make(base)
    late = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    late.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.param_groups[1]["lr"] == 0.5 and not torch.equal(late, torch.ones(3))


@each_base
def test_a_closure_is_called_once_and_gradients_are_cleared(base):
    tensors, optimizer = make(base)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        give(tensors, rows(1)[0])
        return 3.0

    assert optimizer.step(closure) == 3.0 and calls == [True]
    optimizer.zero_grad()
    assert all(tensor.grad is None for tensor in tensors)


@pytest.mark.parametrize("copy", [deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@each_base
def test_copies_step_alike(base, copy):
    tensors, optimizer = make(base)
    give(tensors, rows(1)[0])
    optimizer.step()
    twins, twin = copy((tensors, optimizer))
    for these, stepper in ((tensors, optimizer), (twins, twin)):
        give(these, rows(1, seed=5)[0])
        stepper.step()
    assert all(map(torch.equal, tensors, twins))


@each_base
def test_a_scaler_skips_a_step_that_overflows(base):
    tensors, optimizer = make(base)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [tensor.clone() for tensor in tensors]
    scaler.scale(torch.stack([t.sum() for t in tensors]).sum()).backward()
    tensors[0].grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0 and all(map(torch.equal, tensors, before))
    optimizer.zero_grad()
    scaler.scale(torch.stack([t.sum() for t in tensors]).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not any(map(torch.equal, tensors, before))


def test_the_gains_of_highpass_and_ema():
    """A filter is linear, so its gain is what becomes of a gradient after many steps."""
    constant, alternating = torch.tensor(1.0).double(), torch.tensor(-1.0).double()
    for filter, lamb, slow, fast in (("highpass", 0.1, 1.0, 1.099), ("ema", 2.0, 3.0, 1.02)):
        # 0.98^2000 is 3e-18: nothing of the start is left.
        options = {"filter": filter, "alpha": 0.98, "lamb": lamb}
        steady = filtered([[constant]] * 2000, **options)[-1][0]
        swinging = filtered([[alternating**i] for i in range(2000)], **options)[-1][0]
        assert steady.item() == pytest.approx(slow, abs=1e-9)
        # Both are given to three digits.
        assert abs(swinging.item()) == pytest.approx(fast, abs=5e-4)


NAMES = ", ".join(repr(name) for name in FILTERS if name != "none")
WRONG = {
    "type": (
        lambda p: GrokFastOptimizer(p, torch.optim.SGD),
        TypeError,
        "GrokFastOptimizer: base_optimizer must be a torch.optim.Optimizer or None; got type",
    ),
    "params": (
        lambda p: GrokFastOptimizer(p[:2], torch.optim.SGD(p)),
        ValueError,
        "GrokFastOptimizer: params must be the 3 of base_optimizer; got 2, 2 of them the same",
    ),
    "keys": (
        lambda p: GrokFastOptimizer(p).load_state_dict({"optimizer": {}}),
        ValueError,
        "GrokFastOptimizer: state_dict must have the keys alpha, filter, grad_ema, lambda, "
        "optimizer; got optimizer",
    ),
    "filter": (
        lambda p: GrokFastOptimizer(p, filter="lowpass"),
        ValueError,
        f"GrokFastAdamW: filter must be {NAMES} or None; got 'lowpass'",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_is_refused(call, kind, message):
    with pytest.raises(kind) as error:
        call(params())
    assert str(error.value) == message
