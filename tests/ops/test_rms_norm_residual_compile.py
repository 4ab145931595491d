"""rms_norm_residual under torch.compile and opcheck, and the memory that its kernels write."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from trm_fast.ops import rms_norm_residual

from ..conftest import device_of, skip_unless_usable
from .rms_norm_checks import CASES, make, run

SENTINEL = -77.0


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Every form of the op once."""
    out, h = rms_norm_residual(x, residual, weight, return_sum=True)
    return rms_norm_residual(out, h, dim=-2), h


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(compiler):
    inputs = make((2, 7, 12), -1, CASES["all"], torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend=compiler)):
        outputs = function(*leaves)
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, inputs.grads)))
    # Two norms, each with sums of up to 14 terms and few more roundings, of values up to about 20.
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2 * 20 * 24 * 2.0**-24)


def test_compiled_under_autocast_equals_eager():
    inputs = make((2, 7, 12), -1, CASES["all"], torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (function(*inputs.leaves) for function in (compiled, block))
    for result, other in zip(found, expected, strict=True):
        assert result.dtype == torch.bfloat16
        # Sums in another order may round to the other neighbour, once in each of the two norms;
        # below 4 neighbours are 2^-6 apart.
        torch.testing.assert_close(result, other, rtol=0, atol=4 * 2.0**-7)


def test_compiled_code_refuses_the_same_input_in_the_same_words():
    compiled = torch.compile(lambda x: rms_norm_residual(x, dim=3), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="rms_norm_residual: dim must be -1 or -2; got 3"):
        compiled(torch.ones(3, 4))


def test_a_third_shape_compiles_nothing_new():
    """The first shape is compiled as it is, the second as any shape."""
    counter = CompileCounter()
    compiled = torch.compile(
        lambda x, y: rms_norm_residual(x, y, dim=-2), fullgraph=True, backend=counter
    )
    for size, expected in ((5, 1), (7, 2), (9, 2), (33, 2)):
        x = make((2, size, size + 2), -2, CASES["post-norm"], torch.float32)
        compiled(x.x, x.residual)
        assert counter.frame_count == expected


def arguments(case: str, dim: int, dtype: torch.dtype) -> tuple[list, list]:
    """Arguments of both native ops, with outputs still to be written."""
    x, residual, weight, dout, dsum = make((2, 5, 6), dim, CASES[case], dtype)
    r = torch.empty((2, 5) if dim == -1 else (2, 6))
    h = None if dsum is None else torch.empty_like(x)
    forward = [x, residual, weight, dim, 1e-5, torch.empty_like(x), h, r]
    dweight = None if weight is None else torch.empty_like(weight)
    last = [r.clone().fill_(1.0), dim, weight is None, torch.empty_like(x), dweight]
    return forward, [dout, dsum, x, residual, weight, *last]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("case", ["norm alone", "weight", "all"])
def test_opcheck_passes(case, dim, dtype):
    skip_unless_usable("cpp")
    forward, backward = arguments(case, dim, dtype)
    torch.library.opcheck(torch.ops.trm_fast.rms_norm_residual_.default, forward)
    torch.library.opcheck(torch.ops.trm_fast.rms_norm_residual_backward_.default, backward)


def test_a_named_backend_compiles_after_a_first_call():
    """Before, the choice of the backend looks for a library, which cannot be traced."""
    skip_unless_usable("cpp")
    inputs = make((2, 7, 12), -1, CASES["all"], torch.float32)
    expected = run(inputs, -1, "cpp")
    compiled = torch.compile(
        lambda *given: rms_norm_residual(*given, return_sum=True, backend="cpp"),
        fullgraph=True,
        backend="aot_eager",
    )
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]
    outputs = compiled(*leaves)
    found = (*outputs, *torch.autograd.grad(outputs, leaves, inputs.grads))
    assert all(map(torch.equal, found, expected))


def kernels_of(name: str) -> tuple:
    if name == "cpp":
        ops = torch.ops.trm_fast
        return ops.rms_norm_residual_.default, ops.rms_norm_residual_backward_.default
    from trm_fast.kernels import rms_norm_residual as kernels

    return kernels.forward, kernels.backward


def within(buffers: list[Tensor], tensor: Tensor) -> Tensor:
    """An output between sentinels."""
    buffer = torch.full((tensor.numel() + 128,), SENTINEL, dtype=tensor.dtype, device=tensor.device)
    buffers.append(buffer)
    return buffer[64:-64].view(tensor.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", [(3, 7, 37), (1, 259, 5), (2, 3, 517)], ids=str)
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_only_outputs_are_written_and_all_of_them(name, shape, dim, dtype):
    skip_unless_usable(name)
    inputs = make(shape, dim, CASES["all"], dtype, device_of(name))
    before = inputs.to(dtype, copy=True)
    x, residual, weight, dout, dsum = inputs
    forward, backward = kernels_of(name)
    buffers: list[Tensor] = []
    out, h, dx = (within(buffers, x) for _ in range(3))
    means = shape[:-1] if dim == -1 else (*shape[:-2], shape[-1])
    r = within(buffers, torch.empty(means, device=x.device))
    dweight = within(buffers, weight)
    forward(x, residual, weight, dim, 1e-5, out, h, r)
    backward(dout, dsum, h, None, weight, r, dim, False, dx, dweight)
    for buffer in buffers:
        assert (buffer[:64] == SENTINEL).all() and (buffer[-64:] == SENTINEL).all()
        assert (buffer[64:-64] != SENTINEL).all()
    for tensor, other in zip(inputs, before, strict=True):
        assert torch.equal(tensor.to(dtype), other)
