"""Muon against its formula in float64, and against what it does for separate matrices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from trm_fast import Muon
from trm_fast.ops._newton_schulz_sets import SETS

from .muon_checks import (
    EXACT,
    KELLER,
    SHAPES,
    assert_near,
    formula,
    found,
    matrices,
    matrix,
    orthogonal,
    ratio,
    trained,
)
from .torch_checks import assert_same, assert_within, clone_params, make_grads, set_grads, train

DOUBLE = torch.float64
STEPS = 32
# Less than float64 keeps of a factor that is taken apart and put together again.
SAME = 1e-13


def check(params: list[Parameter], steps: int = STEPS, **options: Any) -> None:
    """Steps in float64, and compares weights and states with the formula."""
    starts = clone_params(params)
    set_of = {"keller": (KELLER,) * 5, "spread": ((2.0, -1.5, 0.5), KELLER, (1.5, -0.5, 0.0))}
    named = options.pop("coefficients", "keller")
    coefficients = set_of[named]
    given = {} if named == "keller" else {"ns_coefficients": coefficients, "ns_steps": 3}
    optimizer, rows = trained(params, steps, **options, **given, **EXACT)
    for index, (param, start) in enumerate(zip(params, starts, strict=True)):
        truth = formula(start, [row[index] for row in rows], triples=coefficients, **options)
        actual = found(optimizer, param)
        assert actual["step"].item() == steps
        for name, value in truth.items():
            assert_near(actual[name], value, f"{tuple(param.shape)} {name}")


# The formula


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no nesterov": {"nesterov": False},
    "match_rms": {"adjust_lr_fn": "match_rms_adamw", "lr": 0.05},
    "spectral": {"adjust_lr_fn": "spectral", "lr": 0.05},
    "original": {"adjust_lr_fn": "original", "lr": 0.05},
    "no momentum": {"momentum": 0.0, "lr": 0.02},
    "decay": {"weight_decay": 0.7, "lr": 0.1, "adjust_lr_fn": "match_rms_adamw"},
    "no decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True, "lr": 0.02},
    "eps": {"eps": 3.0, "lr": 0.1},
    "coefficients": {"coefficients": "spread", "lr": 0.02},
    "weight_ema": {"weight_ema": 0.9, "lr": 0.05},
    "ema": {"filter": "ema", "alpha": 0.9, "lamb": 2.0, "lr": 0.02},
    "highpass": {"filter": "highpass", "alpha": 0.9, "lamb": 0.5, "nesterov": False},
    "ema, maximize, averaged": {
        "filter": "ema",
        "maximize": True,
        "weight_ema": 0.99,
        "lr": 0.05,
        "adjust_lr_fn": "spectral",
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_step_is_the_formula(options: dict[str, Any]) -> None:
    check(matrices(DOUBLE), **options)


def test_orthogonal_has_singular_values_near_one() -> None:
    """What the tests take for true: the polynomial of five steps leaves .68 to 1.20."""
    s = torch.linalg.svdvals(orthogonal(matrix(9, 9, dtype=DOUBLE).detach()))
    assert 0.6 < s.min() and s.max() < 1.25


def test_five_steps_of_every_set_are_its_polynomials() -> None:
    for name, known in SETS.items():
        param = matrix(6, 9, dtype=DOUBLE)
        start = param.detach().clone()
        _, rows = trained([param], 2, ns_coefficients=name, **EXACT)
        assert_near(param, formula(start, [r[0] for r in rows], triples=known.steps(5))["param"])


@pytest.mark.parametrize("method", ["auto", "standard", "symmetric", "gram"])
def test_every_method_is_the_formula(method: str) -> None:
    params = [*matrices(DOUBLE), matrix(6, 20, dtype=DOUBLE)]
    starts = clone_params(params)
    _, rows = trained(params, 3, ns_method=method, **EXACT)
    for index, (param, start) in enumerate(zip(params, starts, strict=True)):
        assert_near(param, formula(start, [row[index] for row in rows])["param"])


def test_projection_and_gate_and_window_stand_in_front() -> None:
    """Each filter, by an optimizer without one that gets what the filter makes of the gradients."""
    for kind, lamb in (("projection", 2.0), ("cosine_gate", 2.0), ("ma", 5.0)):
        ours, plain = matrix(6, 4, dtype=DOUBLE), matrix(6, 4, dtype=DOUBLE)
        rows = make_grads([ours], 9)
        options = {"filter": kind, "lamb": lamb, "alpha": 0.8, "window": 3}
        train(Muon([ours], **options, **EXACT), rows)
        # Momentum 0 and one step that does nothing leave the filtered gradient in the buffer.
        probe = Muon([matrix(6, 4, dtype=DOUBLE)], momentum=0.0, **options, **EXACT)
        seen = []
        for row in rows:
            train(probe, [row])
            (state,) = probe.state.values()
            seen.append([state["momentum_buffer"].clone()])
        train(Muon([plain], **EXACT), seen)
        assert_near(ours, plain, kind, SAME)
        assert any(not torch.equal(a[0], b[0]) for a, b in zip(seen, rows, strict=True)), kind


def test_clip_norm_scales_the_gradients_of_all_groups_together() -> None:
    params = matrices(DOUBLE)
    starts = clone_params(params)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    optimizer, clipped = Muon(groups, clip_norm=1.5, **EXACT), []
    for row in make_grads(params, STEPS):
        norm = torch.cat([grad.flatten() for grad in row]).norm()
        clipped.append([grad * min(1.0, 1.5 / (float(norm) + 1e-6)) for grad in row])
        train(optimizer, [row])
        assert_near(optimizer.grad_norm, norm.float(), "norm", 1e-6)
    for index, (param, start) in enumerate(zip(params, starts, strict=True)):
        truth = formula(start, [r[index] for r in clipped], lr=1e-3 if index < 2 else 0.02)
        # The factor is one float32 number for each step; 485-fold where singular values are small.
        assert_near(param, truth["param"], "param", 485 * 2**-24)
        assert_near(optimizer.state[param]["momentum_buffer"], truth["momentum_buffer"], "", 2**-23)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ns_dtype", [torch.float32, torch.float16, torch.float64, None], ids=str)
def test_products_in_other_dtypes_stay_near_the_formula(
    dtype: torch.dtype, ns_dtype: torch.dtype | None
) -> None:
    params = matrices(dtype)
    starts = clone_params(params)
    optimizer, rows = trained(params, 4, ns_dtype=ns_dtype, lr=0.02)
    # An update and 15 products are rounded to float32 by 2^-24 each, 485-fold at most, of singular
    # values below 1.25. Of float16 no bound so worst is useful: it may be a tenth off.
    product = 0.1 if ns_dtype == torch.float16 else 17 * 485 * 2**-24
    for index, (param, start) in enumerate(zip(params, starts, strict=True)):
        truth = formula(start, [row[index] for row in rows], lr=0.02)["param"]
        stored = 4 * torch.finfo(dtype).eps * truth.abs().max()
        step = 4 * 0.02 * ratio(*param.shape) * 1.25 * product
        assert_within(param, truth, stored + step, f"{tuple(param.shape)}")
        assert optimizer.state[param]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("ns_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_size_of_the_gradients_does_not_matter(ns_dtype: torch.dtype, scale: float) -> None:
    """float16 holds neither size, so an update must not be stored in it before its norm is 1."""
    results = []
    for factor in (1.0, scale):
        param = matrix(8, 8)
        optimizer = Muon([param], lr=0.5, weight_decay=0.0, ns_dtype=ns_dtype, eps=1e-30)
        train(optimizer, [[matrix(8, 8, seed=1).detach() * factor]])
        results.append(param.detach() - matrix(8, 8).detach())
    difference = (results[0] - results[1]).norm() / results[0].norm()
    assert difference < 0.05 and results[0].norm() > 0.5


# Polar factors


@pytest.mark.parametrize(("name", "steps"), [("cubic", 60), ("polar_express", 14)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw", "spectral"])
def test_many_steps_give_the_polar_factor(
    name: str, steps: int, shape: tuple[int, int], adjust: str | None
) -> None:
    param, grad = Parameter(torch.zeros(shape, dtype=DOUBLE)), matrix(*shape, dtype=DOUBLE)
    param.grad = grad.detach()
    Muon([param], lr=0.5, ns_coefficients=name, ns_steps=steps, adjust_lr_fn=adjust, **EXACT).step()
    left, _, right = torch.linalg.svd(grad.detach(), full_matrices=False)
    assert_near(param, -0.5 * ratio(*shape, adjust) * left @ right, name)


# Splits and shapes


def rows_of(*sizes: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda tensor: list(tensor.split(sizes))


def experts_of(*sizes: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda tensor: [part for expert in tensor for part in expert.split(sizes)]


SPLITS: dict[str, tuple[tuple[int, ...], dict[str, Any], Callable[[Tensor], list[Tensor]]]] = {
    "qkv": ((24, 10), {"row_splits": 3}, rows_of(8, 8, 8)),
    "heads": ((24, 10), {"row_splits": 6}, rows_of(*[4] * 6)),
    "gate and up": ((14, 5), {"row_splits": 2}, rows_of(7, 7)),
    "shared keys": ((24, 10), {"row_splits": (16, 4, 4)}, rows_of(16, 4, 4)),
    "shared keys, list": ((24, 10), {"row_splits": [16, 4, 4]}, rows_of(16, 4, 4)),
    "single rows": ((3, 7), {"row_splits": 3}, rows_of(1, 1, 1)),
    "experts": ((4, 6, 5), {"batch_dims": 1}, lambda t: list(t)),
    "fused experts": ((3, 8, 5), {"batch_dims": 1, "row_splits": (6, 2)}, experts_of(6, 2)),
    "layers of experts": ((2, 3, 6, 5), {"batch_dims": 2}, lambda t: list(t.flatten(0, 1))),
    "conv": ((8, 3, 2, 2), {}, lambda t: [t.flatten(1)]),
    "conv, split": ((8, 3, 2, 2), {"row_splits": 2}, lambda t: list(t.flatten(1).split(4))),
    "convs": (
        (2, 8, 3, 2, 2),
        {"batch_dims": 1, "row_splits": (6, 2)},
        lambda t: [p for conv in t for p in conv.flatten(1).split([6, 2])],
    ),
}


def apart(case: str, dtype: torch.dtype, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices of one parameter after some steps, and the same as parameters of their own."""
    shape, split, parts = SPLITS[case]
    whole = matrix(*shape, dtype=dtype)
    alone = [Parameter(part.clone()) for part in parts(whole.detach())]
    optimizer, rows = trained([whole], 4, **split, **options)
    own = Muon(alone, **options)
    train(own, [parts(row[0]) for row in rows])
    buffers = parts(optimizer.state[whole]["momentum_buffer"])
    assert_same(buffers, [own.state[param]["momentum_buffer"] for param in alone])
    return parts(whole.detach()), [param.detach() for param in alone]


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw", "spectral"])
@pytest.mark.parametrize("case", SPLITS)
def test_split_equals_separate_parameters(case: str, adjust: str | None) -> None:
    actual, expected = apart(case, DOUBLE, adjust_lr_fn=adjust, lr=0.1, **EXACT)
    for index, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_near(mine, theirs, f"block {index}", SAME)


