"""stablemax_cross_entropy under torch.library.opcheck, torch.compile and fake tensors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from trm_fast._dispatch import unusable
from trm_fast.ops import stablemax_cross_entropy

from .stablemax_checks import IGNORED, KINDS, draw

FORWARD = torch.ops.trm_fast.stablemax_cross_entropy_forward.default
BACKWARD = torch.ops.trm_fast.stablemax_cross_entropy_backward.default
needs_cpp = pytest.mark.skipif(
    unusable("cpp", "cpu") is not None, reason="needs the C++ library, which implements the ops"
)


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@needs_cpp
@pytest.mark.parametrize("stablemax", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 9, 11), (1, 3, 40), (0, 3, 5), (2, 0, 5)], ids=str)
def test_opcheck_passes(shape, dtype, stablemax):
    logits, labels = draw(shape)
    arguments = (logits.to(dtype), labels, IGNORED, stablemax)
    torch.library.opcheck(FORWARD, arguments)
    _, predictions, _, valid, _, others, _ = FORWARD(*arguments)
    grad = torch.ones(shape[0])
    saved = (arguments[0], labels, predictions, others, valid)
    torch.library.opcheck(BACKWARD, (grad, *saved, IGNORED, stablemax))


@needs_cpp
def test_the_native_op_refuses_tokens_that_are_apart():
    logits, labels = draw((2, 9, 11))
    with pytest.raises(RuntimeError, match="tokens must lie side by side"):
        FORWARD(logits.transpose(0, 1), labels.t().contiguous(), IGNORED, True)


def loss_and_gradient(function, logits, labels):
    x = logits.clone().requires_grad_()
    found = function(x, labels)
    return [*found, torch.autograd.grad(found.loss.sum(), x)[0]]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_the_reference(compiler, kind, dtype):
    @torch.compile(fullgraph=True, backend=compiler)
    def compiled(x, y):
        return stablemax_cross_entropy(x, y, kind=kind)

    logits, labels = draw((3, 9, 11))
    logits = logits.to(dtype)

    def reference(x, y):
        return stablemax_cross_entropy(x, y, kind=kind, backend="reference")

    found = loss_and_gradient(compiled, logits, labels)
    expected = loss_and_gradient(reference, logits, labels)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_cpp
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_named_backend_runs_inside_compiled_code(compiler):
    @torch.compile(fullgraph=True, backend=compiler)
    def compiled(x, y):
        return stablemax_cross_entropy(x, y, backend="cpp")

    logits, labels = draw((3, 9, 11))

    def eager(x, y):
        return stablemax_cross_entropy(x, y, backend="cpp")

    expected = loss_and_gradient(eager, logits, labels)
    found = loss_and_gradient(compiled, logits, labels)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_code_makes_the_loss_of_a_wrong_label_nan():
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x, y):
        return stablemax_cross_entropy(x, y)

    logits, labels = draw((2, 9, 11))
    labels[1, 4] = 11
    found = loss_and_gradient(compiled, logits, labels)
    assert found[0].isnan().tolist() == [False, True]
    assert found[-1][0].isfinite().all() and found[-1][1, 4].isnan().any()


def test_a_third_shape_compiles_nothing_new():
    """The first shape is compiled as it is, the second as any shape."""
    counter = CompileCounter()
    compiled = torch.compile(stablemax_cross_entropy, fullgraph=True, backend=counter)
    for size, expected in ((5, 1), (7, 2), (9, 2), (33, 2)):
        logits, labels = draw((size, size + 1, 11))
        found = compiled(logits, labels)
        true = stablemax_cross_entropy(logits, labels, backend="reference")
        assert torch.equal(found.loss, true.loss)
        assert counter.frame_count == expected


@needs_cpp
def test_fake_tensors_are_accepted():
    with FakeTensorMode():
        logits = torch.empty(2, 5, 7, dtype=torch.bfloat16)
        labels = torch.empty(2, 5, dtype=torch.int64)
        found = FORWARD(logits, labels, IGNORED, True)
        assert [tuple(value.shape) for value in found] == [
            (2,), (2, 5), (2,), (2,), (2,), (2, 5), (),
        ]  # fmt: skip
        saved = (logits, labels, found[1], found[5], found[3])
        gradient = BACKWARD(found[0], *saved, IGNORED, True)
        assert gradient.shape == logits.shape and gradient.dtype == torch.bfloat16
