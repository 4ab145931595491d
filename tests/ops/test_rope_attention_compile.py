"""rope_attention under the compiler, autocast and modes without gradient, and its tables."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from trm_fast.ops import _attention_tables, rope_attention
from trm_fast.ops._attention_tables import rotary_tables, visible_pairs

from ..conftest import device_of, skip_unless_usable
from .rope_attention_checks import grads_of, qkv, ragged

CPU = torch.device("cpu")
OPTIONS = [{}, {"causal": True}, {"causal": True, "window": 3, "padding": ragged(2, 9)}]


@pytest.fixture(params=["reference", "triton"])
def backend(request) -> str:
    skip_unless_usable(request.param)
    return request.param


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda f, **options: torch.compile(f, fullgraph=True, backend="aot_eager", **options)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_graph_gives_the_numbers_of_the_page(compiled, options):
    tensors, d_out = qkv(2, 9, 4, 8, 2, dtype=torch.float32)
    found = grads_of(compiled(rope_attention), tensors, d_out, return_max_logit=True, **options)
    expected = grads_of(rope_attention, tensors, d_out, **options)
    for ours, true in zip(found, expected, strict=True):
        # The same operators, but for the order in which a sum of 9 + 8 terms is taken.
        assert (ours - true).abs().max() <= 17 * 2.0**-23 * true.abs().max()


def test_a_graph_with_a_free_length_is_compiled_once(compiled):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    page = torch.compile(rope_attention, fullgraph=True, backend=keep, dynamic=True)
    for length in (9, 12, 17):
        (q, k, v), _ = qkv(2, length, 2, 8, dtype=torch.float32)
        expected = rope_attention(q, k, v, causal=True)
        bound = 25 * 2.0**-23 * expected.abs().max()  # as above
        assert (page(q, k, v, causal=True) - expected).abs().max() <= bound
    assert len(graphs) == 1


def test_the_operator_of_the_tables_is_well_behaved():
    arguments = (7, 6, 10000.0, torch.float32, CPU)
    torch.library.opcheck(torch.ops.trm_fast.rotary_tables.default, arguments)
    one, other = (torch.ops.trm_fast.rotary_tables(*arguments) for _ in range(2))
    one.zero_()
    assert torch.equal(other, rotary_tables(*arguments)) and other.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_after_a_cast(backend, dtype):
    device = device_of(backend)
    tensors, d_out = qkv(2, 9, 2, 8, dtype=torch.float32, device=device)
    leaves = [x.requires_grad_() for x in tensors]
    with torch.autocast(device.type, dtype):
        out = rope_attention(*leaves, backend=backend)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out, leaves, d_out.to(dtype))
    cast = [x.detach().to(dtype) for x in leaves]
    expected = grads_of(rope_attention, cast, d_out.to(dtype), backend=backend)
    assert all(g.dtype == torch.float32 for g in grads)
    for ours, true in zip((out, *grads), expected, strict=True):
        assert torch.equal(ours.detach().double().cpu(), true)


def test_autocast_joins_dtypes_and_leaves_float64():
    (q, k, v), _ = qkv(2, 9, 2, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rope_attention(q.bfloat16(), k, v)
        wide = rope_attention(q.double(), k.double(), v.double())
    assert torch.equal(mixed, rope_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    assert torch.equal(wide, rope_attention(q.double(), k.double(), v.double()))


def test_autocast_and_the_compiler_together(compiled):
    tensors, _ = qkv(2, 9, 2, 8, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(rope_attention)(*leaves)
        expected = rope_attention(*leaves)
    assert out.dtype == torch.bfloat16
    # One rounding of the output may fall the other way.
    assert (out - expected).abs().max() <= 2.0**-7 * expected.abs().max()
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient_the_bits_are_the_same(backend, mode):
    tensors, _ = qkv(2, 9, 2, 8, dtype=torch.float32, device=device_of(backend))
    leaves = [x.requires_grad_() for x in tensors]
    with mode():
        out = rope_attention(*leaves, causal=True, backend=backend)
    expected = rope_attention(*leaves, causal=True, backend=backend)
    assert not out.requires_grad and torch.equal(out, expected)


def test_a_table_made_in_inference_mode_serves_training(backend):
    length = 23  # of no other test
    (q, k, v), _ = qkv(2, length, 2, 8, dtype=torch.float32, device=device_of(backend))
    options = {"causal": True, "window": 5, "backend": backend}
    with torch.inference_mode():
        rope_attention(q, k, v, **options)
    out = rope_attention(q.requires_grad_(), k, v, **options)
    assert torch.autograd.grad(out.sum(), q)[0].any()


def test_tables_are_made_once():
    assert rotary_tables(9, 8, 1e4, torch.float32, CPU) is rotary_tables(
        9, 8, 1e4, torch.float32, CPU
    )
    assert visible_pairs(9, 3, True, CPU) is visible_pairs(9, 3, True, CPU)


def test_tables_are_rounded_once_from_float64():
    """At the last of 916 positions an angle in float32 would be off by 3e-5."""
    cos, sin = rotary_tables(916, 8, 1e4, torch.float32, CPU)
    angle = torch.arange(916).double()[:, None] * 1e4 ** (-torch.arange(0, 8, 2).double() / 8)
    assert torch.equal(cos[:, 0], torch.cat((angle.cos(), angle.cos()), 1).float())
    assert torch.equal(sin[:, 0], torch.cat((-angle.sin(), angle.sin()), 1).float())


def test_a_table_of_a_trace_is_not_kept(monkeypatch):
    monkeypatch.setattr(_attention_tables, "_kept", {})
    with FakeTensorMode():
        rotary_tables(9, 8, 1e4, torch.float32, CPU)
    assert not _attention_tables._kept
    assert type(rotary_tables(9, 8, 1e4, torch.float32, CPU)) is torch.Tensor
    assert len(_attention_tables._kept) == 1


def test_different_windows_have_masks_of_their_own():
    (q, k, v), _ = qkv(1, 9, 1, 4, dtype=torch.float32)
    near, far = (rope_attention(q, k, v, window=w) for w in (2, 5))
    assert (near - far).abs().max() > 0.01
