"""Gradients of latent_update: whose they are, in which dtype, and what is kept for them."""

import pytest
import torch
from torch import Tensor

from trm_fast.ops import latent_update

from ..conftest import device_of
from .latent_update_checks import (
    Case,
    assert_as_good_as_plain,
    assert_equal,
    errors,
    make,
    names_of,
    run,
    skip_unless_runs,
    truth,
)

BOTH = (Case(layers=2), Case("attention", heads=2, layers=2))
ON_CPU = ("reference", "cpp")
EVERY = (*ON_CPU, "triton")
TINY = (
    Case(batch=2, length=3, width=4, inner=3, mix=2),
    Case("attention", batch=2, length=3, width=4, inner=3, heads=2),
)


def update(case: Case, given, backend: str | None, **options) -> tuple[Tensor, Tensor]:
    x, y, z, *weights = given
    options = {**case.counts, **options}
    return latent_update(x, y, z, weights, case.network, backend=backend, **options)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("case", TINY, ids=str)
def test_the_reference_has_the_gradient_of_itself(case, recompute):
    case = case._replace(T=2, grad_cycles=2, n=1)
    leaves = [tensor.requires_grad_() for tensor in make(case, torch.float64).tensors]

    def call(*given):
        return update(case, given, "reference", recompute=recompute)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("grad_cycles", [1, 2])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_what_is_computed_again_has_the_same_bits(case, grad_cycles, backend, dtype):
    if backend == "cpp" and dtype == torch.float64:
        backend = None  # the reference, which the next line then looks for
    skip_unless_runs(backend or "reference", dtype)
    case = case._replace(length=13, grad_cycles=grad_cycles)
    inputs = make(case, dtype)
    assert_equal(
        run(inputs, case, backend, recompute=True), run(inputs, case, backend, recompute=False)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_kept_insides_are_right_for_many_samples(case, dtype):
    skip_unless_runs("cpp", dtype)
    case = case._replace(batch=25, length=97, n=1, T=1, layers=1)
    assert_as_good_as_plain(make(case, dtype), case, "cpp", recompute=False)


@pytest.mark.parametrize("counts", [(1, 1, 0), (1, 3, 1), (6, 1, 1), (2, 3, 2), (3, 2, 2)])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("mixer", ["mlp_t", "attention"])
def test_any_number_of_calls(mixer, backend, counts):
    skip_unless_runs(backend)
    case = Case(mixer, length=9, n=counts[0], T=counts[1], grad_cycles=counts[2])
    assert_as_good_as_plain(make(case), case, backend)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_states_get_no_gradient_through_cycles_without(case, backend):
    """Whether they require one changes nothing."""
    skip_unless_runs(backend)
    case = case._replace(batch=1, n=1, T=2, grad_cycles=1)
    inputs = make(case, device=device_of(backend))
    leaves = [tensor.clone().requires_grad_() for tensor in inputs.tensors]
    expected = run(inputs, case, backend)
    y, z = update(case, leaves, backend)
    torch.autograd.backward((y, z), (inputs.dy, inputs.dz))
    assert leaves[1].grad is None and leaves[2].grad is None
    named = [leaves[0].grad, *(leaf.grad for leaf in leaves[3:])]
    assert_equal(dict(zip(names_of(case), (y, z, *named), strict=True)), expected)


@pytest.mark.parametrize("grad_cycles", [0, 1])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_states_alone_have_nothing_to_go_back_to(case, backend, grad_cycles):
    skip_unless_runs(backend)
    case = case._replace(batch=1, n=1, T=2, grad_cycles=grad_cycles)
    inputs = make(case, device=device_of(backend))
    given = [tensor.requires_grad_(i in (1, 2)) for i, tensor in enumerate(inputs.tensors)]
    found = update(case, given, backend)
    assert not any(state.requires_grad for state in found)
    if grad_cycles == 0:
        found = update(case, [tensor.requires_grad_() for tensor in inputs.tensors], backend)
        assert not any(state.requires_grad for state in found)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_only_gradients_that_are_needed_are_given(case, backend):
    skip_unless_runs(backend)
    case = case._replace(batch=1, n=1, T=1)
    inputs = make(case, device=device_of(backend))
    expected = list(run(inputs, case, backend).values())[2:]
    for needed in (1, 3) if backend == "triton" else (0, 1, 2, 3, 4, 5, 10):
        given = [tensor.clone() for tensor in inputs.tensors]
        given[needed].requires_grad_()
        torch.autograd.backward(update(case, given, backend), (inputs.dy, inputs.dz))
        assert all((t.grad is None) == (i != needed) for i, t in enumerate(given))
        # Where only one side of a product is needed, torch may take it in another order.
        true = expected[needed].double()
        limit = 0.0 if backend == "cpp" else 2.0**-14
        assert errors(given[needed].grad, true)[1] <= limit, needed


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_one_of_the_states_may_be_left_unused(case, backend, which):
    skip_unless_runs(backend)
    case = case._replace(T=1)
    inputs = make(case)
    zeros = torch.zeros_like(inputs.dy)
    name, other = ("dy", "dz") if which == 0 else ("dz", "dy")
    expected = run(inputs._replace(**{other: zeros}), case, backend)
    leaves = [tensor.requires_grad_() for tensor in inputs.tensors]
    out = update(case, leaves, backend)[which]
    grads = torch.autograd.grad(out, leaves, getattr(inputs, name))
    for label, grad in zip(names_of(case)[2:], grads, strict=True):
        assert errors(grad, expected[label].double())[1] <= 2.0**-14, label


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_gradients_of_any_strides_are_taken_and_left_alone(case, backend):
    skip_unless_runs(backend)
    case = case._replace(T=1)
    inputs = make(case)
    expected = run(inputs, case, backend)
    strange = inputs._replace(
        dy=inputs.dy.mT.contiguous().mT, dz=torch._neg_view(-inputs.dz).detach()
    )
    before = strange.dy.clone(), strange.dz.clone()
    for name, tensor in run(strange, case, backend).items():
        # BLAS may sum in another order for other strides.
        limit = 0.0 if backend == "cpp" else 2.0**-14
        assert errors(tensor, expected[name].double())[1] <= limit, name
    assert torch.equal(strange.dy, before[0]) and torch.equal(strange.dz, before[1])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_weights_of_any_dtype_get_gradients_of_theirs(case, backend, stored):
    """Values that all of them hold make the same states; only the last cast of gradients differs.
    The reference adds up those of each use in the dtype of the weight."""
    skip_unless_runs(backend)
    inputs = make(case, torch.bfloat16).map(Tensor.float)
    inputs = inputs._replace(weights=[w.clamp(-2, 2).half().float() for w in inputs.weights])
    expected = run(inputs, case, backend)
    given = inputs._replace(weights=[weight.to(stored) for weight in inputs.weights])
    if not all(torch.equal(w, g.float()) for w, g in zip(inputs.weights, given.weights)):  # noqa: B905
        pytest.fail("the dtype does not hold the weights")
    found = run(given, case, backend)
    uses = 1 if backend == "cpp" else case.n + 1
    for name, tensor in found.items():
        if name.startswith("weights"):
            assert tensor.dtype == stored
            limit = uses * torch.finfo(stored).eps + 2.0**-16
            assert errors(tensor, expected[name].double())[1] <= limit, name
        else:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_a_second_backward_is_the_error_of_torch(case, backend):
    skip_unless_runs(backend)
    case = case._replace(batch=1, n=1, T=1)
    inputs = make(case, device=device_of(backend))
    leaves = [tensor.requires_grad_() for tensor in inputs.tensors]
    y, z = update(case, leaves, backend)
    torch.autograd.grad((y, z), leaves, (inputs.dy, inputs.dz))
    with pytest.raises(RuntimeError, match=r"backward through the graph a second time|checkpoint"):
        torch.autograd.grad((y, z), leaves, (inputs.dy, inputs.dz))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_a_kept_graph_gives_the_same_gradients_again(case, backend):
    skip_unless_runs(backend)
    inputs = make(case)
    leaves = [tensor.requires_grad_() for tensor in inputs.tensors]
    out = update(case, leaves, backend)
    wanted, given = [leaves[0], *leaves[3:]], (inputs.dy, inputs.dz)
    first = torch.autograd.grad(out, wanted, given, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, wanted, given)))