@pytest.mark.parametrize("case", SPLITS)
def test_split_equals_separate_parameters_in_the_usual_dtypes(case: str) -> None:
    """Bit for bit, unless a ratio differs from that of the first block: then one factor is rounded
    to the bfloat16 of the update, by 2^-9 of at most 1.25 in each of 4 steps."""
    actual, expected = apart(case, torch.float32, lr=0.1)
    first = ratio(*actual[0].shape)
    for mine, theirs in zip(actual, expected, strict=True):
        own = ratio(*mine.shape)
        bound = 0.0 if own == first else 4 * 0.1 * own * 1.25 * 2**-9 + 2**-22
        assert_within(mine, theirs, bound, case)


def in_order(tensor: Tensor, order: str) -> Parameter:
    if order == "channels_last":
        return Parameter(tensor.to(memory_format=torch.channels_last))
    if order == "permuted":
        places = tuple(reversed(range(tensor.dim())))
        return Parameter(tensor.permute(places).contiguous().permute(places))
    if order == "gaps":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        view = wide[..., ::2]
        view.copy_(tensor)
        return Parameter(view)
    return Parameter(tensor.clone())


ORDERS = [
    ((9, 4), {"row_splits": (6, 3)}, "permuted"),
    ((9, 4), {}, "gaps"),
    ((6, 4, 3, 3), {"row_splits": 2}, "channels_last"),
    ((6, 4, 3, 3), {}, "permuted"),
    ((6, 4, 3, 3), {}, "gaps"),
    ((3, 6, 4), {"batch_dims": 1, "row_splits": (4, 2)}, "permuted"),
    ((3, 6, 4), {"batch_dims": 1}, "gaps"),
]


