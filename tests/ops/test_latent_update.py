"""latent_update against its formula in float64, on every backend, for many sizes."""

import threading

import pytest
import torch

from trm_fast.ops import OPS, latent_update

from ..conftest import device_of
from . import latent_update_checks as checks
from .latent_update_checks import (
    Case,
    assert_as_good_as_plain,
    assert_equal,
    assert_near,
    make,
    plain,
    run,
    skip_unless_runs,
    truth,
)

MLP = (
    Case(batch=1, mix=2, n=1, T=1),
    Case(length=81, width=64, inner=96, mix=64, layers=2, n=6, T=1),
    Case(batch=1, length=130, width=128, mix=64, layers=3, n=1, T=2),
    Case(length=97, width=96, T=3, grad_cycles=2),
    Case(length=9, inner=96, n=2, T=3, grad_cycles=3),
    Case(length=8, n=4, T=3, grad_cycles=0),
    Case(batch=25, length=97, n=1, grad_cycles=2),  # more than goes back at once
)
ATTENTION = (
    Case("attention", batch=1, n=1, T=1),
    Case("attention", length=1, heads=2, n=5, T=1),
    Case("attention", length=81, width=128, inner=96, heads=2, layers=2, n=2, T=1),
    Case("attention", length=97, width=96, heads=2, T=1, theta=None),
    Case("attention", length=130, width=64, heads=4, n=1, T=3, grad_cycles=2),
    Case("attention", length=33, width=128, heads=4, layers=3, n=1, T=1, theta=500.0),
    Case("attention", length=8, width=64, heads=1, n=4, T=3, grad_cycles=0),
    Case("attention", batch=1, length=916, n=1, T=1),
    Case("attention", batch=25, length=97, heads=2, n=1, T=1),
)
SMALL = (
    Case(batch=2, length=5, mix=3, n=1, T=1),
    Case(inner=33, layers=2, n=1, grad_cycles=2),
    Case("attention", batch=2, heads=2, n=1, T=1),
    Case("attention", batch=1, length=3, heads=1, layers=2, grad_cycles=2, theta=None),
)
BOTH = (Case(layers=2), Case("attention", heads=2, layers=2))
ON_CPU = ("reference", "cpp")
LOW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", MLP + ATTENTION, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_states_and_gradients_are_those_of_the_formula(backend, case, dtype):
    skip_unless_runs(backend, dtype)
    assert_as_good_as_plain(make(case, dtype), case, backend)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_triton_keeps_to_the_formula(case):
    skip_unless_runs("triton")
    inputs = make(case, device=device_of("triton"))
    # The interpreter's products depend on the BLAS of the machine: each layer rounds as it likes.
    layers = case.T * (case.n + 1) * case.layers
    assert_as_good_as_plain(inputs, case, "triton", shakes=layers)


@pytest.mark.parametrize("case", [MLP[0], ATTENTION[0], *BOTH], ids=str)
def test_the_reference_runs_half_precision(case):
    assert_as_good_as_plain(make(case, torch.float16), case, "reference")


