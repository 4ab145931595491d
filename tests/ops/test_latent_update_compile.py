"""latent_update under torch.compile and opcheck, and the memory that its kernels write."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from trm_fast.ops import latent_update

from . import latent_update_checks as checks
from .latent_update_checks import (
    Case,
    Inputs,
    assert_equal,
    make,
    names_of,
    run,
    skip_unless_runs,
)

BOTH = (Case(n=1), Case("attention", heads=2, n=1))
SENTINEL = -77.0


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_run(inputs: Inputs, case: Case, backend: str | None, compiler: str, **options) -> dict:
    def call(x: Tensor, y: Tensor, z: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return latent_update(
            x, y, z, weights, case.network, **case.counts, backend=backend, **options
        )

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs.tensors]
    out = compiled(*leaves)
    wanted = leaves if case.grad_cycles == case.T else [leaves[0], *leaves[3:]]
    grads = torch.autograd.grad(out, wanted, (inputs.dy, inputs.dz))
    states = [state.detach() for state in out]
    return dict(zip(names_of(case), (*states, *grads), strict=True))


@pytest.mark.parametrize(
    ("backend", "compiler", "recompute"),
    [
        (None, "eager", True),
        ("cpp", "aot_eager", True),
        ("cpp", "aot_eager", False),
        ("reference", "aot_eager", True),
        ("reference", "eager", False),
    ],
)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_compiled_equals_eager(case, backend, compiler, recompute):
    skip_unless_runs(backend or "reference")
    inputs = make(case)
    expected = run(inputs, case, backend)
    found = compiled_run(inputs, case, backend, compiler, recompute=recompute)
    for name, tensor in found.items():
        # Operators may be composed of others, which sum in another order.
        torch.testing.assert_close(tensor, expected[name], rtol=2e-4, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(Case(n=1, T=1), None, marks=pytest.mark.long),
        (Case("attention", n=1, T=1), None),
        pytest.param(Case("attention", n=1, T=1), "reference", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_inductor_keeps_to_the_formula(case, backend, monkeypatch):
    skip_unless_runs(backend or "reference")
    monkeypatch.setattr(
        checks, "run", lambda inputs, case, backend: compiled_run(inputs, case, backend, "inductor")
    )
    checks.assert_as_good_as_plain(make(case), case, backend)


def test_the_first_call_may_be_a_compiled_one():
    """In a new process, where nothing has been chosen or looked for."""
    skip_unless_runs("cpp")
    code = """
import torch
from trm_fast.ops import Network, latent_update
x, weights = torch.ones(2, 3, 32), [torch.ones(s) for s in ((96, 32), (32, 32), (64, 32), (32, 32))]
network = Network("attention", heads=2)
def call(x, backend):
    return latent_update(x, x, x, weights, network, n=1, T=2, backend=backend)
