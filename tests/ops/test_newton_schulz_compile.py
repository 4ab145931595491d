"""newton_schulz under torch.library.opcheck, torch.compile and fake tensors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from trm_fast.ops import newton_schulz, newton_schulz_

from .newton_schulz_checks import KELLER, make

OP = torch.ops.trm_fast.newton_schulz.default
OP_ = torch.ops.trm_fast.newton_schulz_.default
FLAT = [number for triple in KELLER for number in triple]
COMPILERS = ("eager", "aot_eager")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    return [make(shape).to(dtype) for shape in ((5, 9), (9, 5), (5, 9))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 3, 4, 4), (0, 3), (2, 0, 3)], ids=str)
def test_opcheck_passes(shape, dtype):
    torch.library.opcheck(OP, (make(shape).to(dtype), FLAT, "auto", None, 1e-7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_passes_for_views_and_another_arithmetic(dtype):
    x = make((5, 6)).to(dtype).mT[::2]
    torch.library.opcheck(OP, (x, FLAT, "gram", torch.bfloat16, 1e-7))


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_passes_in_place(dtype, needs_grad):
    matrices = [x.clone().requires_grad_(needs_grad) for x in inputs(dtype)]
    torch.library.opcheck(OP_, (matrices, FLAT, "auto", None, 1e-7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ops_of_the_dispatcher_equal_the_functions(dtype):
    x = inputs(dtype)[0]
    expected = newton_schulz(x, 5, "keller")
    assert torch.equal(OP(x, FLAT, "auto", None, 1e-7), expected)
    OP_([x := x.clone()], FLAT, "auto", None, 1e-7)
    assert torch.equal(x, expected)


def test_fake_tensors_are_accepted():
    with FakeTensorMode():
        x = torch.empty(2, 5, 3, dtype=torch.bfloat16).mT
        found = OP(x, FLAT, "auto", None, 1e-7)
        assert found.shape == (2, 3, 5) and found.is_contiguous() and found.dtype == x.dtype
        OP_([x[0]], FLAT, "auto", None, 1e-7)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_compiled_equals_eager(compiler, dtype, needs_grad):
    @torch.compile(fullgraph=True, backend=compiler)
    def both(x, matrices):
        before = matrices[0] * 1
        newton_schulz_(matrices, 4, "you", "gram")
        return newton_schulz(x, 4, KELLER[:4], dtype=torch.bfloat16), before, matrices[0] * 1

    x = make((2, 7, 4)).to(dtype).requires_grad_(needs_grad)
    compiled, eager = ([y.clone() for y in inputs(dtype)] for _ in range(2))
    found, before, after = both(x, compiled)
    newton_schulz_(eager, 4, "you", "gram")
    assert torch.equal(found, newton_schulz(x, 4, KELLER[:4], dtype=torch.bfloat16))
    assert torch.equal(before, inputs(dtype)[0]) and torch.equal(after, eager[0])
    assert not found.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))


def test_compiled_code_refuses_the_same_input_in_the_same_words():
    @torch.compile(fullgraph=True, backend="eager")
    def bad(x):
        newton_schulz_([x])

    with pytest.raises(ValueError, match=r"newton_schulz_: matrices\[0\] must be \[n, m\]"):
        bad(torch.ones(3))


def test_a_third_shape_compiles_nothing_new():
    """The first shape is compiled as it is, the second as any shape."""
    counter = CompileCounter()
    compiled = torch.compile(lambda x: newton_schulz(x), fullgraph=True, backend=counter)
    for size, expected in ((5, 1), (7, 2), (9, 2), (33, 2)):
        x = make((size, size + 2)).bfloat16()
        assert torch.equal(compiled(x), newton_schulz(x))
        assert counter.frame_count == expected