@pytest.mark.parametrize(("shape", "split", "order"), ORDERS)
def test_order_of_memory_changes_nothing(
    shape: tuple[int, ...], split: dict[str, Any], order: str
) -> None:
    start = matrix(*shape, dtype=DOUBLE).detach()
    plain, ordered = in_order(start, "contiguous"), in_order(start, order)
    assert not ordered.is_contiguous() and torch.equal(plain, ordered)
    strides = ordered.stride()
    options = {"lr": 0.1, "weight_ema": 0.9, **split, **EXACT}
    ours, rows = trained([plain], 4, **options)
    other = Muon([ordered], **options)
    train(other, rows)
    for name, value in found(ours, plain).items():
        assert_near(found(other, ordered)[name], value, name, SAME)
    assert ordered.stride() == strides


@pytest.mark.parametrize(("shape", "split", "order"), ORDERS)
def test_order_of_memory_changes_nothing_in_bfloat16(
    shape: tuple[int, ...], split: dict[str, Any], order: str
) -> None:
    start = matrix(*shape).detach()
    plain, ordered = in_order(start, "contiguous"), in_order(start, order)
    ours, rows = trained([plain], 4, lr=0.1, weight_decay=0.0, **split)
    other = Muon([ordered], lr=0.1, weight_decay=0.0, **split)
    train(other, rows)
    # Both are orthogonal within the 1 % of bfloat16, but may round differently.
    assert (ordered - plain).norm() <= 0.05 * (plain - start).norm()
    same = (ours.state[plain]["momentum_buffer"], other.state[ordered]["momentum_buffer"])
    assert torch.equal(*same)