def test_cpp_has_no_second_derivatives():
    skip_unless_runs("cpp")
    case = BOTH[0]._replace(T=1)
    leaves = [tensor.requires_grad_() for tensor in make(case).tensors]
    y, z = update(case, leaves, "cpp")
    loss = (y.square() + z.square()).sum()
    (first,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="latent_update: gradients of gradients need"):
        first.sum().backward()


@pytest.mark.parametrize("changed", [0, 3, 6])
def test_a_change_before_the_backward_pass_is_noticed(changed):
    """cpp needs x and the weights again."""
    skip_unless_runs("cpp")
    case = BOTH[0]._replace(T=1)
    inputs = make(case)
    leaves = [tensor.requires_grad_() for tensor in inputs.tensors]
    y, z = update(case, leaves, "cpp")
    with torch.no_grad():
        leaves[changed].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y + z).sum().backward()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_states_may_be_overwritten_by_the_caller(case, backend):
    """As a carry of the next step does."""
    skip_unless_runs(backend)
    inputs = make(case)
    expected = run(inputs, case, backend)
    leaves = [tensor.requires_grad_() for tensor in inputs.tensors]
    out = update(case, leaves, backend)
    wanted = [leaves[0], *leaves[3:]]
    product = sum((state * d).sum() for state, d in zip(out, (inputs.dy, inputs.dz), strict=True))
    with torch.no_grad():
        leaves[1].fill_(float("nan"))
        leaves[2].fill_(float("nan"))
    found = (*(state.detach() for state in out), *torch.autograd.grad(product, wanted))
    assert_equal(dict(zip(names_of(case), found, strict=True)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_autocast_decides_the_dtype(case, backend, dtype):
    skip_unless_runs(backend, dtype)
    case = case._replace(T=1)
    inputs = make(case, dtype)
    expected = run(inputs, case, backend)
    single = inputs.map(Tensor.float)
    leaves = [tensor.requires_grad_() for tensor in single.tensors]
    with torch.autocast("cpu", dtype):
        out = update(case, leaves, backend)
    assert all(state.dtype == dtype for state in out)
    grads = torch.autograd.grad(out, leaves, (inputs.dy, inputs.dz))
    for name, tensor in zip(names_of(case), (*out, *grads), strict=True):
        assert torch.equal(tensor.float(), expected[name].float()), name


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_a_backward_under_autocast_keeps_the_dtype_of_the_forward(case, recompute):
    """Operators of torch, which the reference consists of, follow whoever calls backward."""
    skip_unless_runs("cpp")
    case = case._replace(T=1)
    inputs = make(case)
    expected = run(inputs, case, "cpp")
    leaves = [tensor.requires_grad_() for tensor in inputs.tensors]
    out = update(case, leaves, "cpp", recompute=recompute)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(out, leaves, (inputs.dy, inputs.dz))
    assert_equal(dict(zip(names_of(case), (*out, *grads), strict=True)), expected)


def test_autocast_leaves_float64_alone():
    case = BOTH[0]._replace(T=1)
    inputs = make(case, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(inputs, case, None)
    for name, true in truth(inputs, case).items():
        assert found[name].dtype == torch.float64 and errors(found[name], true)[1] < 1e-12


def kept_bytes(case: Case, backend: str, recompute: bool, dtype: torch.dtype) -> int:
    """What is kept for the backward pass beside the leaves, each storage once."""
    leaves = [tensor.requires_grad_() for tensor in make(case, dtype).tensors]
    given = {tensor.untyped_storage().data_ptr() for tensor in leaves}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = update(case, leaves, backend, recompute=recompute)
        assert out[0].requires_grad
        del out
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_cpp_keeps_what_the_page_says(case, dtype):
    """States at the start and of each layer, and a float32 for each token of these."""
    skip_unless_runs("cpp", dtype)
    for layers, n, T, cycles in ((1, 1, 1, 1), (2, 3, 2, 1), (2, 3, 5, 1), (1, 2, 2, 2)):
        sizes = case._replace(layers=layers, n=n, T=T, grad_cycles=cycles)
        tokens, outputs = sizes.batch * sizes.length, layers * (n + 1) * cycles
        state = tokens * sizes.width * dtype.itemsize
        expected = (2 + outputs) * state + outputs * tokens * 4
        assert kept_bytes(sizes, "cpp", True, dtype) == expected
        whole = kept_bytes(sizes, "cpp", False, dtype)
        assert expected < whole
        # Without recomputing: middle, gate and up, and those of the mixer or q, k and v.
        padded = sizes.length + sizes.length % 2
        mixer = 2 * sizes.mix * sizes.width if sizes.mixer == "mlp_t" else 3 * padded * sizes.width
        values = padded * (sizes.width + 2 * sizes.inner) + mixer
        each = values * dtype.itemsize + 4 * max(sizes.width, padded)
        slack = 4 * 63  # each of the four parts fills whole lines of 64 bytes
        assert 0 <= whole - expected - outputs * sizes.batch * each <= outputs * sizes.batch * slack


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_the_reference_keeps_the_inputs_of_the_calls(case):
    for n, T in ((1, 1), (3, 2), (3, 4)):
        sizes = case._replace(n=n, T=T)
        state = sizes.batch * sizes.length * sizes.width * 4
        given = 1 if T == 1 else 0  # of n + 3, z and y are leaves in the first cycle
        kept = kept_bytes(sizes, "reference", True, torch.float32)
        assert kept <= (n + 3) * state
        assert kept >= (n + 3 - 2 * given) * state
        assert kept_bytes(sizes, "reference", False, torch.float32) > 4 * kept


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_do_not_depend_on_the_run(backend):
    skip_unless_runs(backend)
    for case in BOTH:
        inputs = make(case._replace(batch=9))
        case = case._replace(batch=9)
        expected = run(inputs, case, backend)
        for _ in range(3):
            assert_equal(run(inputs, case, backend), expected)