for backend in (None, "cpp", "reference"):
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(x, backend)
    assert torch.allclose(found[0], call(x, backend)[0], atol=1e-5)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env=environment)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_compiled_without_gradients_equals_eager(case, backend):
    skip_unless_runs(backend)
    inputs = make(case)

    def call(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return latent_update(x, y, z, inputs.weights, case.network, **case.counts, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            for found, expected in zip(compiled(*inputs[:3]), call(*inputs[:3]), strict=True):
                torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_compiled_with_one_tensor_in_two_places_equals_eager(case, backend):
    """As the weights of tied layers, and states that begin alike."""
    skip_unless_runs(backend)
    x, _, _, weights, dy, dz = make(case._replace(grad_cycles=case.T))
    leaves = [tensor.requires_grad_() for tensor in (x, *weights)]

    def call(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return latent_update(x, x, x, weights * 2, case.network, n=1, T=1, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, call):
        out = function(*leaves)
        results.append((*out, *torch.autograd.grad(out, leaves, (dy, dz))))
    torch.testing.assert_close(*results, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_compiled_cpp_has_the_bits_of_eager(case):
    skip_unless_runs("cpp")
    for dtype in (torch.float32, torch.bfloat16):
        skip_unless_runs("cpp", dtype)
        inputs = make(case, dtype)
        assert_equal(compiled_run(inputs, case, "cpp", "aot_eager"), run(inputs, case, "cpp"))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_compiled_under_autocast_equals_eager(case, backend):
    skip_unless_runs(backend, torch.bfloat16)
    inputs = make(case)

    def call(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return latent_update(x, y, z, inputs.weights, case.network, **case.counts, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(*inputs[:3]), call(*inputs[:3])
    for state, other in zip(found, expected, strict=True):
        assert state.dtype == torch.bfloat16
        # Roundings that turn out the other way are enlarged by the recursion as all others are.
        off = float((state.double() - other.double()).norm()) / float(other.double().norm())
        assert off <= (0.0 if backend == "cpp" else 2.0**-4)


@pytest.mark.parametrize("backend", [None, "cpp", "reference"])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_another_batch_compiles_at_most_once_more(case, backend):
    """The first size is compiled as it is, the second as any size."""
    skip_unless_runs(backend or "cpp")
    counter = CompileCounter()
    inputs = make(case)

    def call(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return latent_update(x, y, z, inputs.weights, case.network, **case.counts, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for batch, count in ((3, 1), (5, 2), (8, 2)):
        given = make(case._replace(batch=batch))
        found, expected = compiled(*given[:3]), call(*given[:3])
        assert counter.frame_count == count
        for state, other in zip(found, expected, strict=True):
            torch.testing.assert_close(state, other, rtol=2e-5, atol=2e-5)


def test_compiled_code_refuses_the_same_input_in_the_same_words():
    inputs = make(BOTH[0])
    compiled = torch.compile(
        lambda x: latent_update(x, x, x, inputs.weights, BOTH[0].network, n=0),
        fullgraph=True,
        backend="eager",
    )
    with pytest.raises(Exception, match="latent_update: n and T must be >= 1; got n=0, T=3"):
        compiled(inputs.x)


def arguments(case: Case, dtype: torch.dtype, keep: bool) -> tuple[list, list]:
    """Arguments of both native ops, where the forward pass has been run for the second."""
    page = importlib.import_module("trm_fast.ops.latent_update")
    inputs, network = make(case, dtype), case.network
    heads = network.heads if case.mixer == "attention" else 0
    layers = case.grad_cycles * (case.n + 1) * case.layers
    x, rope = inputs.x, page._rope(inputs.x, network)
    size = page._kept_bytes(x, page.layers_of(inputs.weights)[0], heads) if keep else 0
    states = x.new_zeros(2 + layers, *case.shape)
    scales = torch.zeros(layers, *case.shape[:2])
    kept = torch.zeros(layers, case.batch, size, dtype=torch.uint8)
    saved = [states, scales, kept]
    numbers = [heads, network.eps, case.n]
    forward = [x, inputs.y.clone(), inputs.z.clone(), inputs.weights, rope, *saved, *numbers]
    forward += [case.T, case.grad_cycles]
    torch.ops.trm_fast.latent_update_forward_(*forward)
    grads = [torch.zeros_like(x), inputs.dy.clone(), inputs.dz.clone()]
    sums = [torch.zeros_like(weight) for weight in inputs.weights]
    backward = [x, inputs.weights, rope, *saved, *grads, sums, *numbers, case.grad_cycles]
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_opcheck_passes(case, keep, dtype):
    skip_unless_runs("cpp", dtype)
    forward, backward = arguments(case._replace(layers=1), dtype, keep)
    torch.library.opcheck(torch.ops.trm_fast.latent_update_forward_.default, forward)
    torch.library.opcheck(torch.ops.trm_fast.latent_update_backward_.default, backward)


def within(tensor: Tensor, buffers: list[Tensor]) -> Tensor:
    """The same values between sentinels, in lines of 64 bytes of their own."""
    border = 256 // tensor.element_size()
    full = SENTINEL if tensor.dtype != torch.uint8 else 77
    buffer = torch.full((tensor.numel() + 2 * border,), full, dtype=tensor.dtype)
    buffers.append(buffer)
    inner = buffer[border : border + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(length=7, layers=2, n=1, T=2),
        Case(batch=1, length=97, mix=2, n=1, T=1),
        Case("attention", length=7, width=96, heads=2, n=1, T=2),
        Case("attention", batch=1, length=97, heads=2, n=1, T=1),
    ],
    ids=str,
)
def test_only_outputs_are_written_and_all_of_them(case, keep, dtype):
    skip_unless_runs("cpp", dtype)
    buffers: list[Tensor] = []

    def guarded(value):
        if isinstance(value, list):
            return [within(tensor, buffers) for tensor in value]
        return within(value, buffers) if isinstance(value, Tensor) else value

    forward, backward = arguments(case, dtype, keep)
    inputs = make(case, dtype)
    expected = run(inputs, case, "cpp", recompute=not keep)
    given = [guarded(value) for value in forward]
    given[1].copy_(inputs.y), given[2].copy_(inputs.z)
    given[5].fill_(float("nan")), given[6].fill_(float("nan"))
    torch.ops.trm_fast.latent_update_forward_(*given)
    assert torch.equal(given[1], expected["y"]) and torch.equal(given[2], expected["z"])
    assert torch.equal(given[5], forward[5]) and torch.equal(given[6], forward[6])
    assert torch.equal(given[0], forward[0]) and all(map(torch.equal, given[3], forward[3]))

    given = [guarded(value) for value in backward]
    given[6].fill_(float("nan"))
    torch.ops.trm_fast.latent_update_backward_(*given)
    assert torch.equal(given[6], expected["x.grad"])
    for i, tensor in enumerate(given[9]):
        assert torch.equal(tensor, expected[f"weights[{i}].grad"])
    for before, after in zip(backward[:6], given[:6], strict=True):
        pairs = zip(before, after, strict=True) if isinstance(before, list) else [(before, after)]
        assert all(torch.equal(a, b) for a, b in pairs)
    for buffer in buffers:
        border = 256 // buffer.element_size()
        full = SENTINEL if buffer.dtype != torch.uint8 else 77
        assert (buffer[:border] == full).all() and (buffer[-border:] == full).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_nothing_depends_on_what_memory_held(case, dtype):
    """Scratch memory is new in each call; between two, other values are left in it."""
    skip_unless_runs("cpp", dtype)
    case = case._replace(length=9, batch=4)
    inputs = make(case, dtype)
    torch.utils.deterministic.fill_uninitialized_memory = False
    expected = run(inputs, case, "cpp")
    wild = inputs.map(lambda t: torch.full_like(t, float("nan")))
    for other in (case._replace(length=31, batch=7), case):
        run(make(other, dtype, seed=1).map(lambda t: t * float("inf")), other, "cpp")
        run(wild, case, "cpp")
        assert_equal(run(inputs, case, "cpp"), expected)
