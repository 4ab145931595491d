"""How vector_latent_update is called: memory, dtypes, autocast, the compiler, fakes and errors."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from trm_fast import BackendError, _dispatch
from trm_fast.ops import vector_latent_update

from ..conftest import device_of
from .vector_checks import NAMES, assert_close, gradients, make, tolerance, truth

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
COUNTS = {"n": 2, "T": 2}


@pytest.fixture(params=["reference", "cpp", "triton"])
def any_backend(request) -> str:
    if reason := _dispatch.unusable(request.param, device_of(request.param).type):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def cpp():
    if reason := _dispatch.unusable("cpp", "cpu"):
        pytest.skip(f"cpp: {reason}")


def moved(leaves, backend):
    return [leaf.detach().to(device_of(backend)).requires_grad_() for leaf in leaves]


def call(leaves, **options):
    return vector_latent_update(*leaves[:3], leaves[3:], **(COUNTS | options))


def test_views_are_read_as_they_are(any_backend):
    leaves, grads = make(5, 32, F32)
    plain = moved(leaves, any_backend)
    grads = [g.to(plain[0].device) for g in grads]
    views = []
    for leaf in plain:
        wide = torch.zeros(*leaf.shape[:-1], 2 * leaf.shape[-1], device=leaf.device)
        wide[..., ::2] = leaf.detach()
        views.append(wide[..., ::2].detach().requires_grad_())
    assert not any(view.is_contiguous() for view in views)
    results = []
    for given in (plain, views):
        out = call(given, backend=any_backend)
        odd = [g.repeat_interleave(2, 1)[:, ::2] if given is views else g for g in grads]
        results.append([t.detach().cpu() for t in (*out, *gradients(out, given, odd))])
    # Products of the reference may take another path, in another order of sums.
    assert_close(results[1], results[0], tolerance(F32, 6), ["y", "z", *NAMES])


def test_negated_views_are_read_as_they_are(any_backend):
    leaves, _ = make(5, 32, F32)
    plain = [leaf.detach().to(device_of(any_backend)) for leaf in leaves]
    negated = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in plain]
    assert all(view.is_neg() for view in negated)
    found, expected = call(negated, backend=any_backend), call(plain, backend=any_backend)
    assert all(map(torch.equal, found, expected))


def test_inputs_stay_as_they_are(any_backend):
    leaves, grads = make(5, 32, F32)
    given = moved(leaves, any_backend)
    grads = [g.to(given[0].device) for g in grads]
    before = [t.detach().clone() for t in (*given, *grads)]
    gradients(call(given, backend=any_backend, grad_cycles=2), given, grads)
    assert all(map(torch.equal, (*given, *grads), before))


def test_weights_of_other_dtypes_are_cast(any_backend):
    leaves, grads = make(5, 32, F64)
    given = moved(leaves, any_backend)
    states = [state.detach().float().requires_grad_() for state in given[:3]]
    out = call([*states, *given[3:]], backend=any_backend)
    found = gradients(out, given[3:], [g.to(out[0]) for g in grads])
    assert all(state.dtype == F32 for state in out) and all(g.dtype == F64 for g in found)
    expected = truth(leaves, **COUNTS)
    true = gradients(expected, leaves[3:], grads)
    # States and weights of float64 are rounded once more, which counts as one more update.
    assert_close([g.cpu() for g in found], true, tolerance(F32, 7), NAMES[3:])


def test_only_what_needs_gradients_gets_them(any_backend):
    leaves, _ = make(5, 32, F32)
    given = [leaf.detach() for leaf in moved(leaves, any_backend)]
    assert not any(state.requires_grad for state in call(given, backend=any_backend))
    assert not any(
        state.requires_grad
        for state in call(moved(leaves, any_backend), grad_cycles=0, backend=any_backend)
    )
    for index in (0, 4, 14):
        one = [t.clone() for t in given]
        one[index].requires_grad_()
        out = call(one, backend=any_backend)
        (alone,) = torch.autograd.grad(out[0].sum(), [one[index]])
        every = moved(leaves, any_backend)
        (among,) = torch.autograd.grad(call(every, backend=any_backend)[0].sum(), [every[index]])
        assert torch.equal(alone, among)


def test_states_before_the_last_levels_get_no_gradient(any_backend):
    given = moved(make(5, 32, F32)[0], any_backend)
    for grad_cycles, has_one in ((1, False), (2, True)):
        out = call(given, grad_cycles=grad_cycles, backend=any_backend)
        found = torch.autograd.grad(out[1].sum(), given[1:3], allow_unused=True)
        assert [g is not None for g in found] == [has_one, has_one]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_an_empty_batch(any_backend, needs_grad):
    given = [leaf.requires_grad_(needs_grad) for leaf in moved(make(0, 32, F32)[0], any_backend)]
    out = call(given, backend=any_backend, grad_cycles=2)
    assert all(state.shape == (0, 32) for state in out)
    if needs_grad:
        found = torch.autograd.grad((out[0].sum() + out[1].sum()), given)
        assert all(not g.any() for g in found)


def test_a_nan_stays_in_its_row(any_backend):
    given = [leaf.detach() for leaf in moved(make(5, 32, F32)[0], any_backend)]
    clean = call(given, backend=any_backend)
    given[2][3, 7] = torch.nan
    for found, expected in zip(call(given, backend=any_backend), clean, strict=True):
        assert found[3].isnan().all()
        rest = [0, 1, 2, 4]
        assert torch.equal(found[rest], expected[rest])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_autocast_computes_in_its_dtype(backend, cpp):
    leaves, grads = make(5, 32, F32)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(leaves, backend=backend)
        found = gradients(out, leaves, [g.to(BF16) for g in grads])
    assert all(state.dtype == BF16 for state in out) and all(g.dtype == F32 for g in found)
    by_hand = [leaf.detach().to(BF16).requires_grad_() for leaf in leaves[:3]]
    outside = call([*by_hand, *leaves[3:]], backend=backend)
    assert all(map(torch.equal, out, outside))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_compiled_equals_eager(compiler, dtype):
    torch._dynamo.reset()
    leaves, grads = make(5, 32, dtype)
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    out, expected = compiled(leaves), call(leaves)
    assert all(map(torch.equal, out, expected))
    assert all(map(torch.equal, *(gradients(o, leaves, grads) for o in (out, expected))))
    torch._dynamo.reset()


def native_arguments(batch, hidden, dtype, kept):
    leaves, grads = make(batch, hidden, dtype)
    x, y, z, *weights = [leaf.detach() for leaf in leaves]
    weights = [weight.float() for weight in weights]
    rows, updates = batch + batch % 2, 3
    states = torch.zeros(updates + 1, rows, hidden, dtype=dtype)
    inside = torch.zeros(3 * updates if kept else 0, rows, hidden, dtype=dtype)
    norms = torch.zeros(updates if kept else 0, rows)
    counts = ([1.0, 0.5], 2, 1)
    forward = (x, y, z, weights, *counts, states, inside, norms)
    d = [torch.empty_like(x), *grads]
    backward = (x, weights, *counts, states, inside, norms, *d, [w.clone() for w in weights])
    return forward, backward


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck_passes(cpp, dtype, kept):
    forward, backward = native_arguments(5, 32, dtype, kept)
    ops = torch.ops.trm_fast
    torch.library.opcheck(ops.vector_latent_update_forward_.default, forward)
    ops.vector_latent_update_forward_(*forward)
    torch.library.opcheck(ops.vector_latent_update_backward_.default, backward)


def test_fake_tensors_are_accepted(cpp):
    with FakeTensorMode():
        leaves = [torch.empty(leaf.shape).requires_grad_() for leaf in make(5, 32, F32)[0]]
        out = call(leaves)
        assert all(state.shape == (5, 32) for state in out)
        assert all(g.shape == t.shape for g, t in zip(
            torch.autograd.grad(out[0].sum(), leaves[3:]), leaves[3:], strict=True
        ))  # fmt: skip


def test_a_hidden_size_out_of_reach_runs_on_the_reference():
    leaves, _ = make(2, 48, F32)
    expected = call(leaves, backend="reference")
    assert all(map(torch.equal, call(leaves), expected))


@pytest.mark.parametrize(
    ("backend", "hidden", "dtype", "reason"),
    [
        ("cpp", 48, F32, "needs hidden in multiples of 32 up to 512; got 48"),
        ("cpp", 544, F32, "needs hidden in multiples of 32 up to 512; got 544"),
        ("cpp", 32, F64, "runs float32 and bfloat16; got torch.float64"),
        ("triton", 96, F32, "needs hidden to be a power of two from 16 to 128; got 96"),
        ("triton", 32, F64, "computes in float32; got float64, which runs on the reference"),
    ],
)
def test_a_named_backend_says_why_it_cannot_run(backend, hidden, dtype, reason):
    if why := _dispatch.unusable(backend, device_of(backend).type):
        pytest.skip(f"{backend}: {why}")
    leaves = moved(make(2, hidden, dtype)[0], backend)
    with pytest.raises(BackendError) as error:
        call(leaves, backend=backend)
    named = f"vector_latent_update: the named backend {backend!r} cannot run: "
    assert str(error.value) == named + reason


def changed(index, value):
    """Arguments with one of x, y, z and the weights replaced."""

    def change(leaves):
        leaves[index] = value(leaves[index]) if callable(value) else value

    return change


TENSOR_ERRORS = [
    (changed(0, 1), TypeError, "x must be a tensor; got int"),
    (changed(1, None), TypeError, "y must be a tensor; got NoneType"),
    (changed(2, lambda t: t.int()), TypeError,
     "z must be a real floating point tensor; got torch.int32"),
    (changed(1, lambda t: t.to("meta")), ValueError, "y must be on cpu as x; got meta"),
    (changed(1, lambda t: t[:1]), ValueError,
     "x, y and z must be [batch, hidden] alike, hidden >= 1; got y (1, 32) and x (5, 32)"),
    (changed(0, lambda t: t[0]), ValueError,
     "x, y and z must be [batch, hidden] alike, hidden >= 1; got x (32,) and x (32,)"),
    (changed(3, 0.5), TypeError, "weights[0] must be a tensor; got float"),
    (changed(4, lambda t: t.to(torch.complex64)), TypeError,
     "weights[1] must be a real floating point tensor; got torch.complex64"),
    (changed(9, lambda t: t.to("meta")), ValueError, "weights[6] must be on cpu as x; got meta"),
    (changed(3, lambda t: t[:, :64]), ValueError, "weights[0] must be (32, 96); got (32, 64)"),
    (changed(9, lambda t: t.T), ValueError, "weights[6] must be (32, 64); got (64, 32)"),
    (changed(14, lambda t: t[:1]), ValueError, "weights[11] must be (32,); got (1,)"),
    (lambda leaves: leaves.pop(), ValueError, "weights must be 12 tensors; got 11"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind", "message"), TENSOR_ERRORS, ids=[row[2][:60] for row in TENSOR_ERRORS]
)
def test_tensors_that_do_not_fit(change, kind, message):
    leaves = [leaf.detach() for leaf in make(5, 32, F32)[0]]
    change(leaves)
    with pytest.raises(kind) as error:
        call(leaves)
    assert str(error.value) == f"vector_latent_update: {message}"


OPTION_ERRORS = [
    ({"n": 0}, ValueError, "n and T must be >= 1; got n=0, T=2"),
    ({"T": 0}, ValueError, "n and T must be >= 1; got n=2, T=0"),
    ({"n": True}, TypeError, "n must be a whole number; got True"),
    ({"T": 2.0}, TypeError, "T must be a whole number; got 2.0"),
    ({"grad_cycles": None}, TypeError, "grad_cycles must be a whole number; got None"),
    ({"grad_cycles": 3}, ValueError, "grad_cycles must be 0 to T=2; got 3"),
    ({"grad_cycles": -1}, ValueError, "grad_cycles must be 0 to T=2; got -1"),
    ({"step_scales": [1.0]}, ValueError, "step_scales must be T=2 numbers; got 1"),
    ({"step_scales": [1.0, "1"]}, TypeError, "step_scales must be numbers; got '1'"),
]


@pytest.mark.parametrize(("options", "kind", "message"), OPTION_ERRORS, ids=lambda v: str(v)[:60])
def test_options_that_do_not_fit(options, kind, message):
    with pytest.raises(kind) as error:
        call(make(5, 32, F32)[0], **options)
    assert str(error.value) == f"vector_latent_update: {message}"
