"""What adaptive_step_ refuses, in which words, and that nothing is half-updated then."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trm_fast import BackendError
from trm_fast.ops import Settings, adaptive_step_
from trm_fast.ops._adaptive_filters import FILTERS, REDUCING, WINDOWED

from .adaptive_checks import (
    LISTS,
    assert_same_bits,
    assert_step,
    bits,
    copies,
    kept_step,
    lists_of,
    make,
    run,
    without,
)

SETTINGS = Settings(1e-2, weight_decay=0.1, filter="ema", lamb=2.0, weight_ema=0.9)
Lists = dict[str, list[Tensor]]


def named_lists(device: torch.device) -> Lists:
    items = [make((4, 6), seed=seed, device=device) for seed in range(2)]
    return dict(zip(LISTS, lists_of(items), strict=True))


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Lists], None]:
    """Changes the second tensor of a list, so that the first one could be half-updated."""

    def apply(lists: Lists) -> None:
        lists[name][1] = change(lists[name][1])

    return apply


def drop(*names: str) -> Callable[[Lists], None]:
    def apply(lists: Lists) -> None:
        for name in names:
            lists[name].pop()

    return apply


def empty(name: str) -> Callable[[Lists], None]:
    return lambda lists: lists[name].clear()


def share(name: str, other: str, view: Callable[[Tensor], Tensor] = lambda t: t) -> Callable:
    """Makes the second tensor of a list lie in the memory of the first one of another list."""

    def apply(lists: Lists) -> None:
        lists[name][1] = view(lists[other][0])

    return apply


def turned(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def turned3(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def float64_param(lists: Lists) -> None:
    lists["param"][1] = lists["param"][1].double()
    lists["grad"][1] = lists["grad"][1].double()


def half_overlapping(lists: Lists) -> None:
    memory = torch.zeros(36, device=lists["param"][0].device)
    lists["param"][:] = [memory[:24].view(4, 6), memory[12:].view(4, 6)]


# What is changed; then the error, the argument, what is required of it, and what came.
REFUSED = {
    "fewer grads": (drop("grad"), ValueError, "grads", "2 tensors", "1"),
    "fewer exp_avgs": (drop("exp_avg"), ValueError, "exp_avg", "2 tensors", "1"),
    "fewer exp_avg_sqs": (drop("exp_avg_sq"), ValueError, "exp_avg_sq", "2 tensors", "1"),
    "fewer steps": (drop("step"), ValueError, "step", "2 tensors", "1"),
    "no steps": (empty("step"), ValueError, "step", "2 tensors", "0"),
    "fewer grok_exp_avgs": (drop("grok_exp_avg"), ValueError, "grok_exp_avg", "2 tensors", "1"),
    "fewer grok_steps": (drop("grok_step"), ValueError, "grok_step", "2 tensors", "1"),
    "no grok_steps": (
        empty("grok_step"), ValueError, "grok_step", "together with grok_exp_avg", "0",
    ),
    "grok_steps alone": (
        empty("grok_exp_avg"), ValueError, "grok_step", "together with grok_exp_avg", "2",
    ),
    "fewer weight_emas": (drop("weight_ema"), ValueError, "weight_ema", "2 tensors", "1"),
    "integer parameter": (
        replace("param", Tensor.long), TypeError, r"params\[1\]", "floating point", "torch.int64",
    ),
    "complex parameter": (
        replace("param", lambda t: t.to(torch.complex64)), TypeError, r"params\[1\]",
        "floating point", "torch.complex64",
    ),
    "sparse parameter": (
        replace("param", Tensor.to_sparse), TypeError, r"params\[1\]", "dense", "torch.sparse_coo",
    ),
    "parameter elsewhere": (
        replace("param", lambda t: t.to("meta")), ValueError, r"params\[1\]", "params", "meta",
    ),
    "sparse grad": (
        replace("grad", Tensor.to_sparse), TypeError, r"grads\[1\]", "dense", "torch.sparse_coo",
    ),
    "float64 grad": (
        replace("grad", Tensor.double), TypeError, r"grads\[1\]", "torch.bfloat16", "torch.float64",
    ),
    "integer grad": (
        replace("grad", Tensor.int), TypeError, r"grads\[1\]", "torch.bfloat16", "torch.int32",
    ),
    "grad of another shape": (
        replace("grad", Tensor.t), ValueError, r"grads\[1\]", r"\(4, 6\)", r"\(6, 4\)",
    ),
    "grad elsewhere": (
        replace("grad", lambda t: t.to("meta")), ValueError, r"grads\[1\]", "as its param",
        "meta",
    ),
    "float16 state": (
        replace("exp_avg", Tensor.half), TypeError, r"exp_avg\[1\]", "torch.bfloat16",
        "torch.float16",
    ),
    "float64 state": (
        replace("exp_avg_sq", Tensor.double), TypeError, r"exp_avg_sq\[1\]", "torch.bfloat16",
        "torch.float64",
    ),
    "float32 state of a float64 parameter": (
        float64_param, TypeError, r"exp_avg\[1\]", "torch.float64", "torch.float32",
    ),
    "state of another shape": (
        replace("weight_ema", lambda t: t[:3].clone()), ValueError, r"weight_ema\[1\]", r"\(4, 6\)",
        r"\(3, 6\)",
    ),
    "state in another order": (
        replace("grok_exp_avg", turned), ValueError, r"grok_exp_avg\[1\]", r"\(6, 1\)", r"\(1, 4\)",
    ),
    "parameter in another order": (
        replace("param", turned), ValueError, r"exp_avg\[1\]", r"\(1, 4\)", r"\(6, 1\)",
    ),
    "state with gaps": (
        replace("exp_avg", lambda t: torch.cat((t, t), 1)[:, :6]), ValueError, r"exp_avg\[1\]",
        r"\(6, 1\)", r"\(12, 1\)",
    ),
    "float64 step": (
        replace("step", Tensor.double), ValueError, r"step\[1\]", "float32", "torch.float64",
    ),
    "1-d step": (
        replace("step", lambda t: t.view(1)), ValueError, r"step\[1\]", r"\(\)", r"\(1,\)",
    ),
    "grok_step elsewhere": (
        replace("grok_step", lambda t: t.to("meta")), ValueError, r"grok_step\[1\]", "float32",
        "meta",
    ),
    "a parameter twice": (
        share("param", "param"), ValueError, "written tensors", "disjoint", "overlap",
    ),
    "a state that is a parameter": (
        share("exp_avg", "param"), ValueError, "written tensors", "disjoint", "overlap",
    ),
    "a gradient that is a state": (
        share("grad", "weight_ema"), ValueError, "written tensors", "disjoint", "overlap",
    ),
    "a shared counter": (
        share("step", "step"), ValueError, "written tensors", "disjoint", "overlap",
    ),
    "parameters that half overlap": (
        half_overlapping, ValueError, "written tensors", "disjoint", "overlap",
    ),
    "a parameter that overlaps itself": (
        replace("param", lambda t: t[:1].clone().expand(4, 6)), ValueError,
        "written tensors|params", "disjoint|overlap", "overlap|stride",
    ),
}  # fmt: skip


def ring_lists(device: torch.device) -> Lists:
    items = [make((4, 6), seed=seed, window=3, device=device) for seed in range(2)]
    return dict(zip(LISTS, lists_of(items), strict=True))


def gaps(ring: Tensor) -> Tensor:
    return torch.zeros(3, 30)[:, :24].view(3, 4, 6)


REFUSED_RINGS = {
    "fewer rings": (drop("grok_ring"), ValueError, "grok_ring", "2 tensors", "1"),
    "a ring without its sum": (
        lambda lists: (empty("grok_exp_avg")(lists), empty("grok_step")(lists)), ValueError,
        "grok_exp_avg", "together with grok_ring", "0",
    ),
    "a ring of another shape": (
        replace("grok_ring", lambda t: t[:, :3].contiguous()), ValueError, r"grok_ring\[1\]",
        r"\(4, 6\)", r"\(3, 6\)",
    ),
    "a ring without a window": (
        replace("grok_ring", lambda t: t[0]), ValueError, r"grok_ring\[1\]", r"\[w, \*\(4, 6\)\]",
        r"\(4, 6\)",
    ),
    "a window of 0": (
        replace("grok_ring", lambda t: t[:0]), ValueError, r"grok_ring\[1\]", "w > 0",
        r"\(0, 4, 6\)",
    ),
    "a ring in another order": (
        replace("grok_ring", turned3), ValueError, r"grok_ring\[1\]\[0\]", r"\(6, 1\)",
        r"\(1, 4\)",
    ),
    "a ring with gaps": (
        replace("grok_ring", gaps), ValueError, r"grok_ring\[1\]", "without gaps", "30",
    ),
    "a ring in float16": (
        replace("grok_ring", Tensor.half), TypeError, r"grok_ring\[1\]", "torch.bfloat16",
        "torch.float16",
    ),
    "a ring elsewhere": (
        replace("grok_ring", lambda t: t.to("meta")), ValueError, r"grok_ring\[1\]", "cpu|cuda",
        "meta",
    ),
    "a sum in bfloat16": (
        replace("grok_exp_avg", Tensor.bfloat16), ValueError, r"grok_exp_avg\[1\]", "float32",
        "torch.bfloat16",
    ),
    "a gradient that lies in a ring": (
        share("grad", "grok_ring", lambda t: t[1]), ValueError, "written tensors", "disjoint",
        "overlap",
    ),
}  # fmt: skip


def assert_refused(case: tuple, lists: Lists, settings: Settings, backend: str) -> None:
    change, error, *words = case
    change(lists)
    watched = [
        t for ts in lists.values() for t in ts if not t.is_meta and t.layout == torch.strided
    ]
    before = [bits(t) for t in watched]
    with pytest.raises(error) as caught:
        adaptive_step_(*lists.values(), settings=settings, backend=backend)
    assert [bits(t) for t in watched] == before
    for word in ("adaptive_step_", *words):
        caught.match(word)


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tensors_are_refused_by_name_with_nothing_changed(backend, device, case):
    assert_refused(REFUSED[case], named_lists(device), SETTINGS, backend)


@pytest.mark.parametrize("case", REFUSED_RINGS)
def test_bad_rings_are_refused_by_name_with_nothing_changed(backend, device, case):
    settings = Settings(1e-2, filter="ma", lamb=2.0, weight_ema=0.9)
    assert_refused(REFUSED_RINGS[case], ring_lists(device), settings, backend)


# What is kept or left out; then the settings, the argument, what is required of it, what came.
UNSUITED = {
    "adamw without a first moment": (("exp_avg",), {}, "exp_avg", "given for rule 'adamw'", "none"),
    "adam without a second moment": (
        ("exp_avg_sq",), {"rule": "adam"}, "exp_avg_sq", "given for rule 'adam'", "none",
    ),
    "momentum without a first moment": (
        ("exp_avg", "exp_avg_sq", "weight_ema"), {"rule": "momentum"}, "exp_avg",
        "given for rule 'momentum'", "none",
    ),
    "sgd with a second moment": (
        (), {"rule": "sgd"}, "exp_avg_sq", "empty for rule 'sgd'", "tensors",
    ),
    "momentum with an average": (
        ("exp_avg_sq",), {"rule": "momentum"}, "weight_ema", "empty for rule 'momentum'", "tensors",
    ),
    "filter with a first moment": (
        ("exp_avg_sq", "weight_ema"), {"rule": "filter"}, "exp_avg", "empty for rule 'filter'",
        "tensors",
    ),
    "ma without a ring": ((), {"filter": "ma"}, "grok_ring", "given for filter 'ma'", "'ma'"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUITED)
def test_states_that_do_not_suit_the_rule_are_refused(backend, device, case):
    absent, changes, *words = UNSUITED[case]
    item = without(make((4, 6), device=device), *absent)
    before = copies(item)
    settings = Settings(**({"lr": 1e-2, "filter": "ema", "lamb": 2.0} | changes))
    with pytest.raises(ValueError) as caught:
        run([item], settings, backend)
    assert_same_bits(item, before)
    for word in ("adaptive_step_", *words):
        caught.match(word)


@pytest.mark.parametrize("filter_", [f for f in FILTERS if f not in (*WINDOWED, "none")])
def test_a_ring_is_refused_for_another_filter(backend, device, filter_):
    item = make((4, 6), window=3, device=device)
    with pytest.raises(ValueError, match=f"grok_ring must be given for filter 'ma'.*'{filter_}'"):
        run([item], Settings(1e-2, filter=filter_, lamb=2.0), backend)


@pytest.mark.parametrize("filter_", REDUCING)
def test_a_kept_step_wants_its_sums_first(backend, device, filter_):
    item = make((4, 6), device=device)
    step = kept_step(item, backend)
    with pytest.raises(ValueError, match="adaptive_step_: sums must be measured before the step"):
        step([item["grad"]], Settings(1e-2, filter=filter_, lamb=2.0))


def test_the_gate_does_not_divide_by_lamb_0():
    with pytest.raises(ValueError, match=r"lamb must be > 0 for filter 'cosine_gate'.*got 0"):
        Settings(1e-3, filter="cosine_gate", lamb=0.0)


NOT_FINITE = [math.nan, math.inf, -math.inf]
OUT_OF_RANGE = {
    "lr": [-1e-3, *NOT_FINITE, torch.ones(2), torch.ones(0)],
    "weight_decay": [-0.1, *NOT_FINITE, torch.ones(2)],
    "lamb": [-1.0, *NOT_FINITE, torch.ones(3, 1)],
    "eps": [-1e-8, *NOT_FINITE],
    "beta1": [-0.1, 1.0, *NOT_FINITE],
    "beta2": [-0.1, 1.0, *NOT_FINITE],
    "alpha": [-0.1, 1.1, *NOT_FINITE],
    "weight_ema": [-0.1, 1.1, *NOT_FINITE],
    "dampening": [-0.1, 1.1, *NOT_FINITE],
    "proj_eps": [-1e-10, *NOT_FINITE],
    "after_step": [-1],
    "rule": ["SGD", "AdamW", ""],
    "filter": ["mean", "EMA", None],
    "grad_scale": [torch.ones(2), torch.ones(0)],
    "found_inf": [torch.ones(2), torch.ones(0)],
    "clip": [torch.ones(2), torch.ones(0)],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError) as caught:
        Settings(**({"lr": 1e-3} | {name: value}))
    caught.match(rf"adaptive_step_: {name} must be .+; got ")


def test_bad_settings_say_what_came():
    with pytest.raises(ValueError, match=r"beta1 must be in \[0, 1\); got 1\.5"):
        Settings(1e-3, beta1=1.5)


def test_bad_settings_speak_for_their_owner():
    with pytest.raises(ValueError, match=r"^MyOptimizer: lr must be finite and >= 0; got -1"):
        Settings(-1, owner="MyOptimizer")


@pytest.mark.parametrize("name", ["cpp", "triton", "cuda"])
def test_a_named_native_backend_refuses_float64_with_the_reason(name):
    item = make(param=torch.float64, states=torch.float64)
    with pytest.raises(BackendError, match=f"named backend '{name}' cannot run: "):
        adaptive_step_(*lists_of([item]), settings=SETTINGS, backend=name)


def test_an_unknown_backend_is_refused_with_the_nearest_name():
    item = make()
    with pytest.raises(
        BackendError, match=r"backend must be one of .*; got 'cp'; did you mean 'cpp'\?"
    ):
        adaptive_step_(*lists_of([item]), settings=SETTINGS, backend="cp")


def test_a_gradient_may_serve_two_parameters(backend, device):
    items = [make(seed=seed, device=device) for seed in range(2)]
    items[1]["grad"] = items[0]["grad"]
    assert_step(items, SETTINGS, backend)


def test_parameters_may_be_columns_of_one_matrix(backend, device):
    """Their addresses interleave, but no element is shared."""
    items = [make((4, 6), seed=seed, device=device) for seed in range(2)]
    matrix = torch.zeros(4, 12, device=device)
    for item, columns in zip(items, (matrix[:, :6], matrix[:, 6:]), strict=True):
        item["param"] = columns.copy_(item["param"])
    assert_step(items, SETTINGS, backend)
