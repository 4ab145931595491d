"""swiglu against its formula in float64, on every backend; under autocast and torch.compile."""

import re

import pytest
import torch

import trm_fast
from trm_fast.ops import OPS, swiglu

from ..conftest import device_of, skip_unless_usable
from .swiglu_checks import NAMES, assert_right, make, run, truth

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Shape of x, inner width, output width: below, at and above the tiles of the kernels.
SIZES = (
    ((1, 1), 1, 1), ((7,), 5, 3), ((2, 3, 16), 32, 16), ((129, 33), 65, 20), ((63, 64), 64, 64),
    ((2, 65, 97), 33, 97),
)  # fmt: skip


@pytest.fixture(scope="module", params=["reference", "triton"])
def backend(request) -> str:
    """Each backend of this op."""
    skip_unless_usable(request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "inner", "width"), SIZES, ids=str)
def test_output_and_gradients_are_those_of_the_formula(backend, device, shape, inner, width, dtype):
    assert_right(*make(shape, inner, width, dtype, device), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bias_may_be_left_out(backend, device, dtype):
    inputs, dout = make((5, 12), 9, 7, dtype, device)
    assert_right(inputs[:3], dout, backend)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_is_as_good_as_plain_torch(backend, device, dtype):
    """Error at most twice that of plain torch, three times for gradients; an ulp is always free."""
    inputs, dout = make((70, 48), 96, 40, dtype, device)
    ours, theirs = run(inputs, dout, backend), run(inputs, dout, "reference")
    for name, (true, _) in truth(inputs, dout, dtype).items():
        error, bound = (float((t[name].double() - true).abs().max()) for t in (ours, theirs))
        ulp = torch.finfo(dtype).eps * float(true.abs().max())
        assert error <= max(ulp, (2 if name == "out" else 3) * bound), name


def test_the_reference_has_the_gradient_of_itself():
    inputs, _ = make((2, 3, 4), 5, 3, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(swiglu, leaves)


def test_float64_is_exact():
    """The bounds of float32 are 2^29 times as wide."""
    skip_unless_usable("reference")
    inputs, dout = make((2, 5, 9), 7, 4, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(inputs, dout, None)
    for name, (true, bound) in truth(inputs, dout, torch.float32).items():
        assert found[name].dtype == torch.float64
        assert bool(((found[name] - true).abs() <= bound * 2.0**-29).all()), name


@pytest.mark.parametrize(
    ("shape", "inner", "width"), [((0, 4), 3, 4), ((2, 0), 3, 4), ((3, 4), 0, 5), ((3, 4), 2, 0)]
)
def test_empty_sizes_give_what_empty_sums_are(backend, device, shape, inner, width):
    inputs, dout = make(shape, inner, width, torch.float32, device)
    found = run(inputs, dout, backend)
    for name, (true, _) in truth(inputs, dout, torch.float32).items():
        # No sum has more than one term, or all terms are zero.
        torch.testing.assert_close(found[name].double(), true, rtol=4 * 2.0**-24, atol=0)


VIEWS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "rows apart": lambda x: torch.cat((x, x), -1)[..., : x.size(-1)],
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(backend, device, view):
    inputs, dout = make((2, 9, 8), 6, 10, torch.float32, device)
    views = [VIEWS[view](tensor) if tensor.dim() > 1 else tensor for tensor in inputs]
    assert_right(views, VIEWS[view](dout), backend)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_result_is_the_same(backend, device, mode):
    inputs, dout = make((2, 9, 16), 16, 10, torch.float32, device)
    expected = run(inputs, dout, backend)["out"]
    with mode():
        inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        found = swiglu(*inputs, backend=backend)
    assert torch.equal(found, expected) and not found.requires_grad


@pytest.mark.parametrize("needed", range(4))
def test_only_gradients_that_are_needed_are_given(backend, device, needed):
    inputs, dout = make((2, 9, 16), 16, 10, torch.float32, device)
    expected = run(inputs, dout, backend)[NAMES[1 + needed]]
    given = [tensor.clone() for tensor in inputs]
    given[needed].requires_grad_()
    swiglu(*given, backend=backend).backward(dout)
    assert torch.equal(given[needed].grad, expected)
    assert all(given[i].grad is None for i in range(4) if i != needed)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_weights_are_cast_to_the_dtype_of_x(backend, device, dtype):
    inputs, dout = make((2, 9, 16), 16, 10, dtype, device)
    expected = run(inputs, dout, backend)
    found = run([inputs[0], *(tensor.float() for tensor in inputs[1:])], dout, backend)
    for name in NAMES:
        assert found[name].dtype == (dtype if name in ("out", "x.grad") else torch.float32)
        assert torch.equal(found[name], expected[name].to(found[name].dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_autocast_decides_the_dtype(backend, device, dtype):
    inputs, dout = make((2, 9, 16), 16, 10, dtype, device)
    expected = run(inputs, dout, backend)
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    with torch.autocast(device.type, dtype):
        out = swiglu(*leaves, backend=backend)
    grads = torch.autograd.grad(out, leaves, dout)
    assert out.dtype == dtype
    for name, result in zip(NAMES, (out, *grads), strict=True):
        assert torch.equal(result.to(dtype), expected[name])


def test_a_backward_under_autocast_keeps_the_dtype_of_the_forward():
    skip_unless_usable("triton")
    device = device_of("triton")
    inputs, dout = make((2, 9, 16), 16, 10, torch.float32, device)
    expected = run(inputs, dout, "triton")
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = swiglu(*leaves, backend="triton")
    with torch.autocast(device.type, torch.bfloat16):
        grads = torch.autograd.grad(out, leaves, dout)
    for name, result in zip(NAMES[1:], grads, strict=True):
        assert torch.equal(result, expected[name])


def test_nothing_but_x_is_kept_for_backward():
    skip_unless_usable("triton")
    inputs, _ = make((5, 8), 6, 7, torch.float32, device_of("triton"))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape), lambda t: t):
        swiglu(*leaves, backend="triton")
    assert sorted(map(tuple, shapes)) == sorted([(5, 8), (12, 8), (7, 6)])  # x and the weights


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(compiler):
    torch._dynamo.reset()
    inputs, dout = make((2, 9, 16), 16, 10, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = torch.compile(swiglu, fullgraph=True, backend=compiler)(*leaves)
    found = dict(zip(NAMES, (out, *torch.autograd.grad(out, leaves, dout)), strict=True))
    for name, (true, bound) in truth(inputs, dout, torch.float32).items():
        assert bool(((found[name].double() - true).abs() <= bound).all()), name


def test_compiled_under_autocast_equals_eager():
    torch._dynamo.reset()
    inputs, _ = make((2, 9, 16), 16, 10, torch.float32)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(*inputs)
        assert found.dtype == torch.bfloat16 and torch.equal(found, swiglu(*inputs))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(), (7,), (33, 32), (0, 3), (2, 9, 4)], ids=str)
def test_the_examples_of_the_op_keep_their_tolerance(backend, device, shape, dtype):
    """What ``trm-fast doctor`` runs on the machines of users."""
    if OPS["swiglu"].reason(backend, device.type, frozenset({dtype})):
        pytest.skip("triton: float64 runs on the reference")
    for example in OPS["swiglu"].examples(shape, dtype, device).values():
        errors = example.errors(backend)
        assert errors.keys() == example.tolerance.keys()
        assert all(errors[key] <= example.tolerance[key] for key in errors), errors


X, GATE_UP, DOWN, BIAS = torch.ones(2, 4), torch.ones(6, 4), torch.ones(5, 3), torch.ones(5)
WRONG = {
    "no tensor": (TypeError, ([1.0], GATE_UP, DOWN), "x must be a tensor; got list"),
    "integers": (
        TypeError, (X.long(), GATE_UP, DOWN),
        "x must be a real floating point tensor; got torch.int64",
    ),
    "sparse": (
        TypeError, (X, GATE_UP.to_sparse(), DOWN),
        "gate_up must be a dense tensor; got torch.sparse_coo",
    ),
    "elsewhere": (
        ValueError, (X, GATE_UP, DOWN.to("meta")), "down must be on cpu as x; got meta",
    ),
    "scalar": (ValueError, (X[0, 0], GATE_UP, DOWN), "x must be [..., D_in]; got shape ()"),
    "another depth": (
        ValueError, (X, GATE_UP[:, :3], DOWN), "gate_up must be [2 I, 4]; got shape (6, 3)",
    ),
    "odd rows": (
        ValueError, (X, GATE_UP[:5], DOWN), "gate_up must be [2 I, 4]; got shape (5, 4)",
    ),
    "a batch of weights": (
        ValueError, (X, GATE_UP[None], DOWN), "gate_up must be [2 I, 4]; got shape (1, 6, 4)",
    ),
    "another inner width": (
        ValueError, (X, GATE_UP, DOWN.T), "down must be [D_out, 3]; got shape (3, 5)",
    ),
    "another output": (
        ValueError, (X, GATE_UP, DOWN, BIAS[:4]), "bias must be [5]; got shape (4,)",
    ),
    "complex bias": (
        TypeError, (X, GATE_UP, DOWN, BIAS.cfloat()),
        "bias must be a real floating point tensor; got torch.complex64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_in_these_words(name):
    error, args, message = WRONG[name]
    with pytest.raises(error, match=f"^{re.escape('swiglu: ' + message)}$"):
        swiglu(*args)


@pytest.mark.parametrize(("named", "dtype", "reason"), [
    ("cuda", torch.float32, "swiglu has no cuda implementation"),
    ("triton", torch.float64, "adds up in float32; got float64, which runs on the reference"),
])  # fmt: skip
def test_a_named_backend_that_cannot_run_is_an_error(named, dtype, reason):
    if named == "triton":
        skip_unless_usable(named)
    message = f"swiglu: the named backend {named!r} cannot run: {reason}"
    device = device_of("triton")
    with pytest.raises(trm_fast.BackendError, match=f"^{re.escape(message)}$"):
        swiglu(*(t.to(device, dtype) for t in (X, GATE_UP, DOWN)), backend=named)