def test_odd_and_large_matrices_are_near_the_formula_in_bfloat16() -> None:
    for shape in ((97, 33), (33, 97), (1, 64), (64, 1), (129, 65), (31, 31)):
        param = Parameter(torch.zeros(shape))
        optimizer = Muon([param], lr=1.0, weight_decay=0.0)
        grad = matrix(*shape, seed=3).detach()
        train(optimizer, [[grad]])
        truth = -ratio(*shape) * orthogonal(grad)
        assert (param - truth).norm() <= 0.03 * truth.norm(), shape


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw", "spectral"])
def test_empty_matrices_do_not_disturb_others(adjust: str | None) -> None:
    shapes = [(0, 5), (6, 4), (5, 0), (0, 0), (3, 0, 2)]
    params = [matrix(*shape, dtype=DOUBLE) for shape in shapes]
    start = params[1].detach().clone()
    _, rows = trained(params, 3, adjust_lr_fn=adjust, lr=0.1, weight_ema=0.9, **EXACT)
    truth = formula(start, [row[1] for row in rows], adjust_lr_fn=adjust, lr=0.1)
    assert_near(params[1], truth["param"])
    no_experts = matrix(0, 6, 5)
    trained([no_experts], 2, batch_dims=1, row_splits=3)


def test_zero_gradient_decays_and_moves_nothing_else() -> None:
    param = matrix(4, 6, dtype=DOUBLE)
    start = param.detach().clone()
    optimizer = Muon([param], lr=0.5, weight_decay=0.25, **EXACT)
    train(optimizer, [[torch.zeros_like(param)]])
    assert_near(param, start * 0.875, "", SAME)


