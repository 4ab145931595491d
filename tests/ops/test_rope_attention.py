"""The numbers of rope_attention: every backend against the formula in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from trm_fast._dispatch import OPS
from trm_fast.ops import rope_attention

from ..conftest import NO_GPU, device_of, skip_unless_usable
from .rope_attention_checks import (
    assert_near_torch,
    drawn,
    grads_of,
    qkv,
    ragged,
    seen,
    true_grads,
    truth,
)

EPS64 = torch.finfo(torch.float64).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = [
    {"causal": causal, "window": window, "padding": padding}
    for causal, window, padding in itertools.product((False, True), (None, 1, 4), (None, True))
]


@pytest.fixture(params=["reference", "triton"])
def backend(request) -> str:
    skip_unless_usable(request.param)
    return request.param


def skip_unless_exact(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and NO_GPU:
        pytest.skip("triton: the interpreter cuts bfloat16 off, where a GPU rounds")


def options_of(mask: dict, batch: int, length: int) -> dict:
    return mask | {"padding": ragged(batch, length) if mask["padding"] else None}


def on(device, options: dict) -> dict:
    return {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}


def run(backend: str, tensors: list[Tensor], d_out: Tensor, **options) -> list[Tensor]:
    device = device_of(backend)
    moved = [x.to(device) for x in tensors]
    given = on(device, options) | {"backend": backend}
    return grads_of(rope_attention, moved, d_out.to(device), **given)


def close(found: list[Tensor], expected: list[Tensor], eps: float, steps: int) -> None:
    """Each of ``steps`` sums and products rounds once, and logits of up to 8 enlarge that."""
    for ours, true in zip(found, expected, strict=True):
        assert (ours - true).abs().max() <= 8 * steps * eps * max(1.0, float(true.abs().max()))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_the_reference_is_the_formula(mask, heads, kv_heads):
    tensors, d_out = qkv(3, 9, heads, 6, kv_heads)
    options = options_of(mask, 3, 9)
    found = run("reference", tensors, d_out, **options)
    close(found, true_grads(tensors, d_out, **options), EPS64, 9 + 6)


@pytest.mark.parametrize("options", [{"theta": None}, {"theta": 50.0}, {"scale": 0.7}], ids=str)
def test_base_and_scale_are_those_of_the_formula(backend, options):
    dtype = torch.float64 if backend == "reference" else torch.float32
    tensors, d_out = qkv(2, 7, 2, 6, dtype=dtype)
    expected = true_grads(tensors, d_out, **options)
    close(run(backend, tensors, d_out, **options), expected, torch.finfo(dtype).eps, 7 + 6)
    without = true_grads(tensors, d_out)
    assert (without[0] - expected[0]).abs().max() > 0.01


# The tensors of the official model are short; one is longer than any block, and narrow.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 7, 31, 33, 81, 97, 916])
def test_the_error_is_that_of_torch(backend, length, dtype):
    skip_unless_exact(backend, dtype)
    heads, dim = (1, 4) if length == 916 else (2, 16)
    tensors, d_out = qkv(1, length, heads, dim, dtype=dtype)
    assert_near_torch(run(backend, tensors, d_out), tensors, d_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [2, 10, 32, 40, 64, 66])
def test_every_width_of_a_head_is_right(backend, dim, dtype):
    tensors, d_out = qkv(2, 18, 2, dim, 1, dtype=dtype)
    assert_near_torch(run(backend, tensors, d_out), tensors, d_out)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_every_mask_is_right(backend, mask):
    assert_mask_is_right(backend, mask, 9)


@pytest.mark.parametrize("mask", MASKS[1::5], ids=str)
def test_every_kind_of_mask_is_right_where_one_program_cannot_hold_the_keys(backend, mask):
    assert_mask_is_right(backend, mask, 131)


def assert_mask_is_right(backend: str, mask: dict, length: int) -> None:
    tensors, d_out = qkv(3, length, 4, 8, 2, dtype=torch.float16)
    options = options_of(mask, 3, length)
    expected = true_grads(tensors, d_out, **options)
    for ours, true in zip(run(backend, tensors, d_out, **options), expected, strict=True):
        # q', k', P, d_S and the result are rounded, and logits of up to 4 enlarge the first two.
        assert (ours - true).abs().max() <= 8 * 2.0**-11 * max(1.0, float(true.abs().max()))


def test_odd_heads_need_no_rotation(backend):
    tensors, d_out = qkv(2, 20, 2, 5, dtype=torch.float32)
    options = {"theta": None, "causal": True}
    assert_near_torch(run(backend, tensors, d_out, **options), tensors, d_out, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_pass_gradcheck(causal):
    tensors, _ = qkv(2, 5, 2, 4, 1)
    padding = ragged(2, 5)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(
        lambda q, k, v: rope_attention(q, k, v, causal=causal, window=3, padding=padding), leaves
    )


def blind(length: int) -> Tensor:
    """One sample without any token, and one whose first queries see none if causal."""
    padding = torch.zeros(3, length, dtype=torch.bool)
    padding[1, 2:] = True
    padding[2] = True
    return padding


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [6, 131])
def test_a_query_that_sees_nothing_is_zero(backend, causal, length):
    tensors, d_out = qkv(3, length, 2, 8, dtype=torch.float32)
    options = {"padding": blind(length), "causal": causal}
    out, d_q, d_k, d_v = run(backend, tensors, d_out, **options)
    nothing = ~seen(3, length, **options).any(-1)
    assert nothing.sum() == length + 2 * causal
    assert not out[nothing].any() and not d_q[nothing].any()
    assert not d_k[0].any() and not d_v[0].any()
    close([out, d_q, d_k, d_v], true_grads(tensors, d_out, **options), 2.0**-23, length + 8)


@pytest.mark.parametrize("length", [6, 131])
def test_padded_keys_are_not_read(backend, length):
    tensors, d_out = qkv(2, length, 2, 8, dtype=torch.float32)
    padding = ragged(2, length)
    other = [x.clone() for x in tensors]
    for x in other[1:]:
        x[~padding] = 1e4
    found, again = (run(backend, t, d_out, padding=padding) for t in (tensors, other))
    assert torch.equal(found[0], again[0])
    assert not found[2][~padding].any() and not found[3][~padding].any()


def test_a_window_of_one_gives_the_values(backend):
    (q, k, v), _ = qkv(2, 9, 2, 8, dtype=torch.float32, device=device_of(backend))
    assert torch.equal(rope_attention(q, k, v, window=1, backend=backend), v.flatten(2))


def test_a_window_as_long_as_the_sequence_is_none(backend):
    (q, k, v), _ = qkv(2, 9, 2, 8, dtype=torch.float32, device=device_of(backend))
    whole = rope_attention(q, k, v, backend=backend)
    assert torch.equal(rope_attention(q, k, v, window=9, backend=backend), whole)
    assert not torch.equal(rope_attention(q, k, v, window=8, backend=backend), whole)


@pytest.mark.parametrize("length", [12, 140])
def test_views_of_a_fused_projection_give_the_same_bits(backend, length):
    fused = drawn(2, length, 3 * 16, dtype=torch.float16, device=device_of(backend))
    before = fused.clone().requires_grad_()
    views = [x.unflatten(-1, (2, 8)) for x in before.chunk(3, -1)]
    leaves = [x.detach().clone().contiguous().requires_grad_() for x in views]
    out = rope_attention(*views, backend=backend)
    copies = rope_attention(*leaves, backend=backend)
    assert torch.equal(out, copies) and out.is_contiguous()
    d_out = drawn(2, length, 16, seed=1, dtype=torch.float16, device=fused.device)
    (d_fused,) = torch.autograd.grad(out, before, d_out)
    grads = torch.autograd.grad(copies, leaves, d_out)
    assert torch.equal(d_fused, torch.cat([g.flatten(2) for g in grads], -1))
    assert torch.equal(before, fused)


@pytest.mark.parametrize("length", [12, 140])
def test_elements_that_are_not_side_by_side_are_copied(backend, length):
    (q, k, v), d_out = qkv(2, length, 2, 8, dtype=torch.float32)
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert turned[0].stride(3) != 1
    expected = run(backend, [q, k, v], d_out)
    # Torch may take its sums in another order.
    close(run(backend, turned, d_out), expected, 2.0**-23, length + 8)


@pytest.mark.parametrize("length", [12, 140])
@pytest.mark.parametrize("mask", MASKS[:: len(MASKS) - 1], ids=str)
def test_the_largest_logit_is_the_largest_visible_one(backend, mask, length):
    device = device_of(backend)
    (q, k, v), _ = qkv(3, length, 4, 8, 2, dtype=torch.float32)
    options = options_of(mask, 3, length)
    expected = truth(*(x.double() for x in (q, k, v)), **options)[1]
    given = [x.to(device).requires_grad_() for x in (q, k, v)]
    options = on(device, options) | {"backend": backend}
    out, largest = rope_attention(*given, return_max_logit=True, **options)
    assert torch.equal(out, rope_attention(*given, **options))
    assert largest.dtype == torch.float32 and not largest.requires_grad
    # 8 products and a rotation of each factor, below 4 * 4 each, and a square root of 8.
    assert (largest.cpu() - expected).abs().max() <= 12 * 2.0**-23 * 16 * 8**0.5


def test_the_largest_logit_of_float64_is_float64():
    (q, k, v), _ = qkv(2, 5, 2, 4)
    _, largest = rope_attention(q, k, v, return_max_logit=True)
    assert (largest - truth(q, k, v)[1]).abs().max() <= 100 * EPS64


def test_the_largest_logit_of_a_head_that_sees_nothing_is_minus_infinity(backend):
    (q, k, v), _ = qkv(2, 5, 2, 4, dtype=torch.float32, device=device_of(backend))
    padding = torch.zeros(2, 5, dtype=torch.bool, device=q.device)
    options = {"padding": padding, "return_max_logit": True, "backend": backend}
    assert rope_attention(q, k, v, **options)[1].tolist() == [-torch.inf] * 2


@pytest.mark.parametrize("length", [40, 140])
def test_a_logit_that_is_nan_shows(backend, length):
    """In a head dimension that the first block of queries does not hold."""
    (q, k, v), _ = qkv(2, length, 3, 8, dtype=torch.float16, device=device_of(backend))
    q[1, 35, 1, 2] = torch.nan
    _, largest = rope_attention(q, k, v, return_max_logit=True, backend=backend)
    assert largest.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_gives_nothing(backend, shape, masked):
    tensors, _ = qkv(*shape, 4, 8, 2, dtype=torch.float32, device=device_of(backend))
    leaves = [x.requires_grad_() for x in tensors]
    padding = torch.ones(shape, dtype=torch.bool, device=leaves[0].device) if masked else None
    options = {"padding": padding, "causal": masked, "backend": backend}
    out, largest = rope_attention(*leaves, return_max_logit=True, **options)
    assert out.shape == (*shape, 32) and largest.tolist() == [-torch.inf] * 4
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in grads] == [x.shape for x in leaves]


def test_the_same_call_gives_the_same_bits(backend):
    tensors, d_out = qkv(2, 33, 4, 8, 2, dtype=torch.float16)
    one, other = (run(backend, tensors, d_out, causal=True) for _ in range(2))
    assert all(map(torch.equal, one, other))


@pytest.mark.interpreted(dtype=DTYPES[:1])
@pytest.mark.parametrize("shape", [(), (7,), (33, 32), (5, 100), (2, 9, 2, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_examples_are_within_their_bounds(backend, shape, dtype):
    examples = OPS["rope_attention"].examples(shape, dtype, device_of(backend))
    for example in examples.values():
        errors = example.errors(backend)
        assert {*errors} == {"out", "max_logit", "d_q", "d_k", "d_v"}
        assert all(errors[name] <= example.tolerance[name] for name in errors)
