"""vector_latent_update against its formula in float64: results and gradients."""

import pytest
import torch

from trm_fast import _dispatch
from trm_fast.ops import vector_latent_update

from ..conftest import device_of
from .vector_checks import NAMES, assert_close, gradients, make, tolerance, truth

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
STATES = ("y", "z")
SCALES = (1.0, 0.6, -0.4)


def check(backend, batch, hidden, dtype, **options):
    """Results and gradients of one call against the truth of the same, rounded inputs."""
    rounds = options["T"] * (options["n"] if options.get("y_every_step") else 1)
    updates = options["T"] * options["n"] + rounds
    leaves, grads = make(batch, hidden, dtype)
    # A gradient is zero, not absent, where the formula has no path: states before other levels.
    expected = truth(leaves, **options)
    true = [*expected, *gradients(expected, leaves, [g.double() for g in grads])]
    moved = [leaf.detach().to(device_of(backend)).requires_grad_() for leaf in leaves]
    out = vector_latent_update(*moved[:3], moved[3:], backend=backend, **options)
    assert all(state.dtype == dtype and state.shape == (batch, hidden) for state in out)
    found = [*out, *gradients(out, moved, [g.to(out[0].device) for g in grads])]
    # Gradients of leaves are rounded to their dtype, as the truth is through `double`.
    found = [value.detach().cpu() for value in found]
    assert_close(found, true, tolerance(dtype, updates), [*STATES, *NAMES])


SIZES = [(1, 32), (7, 32), (33, 32)]


@pytest.mark.interpreted(every=[True])
@pytest.mark.parametrize("every", [False, True], ids=["per_level", "every_step"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_results_and_gradients(backend, size, every):
    if backend == "cuda":
        pytest.skip("vector_latent_update has no cuda implementation")
    check(backend, *size, F32, n=2, T=2, y_every_step=every, step_scales=SCALES[:2])


LARGER = [(7, 128), (33, 256), (256, 128), (256, 256), (5, 96), (3, 512)]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("size", LARGER, ids=str)
def test_larger_sizes(cpp, size, dtype):
    check("cpp", *size, dtype, n=2, T=2)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("every", [False, True], ids=["per_level", "every_step"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("grad_cycles", [1, 2, 3])
def test_levels_with_gradient(cpp, grad_cycles, dtype, every, recompute):
    options = {"n": 3, "T": 3, "y_every_step": every, "step_scales": SCALES}
    check("cpp", 9, 64, dtype, grad_cycles=grad_cycles, recompute=recompute, **options)


@pytest.mark.parametrize("grad_cycles", [1, 2, 3])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_levels_with_gradient_elsewhere(backend, grad_cycles):
    if reason := _dispatch.unusable(backend, device_of(backend).type):
        pytest.skip(f"{backend}: {reason}")
    check(backend, 5, 32, F32, n=2, T=3, grad_cycles=grad_cycles, step_scales=SCALES)


@pytest.mark.parametrize("batch", [1, 2, 511, 512, 513, 1030])
def test_batches_around_the_chunks_that_share_weight_products(cpp, batch):
    for recompute in (False, True):
        check("cpp", batch, 32, F32, n=2, T=2, grad_cycles=2, recompute=recompute)
        check("cpp", batch, 32, BF16, n=1, T=1, recompute=recompute)


def test_one_step(backend):
    if backend == "cuda":
        pytest.skip("vector_latent_update has no cuda implementation")
    check(backend, 7, 32, F32, n=1, T=1)


@pytest.mark.parametrize("hidden", [5, 33, 128])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, torch.float16], ids=str)
def test_the_reference_takes_any_size(hidden, dtype):
    check("reference", 6, hidden, dtype, n=2, T=2)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("size", [6.0, 1e4])
def test_gelu_far_from_zero(backend, size):
    """Arguments up to 6 standard deviations and beyond, where gelu is 0 or its argument."""
    if reason := _dispatch.unusable(backend, device_of(backend).type):
        pytest.skip(f"{backend}: {reason}")
    leaves, _ = make(9, 32, F32)
    with torch.no_grad():
        for index in (3, 9):
            leaves[index] *= size
        expected = truth(leaves, n=1, T=1)
        moved = [leaf.to(device_of(backend)) for leaf in leaves]
        found = vector_latent_update(*moved[:3], moved[3:], n=1, T=1, backend=backend)
    assert_close([state.cpu() for state in found], expected, tolerance(F32, 2), STATES)


def test_gradcheck_of_the_reference():
    leaves, _ = make(2, 3, F64)
    for every in (False, True):

        def run(*given, every=every):
            return vector_latent_update(
                *given[:3], given[3:], n=2, T=2, grad_cycles=2, y_every_step=every,
                step_scales=(1.0, 0.5), backend="reference",
            )  # fmt: skip

        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", F64), ("cpp", F32), ("cpp", BF16)], ids=str
)
def test_recomputed_gradients_are_the_same_bits(backend, dtype, every):
    if reason := _dispatch.unusable(backend, "cpu"):
        pytest.skip(f"{backend}: {reason}")
    results = []
    for recompute in (False, True):
        leaves, grads = make(19, 64, dtype)
        out = vector_latent_update(
            *leaves[:3], leaves[3:], n=3, T=2, grad_cycles=2, y_every_step=every,
            recompute=recompute, backend=backend,
        )  # fmt: skip
        results.append([*out, *gradients(out, leaves, grads)])
    for name, kept, recomputed in zip([*STATES, *NAMES], *results, strict=True):
        assert torch.equal(kept, recomputed), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_same_bits_on_every_run_and_without_gradients(cpp, dtype):
    leaves, grads = make(70, 64, dtype)
    runs = []
    for _ in range(3):
        out = vector_latent_update(*leaves[:3], leaves[3:], n=3, T=2)
        runs.append([*out, *gradients(out, leaves, grads)])
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            plain = vector_latent_update(*leaves[:3], leaves[3:], n=3, T=2)
        assert all(map(torch.equal, plain, runs[0][:2]))
        assert not any(state.requires_grad for state in plain)


def test_the_number_of_threads_changes_no_bit_of_the_states(cpp):
    leaves, _ = make(70, 64, F32)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            with torch.no_grad():
                found.append(vector_latent_update(*leaves[:3], leaves[3:], n=3, T=2))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_threads_may_change_before_the_backward_pass(cpp):
    leaves, grads = make(70, 64, F32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        out = vector_latent_update(*leaves[:3], leaves[3:], n=3, T=2, recompute=False)
        torch.set_num_threads(1)
        found = gradients(out, leaves, grads)
    finally:
        torch.set_num_threads(threads)
    expected = truth(leaves, n=3, T=2)
    true = gradients(expected, leaves, [g.double() for g in grads])
    assert_close(found, true, tolerance(F32, 8), NAMES)


@pytest.fixture
def cpp():
    if reason := _dispatch.unusable("cpp", "cpu"):
        pytest.skip(f"cpp: {reason}")