# One group for all


def test_mixed_dtypes_in_one_group_equal_groups_of_their_own() -> None:
    kinds = (torch.float32, DOUBLE, torch.bfloat16, torch.float16)
    for ns_dtype in (torch.bfloat16, torch.float32, None):
        together = [matrix(6, 4, seed=i, dtype=kind) for i, kind in enumerate(kinds)]
        alone = clone_params(together)
        rows = make_grads(together, 3)
        train(Muon(together, ns_dtype=ns_dtype, weight_ema=0.9), rows)
        train(Muon([{"params": [p]} for p in alone], ns_dtype=ns_dtype, weight_ema=0.9), rows)
        assert_same([p.detach() for p in together], [p.detach() for p in alone])


def test_options_of_a_group_equal_an_optimizer_of_its_own() -> None:
    changes: list[dict[str, Any]] = [
        {"lr": 0.1}, {"weight_decay": 0.5}, {"momentum": 0.5}, {"nesterov": False},
        {"ns_coefficients": "cubic"}, {"ns_coefficients": (2.0, -1.5, 0.5)}, {"eps": 50.0},
        {"ns_steps": 2}, {"adjust_lr_fn": "match_rms_adamw"}, {"adjust_lr_fn": "spectral"},
        {"row_splits": 2}, {"row_splits": (4, 2)}, {"ns_dtype": torch.float32},
        {"filter": "ema"}, {"maximize": True}, {"weight_ema": 0.9},
    ]  # fmt: skip
    for change in changes:
        first, second = matrix(6, 4), matrix(6, 8, seed=1)
        alone = clone_params([first, second])
        rows = make_grads(alone, 3)
        grouped = Muon([{"params": [first]}, {"params": [second], **change}])
        train(grouped, rows)
        train(Muon(alone[:1]), [row[:1] for row in rows])
        train(Muon(alone[1:], **change), [row[1:] for row in rows])
        assert torch.equal(first, alone[0]) and torch.equal(second, alone[1]), change
        plain = matrix(6, 8, seed=1)
        train(Muon([plain]), [row[1:] for row in rows])
        moved = "weight_ema" not in change
        assert torch.equal(plain, second) != moved, change


# What is refused at construction


