"""token_mixer under the compiler, autocast and modes without gradient, and what it refuses."""

import pytest
import torch

from trm_fast import BackendError
from trm_fast.ops import token_mixer

from ..conftest import device_of, skip_unless_usable
from .test_token_mixer import drawn, grads_of

X, GATE_UP, DOWN = torch.zeros(2, 5, 3), torch.zeros(8, 5), torch.zeros(5, 4)


@pytest.fixture(params=["reference", "triton"])
def backend(request) -> str:
    skip_unless_usable(request.param)
    return request.param


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda f, **options: torch.compile(f, fullgraph=True, backend="aot_eager", **options)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_gives_the_numbers_of_the_page(compiled, dtype):
    tensors, d_out = drawn(2, 9, 16, 8, dtype=dtype, weights=torch.float32)
    found = grads_of(compiled(token_mixer), tensors, d_out)
    for ours, true in zip(found, grads_of(token_mixer, tensors, d_out), strict=True):
        # The same operators, in whose place others may stand that round once more.
        assert (ours - true).abs().max() <= 4 * torch.finfo(dtype).eps * true.abs().max()


def test_a_graph_with_free_sizes_is_compiled_once(compiled):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    page = torch.compile(token_mixer, fullgraph=True, backend=keep, dynamic=True)
    for size in ((2, 9, 20, 6), (3, 11, 23, 7)):
        tensors, _ = drawn(*size, dtype=torch.float32)
        expected = token_mixer(*tensors)
        assert (page(*tensors) - expected).abs().max() <= 2.0**-21 * expected.abs().max()
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_after_a_cast(backend, dtype):
    device = device_of(backend)
    tensors, d_out = drawn(2, 9, 16, 8, dtype=torch.float32)
    leaves = [x.to(device).requires_grad_() for x in tensors]
    d_out = d_out.to(device, dtype)
    with torch.autocast(device.type, dtype):
        out = token_mixer(*leaves, backend=backend)
        # A backward pass inside the context must not compute in another dtype either.
        grads = torch.autograd.grad(out, leaves, d_out)
    cast = [leaves[0].detach().to(dtype), *leaves[1:]]
    expected = grads_of(token_mixer, cast, d_out, backend=backend)
    assert out.dtype == dtype and all(g.dtype == torch.float32 for g in grads)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip((out, *grads), expected, strict=True))


def test_autocast_leaves_float64():
    tensors, _ = drawn(2, 9, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = token_mixer(*tensors)
    assert torch.equal(out, token_mixer(*tensors))


def test_autocast_and_the_compiler_together(compiled):
    tensors, _ = drawn(2, 9, 16, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(token_mixer)(*tensors), token_mixer(*tensors)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() <= 4 * 2.0**-7 * expected.abs().max()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient_the_bits_are_the_same(backend, mode):
    tensors, _ = drawn(2, 9, 16, 8, dtype=torch.float32)
    leaves = [x.to(device_of(backend)).requires_grad_() for x in tensors]
    with mode():
        out = token_mixer(*leaves, backend=backend)
    assert not out.requires_grad
    assert torch.equal(out, token_mixer(*leaves, backend=backend))


@pytest.mark.parametrize(
    ("x", "gate_up", "down"),
    [
        ((5, 3), (8, 5), (5, 4)),
        ((2, 5, 3), (8, 6), (6, 4)),
        ((2, 5, 3), (8, 5), (6, 4)),
        ((2, 5, 3), (7, 5), (5, 4)),
        ((2, 5, 3), (1, 8, 5), (5, 4)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(x, gate_up, down):
    with pytest.raises(ValueError) as caught:
        token_mixer(*map(torch.zeros, (x, gate_up, down)))
    assert str(caught.value) == (
        "token_mixer: x must be [batch, length, width], gate_up [2 * inner, length] and down "
        f"[length, inner]; got {x}, {gate_up} and {down}"
    )


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (TypeError, ([1.0], GATE_UP, DOWN), "x must be a tensor; got list"),
        (
            TypeError,
            (X, GATE_UP.int(), DOWN),
            "gate_up must be a real floating point tensor; got torch.int32",
        ),
        (
            TypeError,
            (X, GATE_UP, DOWN.cfloat()),
            "down must be a real floating point tensor; got torch.complex64",
        ),
        (ValueError, (X, GATE_UP, DOWN.to("meta")), "down must be on cpu as x; got meta"),
    ],
    ids=["list", "int", "complex", "meta"],
)
def test_arguments_that_are_not_taken(kind, given, message):
    with pytest.raises(kind) as caught:
        token_mixer(*given)
    assert str(caught.value) == f"token_mixer: {message}"


@pytest.mark.parametrize("backend_name", ["cpp", "cuda"])
def test_a_backend_that_there_is_not(backend_name):
    with pytest.raises(BackendError, match=f"token_mixer has no {backend_name} implementation"):
        token_mixer(X, GATE_UP, DOWN, backend=backend_name)


def test_triton_leaves_float64_to_the_reference():
    with pytest.raises(BackendError, match=r"which runs on the reference|CUDA"):
        token_mixer(X.double(), GATE_UP, DOWN, backend="triton")