@pytest.mark.parametrize("case", [*SMALL, *BOTH], ids=str)
def test_float64_is_exact(case):
    """Plain torch in float64 is as far away as this may be, 4 eps for each product of a layer."""
    inputs = make(case, torch.float64)
    found, expected = run(inputs, case, None), truth(inputs, case)
    assert found.keys() == expected.keys()
    for name, true in expected.items():
        assert found[name].dtype == torch.float64
        assert checks.errors(found[name], true)[1] < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_sequence_of_one_token(backend, dtype, monkeypatch):
    """The norm of the token mixer is then a sign, and its gradient that of eps: with d and the
    rounded output u it is r d (1 - u^2), where u^2 is off by up to e. So the error may be e of what
    the gradient would be with r kept fixed; four times that, as e holds for one of the two calls,
    and they do not add up alike."""
    skip_unless_runs(backend, dtype)
    case = Case(length=1, n=1, T=1)
    inputs = make(case, dtype)
    found, expected, theirs = run(inputs, case, backend), truth(inputs, case), plain(inputs, case)
    norm = checks.rms

    def fixed(h, eps=1e-5):
        scale = 1 / torch.sqrt(h.detach() ** 2 + eps)
        return h * scale if h.size(-1) == 1 else norm(h, eps)

    monkeypatch.setattr(checks, "rms", fixed)
    scales = truth(inputs, case)
    for name, true in expected.items():
        if name in ("y", "z", "weights[2].grad", "weights[3].grad"):
            assert_near(found[name], (theirs[name],), true, 3, name)
        else:
            off = float((found[name].double() - true).norm())
            assert off <= 4 * torch.finfo(dtype).eps * float(scales[name].norm()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_cpp_is_what_runs_on_a_cpu(case, dtype):
    skip_unless_runs("cpp", dtype)
    inputs = make(case, dtype)
    assert_equal(run(inputs, case, None), run(inputs, case, "cpp"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", [*ON_CPU, "triton"])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_without_gradients_the_result_is_the_same(case, backend, mode):
    skip_unless_runs(backend)
    case = case._replace(batch=1, n=1, T=1) if backend == "triton" else case
    inputs = make(case, device=device_of(backend))
    expected = run(inputs, case, backend)
    with mode():
        given = inputs.map(lambda t: t.clone().requires_grad_())
        before = given.map(torch.clone)
        y, z = latent_update(
            *given[:3], given.weights, case.network, **case.counts, backend=backend
        )
    assert torch.equal(y, expected["y"]) and torch.equal(z, expected["z"])
    assert not y.requires_grad and not z.requires_grad
    assert all(map(torch.equal, given.tensors, before.tensors))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_inputs_are_not_written(case, backend):
    skip_unless_runs(backend)
    inputs = make(case)
    before = inputs.map(torch.clone)
    run(inputs, case, backend)
    assert all(map(torch.equal, [*inputs.tensors, *inputs[4:]], [*before.tensors, *before[4:]]))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_one_tensor_may_be_all_three(case, backend):
    skip_unless_runs(backend)
    x = make(case).x
    expected = latent_update(x, x.clone(), x.clone(), make(case).weights, case.network)
    before = x.clone()
    found = latent_update(x, x, x, make(case).weights, case.network)
    assert all(map(torch.equal, found, expected)) and torch.equal(x, before)


VIEWS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "rows apart": lambda x: torch.cat((x, x), -1)[..., : x.size(-1)],
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "negated": lambda x: torch._neg_view(-x),
    "one for all": lambda x: x[:1].expand_as(x) if x.dim() == 3 else x,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_strides_do_not_matter(case, backend, view):
    skip_unless_runs(backend)
    views = make(case).map(VIEWS[view])
    found, expected = run(views, case, backend), run(views.map(torch.clone), case, backend)
    for name, tensor in found.items():
        # BLAS may sum in another order for other strides.
        limit = 0.0 if backend == "cpp" else 2.0**-14
        assert checks.errors(tensor, expected[name].double())[1] <= limit, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_a_sample_knows_nothing_of_the_others(case, dtype):
    """Neither of their values nor of their number, to the last bit."""
    skip_unless_runs("cpp", dtype)
    case = case._replace(batch=5, length=97)
    inputs = make(case, dtype)
    whole = run(inputs, case, "cpp")
    for i in (0, 3):
        one = Case(*case._replace(batch=1))
        alone = inputs._replace(
            **{name: getattr(inputs, name)[i : i + 1] for name in ("x", "y", "z", "dy", "dz")}
        )
        found = run(alone, one, "cpp")
        for name in ("y", "z", "x.grad"):
            assert torch.equal(found[name][0], whole[name][i]), name


@pytest.fixture
def threads():
    """Sets the number of threads, and back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_threads_do_not_change_the_states(case, dtype, threads):
    """Nor gradients of states; those of weights are sums, in an order that threads decide."""
    skip_unless_runs("cpp", dtype)
    case = case._replace(batch=25, length=97, n=1, T=1)
    inputs = make(case, dtype)
    expected = None
    for count in (1, 2, 3):
        threads(count)
        found = run(inputs, case, "cpp")
        assert_equal(run(inputs, case, "cpp"), found)
        expected = expected or found
        for name, tensor in found.items():
            limit = 2.0**-14 if name.startswith("weights") else 0.0
            if name.startswith("weights") and dtype == torch.bfloat16:
                limit = 2.0**-10  # products of rounded values, whose sums are float32 all the same
            assert checks.errors(tensor, expected[name].double())[1] <= limit, name


def test_more_threads_than_samples(threads):
    skip_unless_runs("cpp")
    for case in BOTH:
        threads(4)
        case = case._replace(batch=3, grad_cycles=2)
        assert_as_good_as_plain(make(case), case, "cpp")


@pytest.mark.parametrize("backend", ON_CPU)
def test_threads_of_the_caller_may_run_it_at_once(backend):
    """As the workers of a loader do."""
    skip_unless_runs(backend)
    expected = {case: run(make(case), case, backend) for case in BOTH}
    found: dict[Case, list] = {case: [] for case in BOTH}

    def work(case: Case) -> None:
        for _ in range(3):
            found[case].append(run(make(case), case, backend))

    workers = [threading.Thread(target=work, args=(case,)) for case in BOTH]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for case in BOTH:
        assert len(found[case]) == 3
        for result in found[case]:
            assert_equal(result, expected[case])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "y", "z"])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_what_is_no_number_stays_in_its_sample_and_is_seen(case, backend, where, value):
    skip_unless_runs(backend)
    case = case._replace(T=1)
    inputs, odd = make(case), make(case)
    getattr(odd, where)[1, 2, 3] = value
    found, expected = run(odd, case, backend), run(inputs, case, backend)
    others = [0, 2]
    for name in ("y", "z", "x.grad", "y.grad", "z.grad"):
        assert torch.equal(found[name][others], expected[name][others]), name
        assert found[name][1].isnan().any(), name
    for i in range(4 * case.layers):
        assert found[f"weights[{i}].grad"].isnan().any(), i


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_a_weight_that_is_no_number_is_seen(case, backend, dtype):
    """Also one of queries or keys, with all values numbers. Attention of torch on a CPU misses it
    below 16 keys."""
    skip_unless_runs(backend, dtype)
    case = case._replace(n=1, T=1, length=17)
    for index in range(4 * case.layers):
        rows = make(case).weights[index].size(0)
        for row in (1, rows // 2, rows - 1):
            inputs = make(case, dtype)
            inputs.weights[index][row, 2] = float("nan")
            found = run(inputs, case, backend)
            assert found["y"].isnan().any() and found["x.grad"].isnan().any(), (index, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    ("case", "scale"), [(BOTH[0], 2.0**-20), (BOTH[0], 2.0**20), (BOTH[1], 2.0**-20)], ids=str
)
def test_values_of_any_size_are_normed(case, scale, backend, dtype):
    """Large ones make attention choose a single key, by differences that are rounding."""
    skip_unless_runs(backend, dtype)
    case = case._replace(n=1, T=1)
    inputs = make(case, dtype)
    x, y, z = (tensor * scale for tensor in inputs[:3])
    assert_as_good_as_plain(inputs._replace(x=x, y=y, z=z), case, backend)


@pytest.mark.parametrize("backend", [*ON_CPU, "triton"])
@pytest.mark.parametrize("size", ["batch", "length"])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_nothing_in_gives_nothing_out_and_no_gradient(case, size, backend):
    skip_unless_runs(backend)
    case = case._replace(**{size: 0}, T=1)
    found = run(make(case, device=device_of(backend)), case, backend)
    for name, tensor in found.items():
        assert name.startswith("weights") == (tensor.numel() > 0) or size == "length", name
        assert not tensor.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64])
@pytest.mark.parametrize("shape", [(), (7,), (33, 32), (2, 9, 40), (1, 97, 64)], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_the_examples_of_the_op_keep_their_tolerance(backend, shape, dtype):
    """What ``trm-fast doctor`` runs on the machines of users."""
    skip_unless_runs(backend, dtype)
    for example in OPS["latent_update"].examples(shape, dtype, torch.device("cpu")).values():
        errors = example.errors(backend)
        assert errors.keys() == example.tolerance.keys()
        assert all(errors[key] <= example.tolerance[key] for key in errors), errors


def test_triton_keeps_the_tolerance_of_the_examples():
    skip_unless_runs("triton")
    device = device_of("triton")
    for example in OPS["latent_update"].examples((1, 3, 32), torch.float32, device).values():
        errors = example.errors("triton")
        assert all(errors[key] <= example.tolerance[key] for key in errors), errors