def refusals() -> list[Any]:
    whole = torch.zeros(6, 5)
    cases: list[tuple[str, type[Exception], Any, dict[str, Any]]] = [
        ("at least 2 dimensions.*got \\(6,\\).*another optimizer", ValueError, torch.zeros(6), {}),
        ("at least 2 dimensions.*got \\(\\)", ValueError, torch.zeros(()), {}),
        ("at least 3 dimensions with batch_dims=1", ValueError, whole, {"batch_dims": 1}),
        ("rows that row_splits=4 divides; got 6 rows: give", ValueError, whole, {"row_splits": 4}),
        ("rows that row_splits=\\(2, 3\\)", ValueError, whole, {"row_splits": (2, 3)}),
        ("rows that row_splits=7", ValueError, whole, {"row_splits": 7}),
        ("real and floating; got torch.complex64", TypeError, whole.to(torch.complex64), {}),
        ("real and floating; got torch.int64", TypeError, whole.long(), {}),
    ]
    for splits in (0, -1, (), (2, 0, 4), (7, -1), "ab", None, 2.0, True, (2.0, 4.0), {2: 4}):
        cases.append(("Muon: row_splits must be", ValueError, whole, {"row_splits": splits}))
    for dims in (-1, 1.0, True, None):
        cases.append(("Muon: batch_dims must be", ValueError, whole, {"batch_dims": dims}))
    for adjust in ("", "rms", 3, ["original"]):
        cases.append(("Muon: adjust_lr_fn must be", ValueError, whole, {"adjust_lr_fn": adjust}))
    numbers: list[tuple[str, type[Exception], Any]] = [
        ("lr", ValueError, -1.0), ("lr", ValueError, float("nan")), ("lr", TypeError, "1"),
        ("weight_decay", ValueError, -0.1), ("momentum", ValueError, 1.0),
        ("momentum", ValueError, -0.1), ("momentum", TypeError, None),
        ("steps", ValueError, 0), ("steps", TypeError, 2.5),
        ("coefficients", ValueError, "kellr"), ("coefficients", ValueError, (1.0, 2.0)),
        ("coefficients", ValueError, (1.0, 2.0, float("nan"))), ("coefficients", TypeError, None),
        ("method", ValueError, "fast"), ("dtype", TypeError, torch.int32),
        ("filter", ValueError, "low"), ("alpha", ValueError, 1.5), ("window", ValueError, 0),
        ("weight_ema", ValueError, 1.5), ("clip_norm", ValueError, 0.0),
    ]  # fmt: skip
    for name, error, value in numbers:
        of_op = name in ("steps", "coefficients", "method", "dtype")
        cases.append((f": {name} must", error, whole, {f"ns_{name}" if of_op else name: value}))
    for value, error in ((0.0, ValueError), (float("inf"), ValueError), ("1", TypeError)):
        cases.append((": eps must be", error, whole, {"eps": value}))
    return [pytest.param(*case, id=f"{i}") for i, case in enumerate(cases)]


@pytest.mark.parametrize(("message", "error", "tensor", "options"), refusals())
def test_what_cannot_be_stepped_is_refused_at_construction(
    message: str, error: type[Exception], tensor: Tensor, options: dict[str, Any]
) -> None:
    param = Parameter(tensor, requires_grad=tensor.is_floating_point())
    before = param.detach().clone()
    with pytest.raises(error, match=message):
        Muon([param], **options)
    assert torch.equal(param, before)
    if "clip_norm" in options:
        return
    good = matrix(4, 4)
    optimizer = Muon([good])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [param], **options})
    assert len(optimizer.param_groups) == 1 and [*optimizer.state] == [good]


@pytest.mark.parametrize("option", ["differentiable", "row_split", "betas", "amsgrad"])
def test_unknown_options_are_no_arguments(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        Muon([matrix(4, 4)], **{option: True})


def test_refused_parameters_are_called_by_name() -> None:
    named = [("blocks.0.weight", matrix(4, 4)), ("blocks.0.bias", Parameter(torch.zeros(4)))]
    with pytest.raises(ValueError, match=r"Muon: parameter 'blocks\.0\.bias' must have at least 2"):
        Muon(named)


def test_flags_of_torch_are_taken() -> None:
    results = []
    for flags in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}):
        param = matrix(6, 4)
        _ = trained([param], 2, capturable=False, ns_dtype=torch.float32, **flags)
        results.append(param.detach())
    for flagged in results[:-1]:
        assert torch.equal(flagged, results[0])
    # False runs the reference, which may round the elementwise part differently.
    assert_near(results[-1], results[0], "fused=False", 1e-4)
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        Muon([matrix(6, 4)], fused=True, foreach=True)


def test_gradients_are_only_read() -> None:
    for filter in (None, "ema"):
        params = matrices()
        optimizer = Muon(params, filter=filter, nesterov=False)
        for row in make_grads(params, 2):
            set_grads(params, row)
            before = [(param.grad, param.grad.clone(), param.grad._version) for param in params]
            optimizer.step()
            for param, (grad, value, version) in zip(params, before, strict=True):
                assert param.grad is grad and torch.equal(grad, value)
                assert grad._version == version
