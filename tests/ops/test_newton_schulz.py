"""The numbers of newton_schulz: every form and backend against its formula in float64."""

import itertools

import pytest
import torch

from trm_fast._dispatch import OPS
from trm_fast.ops import newton_schulz, newton_schulz_
from trm_fast.ops._newton_schulz_sets import SETS, restarts_of

from ..conftest import device_of, skip_unless_usable
from .newton_schulz_checks import KELLER, METHODS, allowed, error, make, polar, truth

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A block of the CPU has 16 rows and columns, three of them are one tile; the last is not small.
SIZES = [(1, 1), (1, 7), (7, 1), (15, 17), (16, 16), (33, 49), (48, 32), (129, 65), (97, 260)]


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request) -> str:
    skip_unless_usable(request.param)
    return request.param


def skip_unless_runs(backend: str, dtype: torch.dtype) -> torch.device:
    device = device_of(backend)
    reason = OPS["newton_schulz"].reason(backend, device.type, frozenset({dtype}))
    if reason:
        pytest.skip(f"{backend}: {reason}")
    return device


def restarts(method: str, triples, dtype: torch.dtype) -> tuple[int, ...]:
    return restarts_of(triples, dtype) if method == "gram" else tuple(range(1, len(triples)))


def assert_right(shape, dtype, triples, backend, method, condition=10.0, arithmetic=None) -> None:
    """Compares each of the matrices [..., n, m] with the truth."""
    used = arithmetic or dtype
    device = skip_unless_runs(backend, used)
    x = make(shape, condition).to(dtype)
    before = x.clone()
    given = (x.to(device), len(triples), triples, method)
    found = newton_schulz(*given, dtype=arithmetic, backend=backend).cpu()
    assert torch.equal(x, before)
    assert found.shape == x.shape and found.dtype == x.dtype and found.is_contiguous()
    cuts = restarts(method, triples, used)
    bound = allowed(shape[-2:], condition, triples, cuts, used)
    for matrix, result in zip(*(t.reshape(-1, *shape[-2:]) for t in (x, found)), strict=True):
        expected = truth(matrix, triples)
        storing = torch.finfo(dtype).eps / 2 * float(expected.norm())
        assert error(result, expected) <= bound + storing


# In the interpreter a call takes seconds; test_newton_schulz_triton.py chooses its sizes.
CASES = [
    *itertools.product(["reference"], SIZES, ("standard", "gram"), DTYPES),
    *itertools.product(["cpp"], SIZES, METHODS, DTYPES[1:2]),
    *zip(["triton"] * 6, SIZES[:6], METHODS * 2, DTYPES * 2, strict=True),
]


@pytest.mark.parametrize(("name", "shape", "method", "dtype"), CASES, ids=str)
def test_every_form_is_the_polynomial_of_the_singular_values(name, shape, method, dtype):
    skip_unless_usable(name)
    assert_right(shape, dtype, SETS["polar_express"].steps(5), name, method)


@pytest.mark.parametrize("shape", [(5, 3), (20, 47), (32, 32)], ids=str)
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("name", SETS)
def test_every_set_is_right_in_float64(name, method, shape):
    assert_right(shape, torch.float64, SETS[name].steps(7), "reference", method, None)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("name", SETS)
def test_every_set_is_right_in_16_bits(backend, name, method):
    assert_right((20, 37), torch.bfloat16, SETS[name].steps(6), backend, method)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_every_number_of_steps_is_right(backend, method, steps):
    assert_right((17, 40), torch.bfloat16, KELLER[:1] * steps, backend, method)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 4, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_empty_input_gives_empty_output(backend, shape):
    x = torch.empty(shape, dtype=torch.bfloat16, device=device_of(backend))
    assert newton_schulz(x, backend=backend).shape == shape


def test_batches_are_right(backend):
    assert_right((2, 2, 17, 33), torch.bfloat16, KELLER, backend, "standard")


@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_and_arithmetic_may_differ(backend, dtype):
    assert_right((33, 20), dtype, KELLER, backend, "standard", arithmetic=torch.bfloat16)


VIEWS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "rows apart": lambda x: torch.cat((x, x), 1)[:, : x.size(1)],
    "misaligned": lambda x: torch.cat((x[:, :1], x), 1)[:, 1:],
    "columns apart": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "both apart": lambda x: x.repeat_interleave(3, 0).repeat_interleave(2, 1)[::3, ::2],
    "negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.interpreted(shape=[(20, 33)])
@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(backend, view, shape):
    x = make(shape, 10.0).to(device_of(backend), torch.bfloat16)
    expected = newton_schulz(x, backend=backend)
    given = VIEWS[view](x)
    assert torch.equal(given, x)
    # A library may sum in another order where its input lies in another one.
    near = 8 * torch.finfo(torch.bfloat16).eps * float(expected.double().norm())
    exact = backend != "reference"
    found = newton_schulz(given, backend=backend)
    newton_schulz_([given], backend=backend)
    for result in (found, given):
        assert torch.equal(result, expected) if exact else error(result, expected) <= near


def test_only_the_matrices_are_written(backend):
    device = device_of(backend)
    buffer = torch.full((90, 50), torch.nan, dtype=torch.bfloat16, device=device)
    places = [
        (slice(3, 20), slice(2, 41)),
        (slice(25, 75), slice(1, 18)),
        (slice(80, 81), slice(7, 9)),
    ]
    for place in places:
        rows, cols = (part.stop - part.start for part in place)
        buffer[place] = make((rows, cols), 10.0).to(buffer)
    alone = [newton_schulz(buffer[place], backend=backend) for place in places]
    newton_schulz_([buffer[place] for place in places], backend=backend)
    for place, expected in zip(places, alone, strict=True):
        assert torch.equal(buffer[place], expected)
        buffer[place] = torch.nan
    assert buffer.isnan().all()


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_a_result_does_not_depend_on_the_others(backend, method):
    device = device_of(backend)
    shapes = [(20, 33), (33, 20), (20, 33), (24, 24), (20, 33), (65, 20)]
    matrices = [make(s, seed=i).to(device, torch.bfloat16) for i, s in enumerate(shapes)]
    alone = [newton_schulz(x, method=method, backend=backend) for x in matrices]
    newton_schulz_(matrices, method=method, backend=backend)
    for found, expected in zip(matrices, alone, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(7, 5), (256, 400), (700, 320)], ids=str)
def test_a_result_does_not_depend_on_the_number_of_threads(shape):
    skip_unless_usable("cpp")
    skip_unless_runs("cpp", torch.bfloat16)
    x, before = make(shape).bfloat16(), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5, 16):
            torch.set_num_threads(threads)
            for count in (1, 3):
                copies = [x.clone() for _ in range(count)]
                newton_schulz_(copies, backend="cpp")
                results += copies
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)], ids=str)
def test_cubic_steps_reach_the_polar_factor(shape, method):
    x = make(shape, 1e3)
    # 0.001 / 2.5 grows by 1.5 per step to 1 within 20, and then converges quadratically.
    found = newton_schulz(x, 40, "cubic", method)
    assert error(found, polar(x)) < 1e-9


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_polar_express_reaches_the_polar_factor(backend, method):
    dtype = torch.bfloat16
    device = skip_unless_runs(backend, dtype)
    x = make((20, 50), 10.0).to(dtype)
    triples = SETS["polar_express"].steps(9)
    found = newton_schulz(x.to(device), 9, method=method, backend=backend).cpu()
    # From 0.05 all singular values are at 1 after 9 steps, to less than rounding.
    bound = allowed((20, 50), 10.0, triples, restarts(method, triples, dtype), dtype)
    assert error(truth(x, triples), polar(x)) < 1e-6
    assert error(found, polar(x)) <= 1e-6 + bound + 2.0**-9 * 20**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zero(backend, method, dtype):
    device = skip_unless_runs(backend, dtype)
    x = torch.zeros((20, 33), dtype=dtype, device=device)
    assert torch.equal(newton_schulz(x, method=method, backend=backend), x)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-10, 1e10, 1e30, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_neither_overflows_nor_vanishes(backend, dtype, scale):
    device = skip_unless_runs(backend, dtype)
    x = make((17, 40), 10.0)
    x = (x / x.abs().max() * scale).to(dtype)
    triples = SETS["polar_express"].steps(5)
    expected = truth(x.double() / scale, triples)
    found = newton_schulz(x.to(device), method="standard", eps=1e-38, backend=backend).cpu()
    cuts = restarts("standard", triples, dtype)
    bound = allowed((17, 40), 10.0, triples, cuts, dtype)
    assert error(found, expected) <= bound + torch.finfo(dtype).eps * float(expected.norm())


def test_eps_is_the_least_divisor(backend):
    dtype = torch.bfloat16
    device = skip_unless_runs(backend, dtype)
    x = (make((8, 8), 10.0) / 4).to(dtype)
    eps = 8 * float(x.double().norm())
    found = newton_schulz(x.to(device), 1, "cubic", eps=eps, backend=backend).cpu()
    expected = truth(x, [(1.5, -0.5, 0.0)], eps)
    # Five stored matrices below 1 / 8 x 1.5 in norm, each off by half of eps.
    assert error(found, expected) <= 5 * 1.5 / 8 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 5])
def test_low_rank_is_right_in_float32(rank, method):
    x = (make((40, rank)) @ make((rank, 90), seed=1)).float()
    found = newton_schulz(x, method=method, backend="reference")
    # Rounding x makes singular values of 2^-24, and the steps multiply them by at most 8.3^5 / 40.
    assert error(found, truth(x, SETS["polar_express"].steps(5))) <= 2.0**-24 * 1000 * 40


ROUGH = {
    "rank 1": make((32, 1)) @ make((1, 60)),
    "ones": torch.ones(32, 60, dtype=torch.float64),
    "condition 1e6": make((32, 60), 1e6),
    "diagonal": torch.eye(32, 60, dtype=torch.float64),
}


@pytest.mark.parametrize("name", ["polar_express", "keller", "cans", "cubic5"])
@pytest.mark.parametrize("kind", ROUGH)
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_rough_input_in_16_bits_stays_bounded(backend, method, kind, name):
    """Rounding moves singular values, but hardly beyond what the set can make of any of them."""
    device = skip_unless_runs(backend, torch.bfloat16)
    x = ROUGH[kind].to(device, torch.bfloat16)
    found = newton_schulz(x, 5, name, method, backend=backend)
    assert torch.linalg.matrix_norm(found.double(), 2) <= 1.35 * (1 + 2.0**-4)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(backend, value):
    x = make((20, 33)).to(device_of(backend), torch.bfloat16)
    x[3, 5] = value
    assert not newton_schulz(x, backend=backend).isfinite().any()


def test_half_of_a_batch_that_is_not_finite_leaves_the_other_alone(backend):
    x = make((2, 20, 33)).to(device_of(backend), torch.bfloat16)
    expected = newton_schulz(x[1], backend=backend)
    x[0] = torch.nan
    assert torch.equal(newton_schulz(x, backend=backend)[1], expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(), (7,), (33, 32), (0, 3), (2, 9, 4)], ids=str)
def test_the_examples_of_the_op_keep_their_tolerance(backend, shape, dtype):
    """What ``trm-fast doctor`` runs on the machines of users."""
    device = skip_unless_runs(backend, dtype)
    for name, example in OPS["newton_schulz"].examples(shape, dtype, device).items():
        errors = example.errors(backend)
        assert errors.keys() == example.tolerance.keys()
        assert all(errors[key] <= example.tolerance[key] for key in errors), (name, errors)


def test_all_methods_are_the_same_for_one_row():
    x = make((1, 9)).float()
    found = [newton_schulz(x, method=method, backend="reference") for method in METHODS]
    # The slope of these steps at 1, up to 24 each, enlarges the rounding of the norm.
    for result in found:
        assert error(result, found[0].double()) < 1e-4


def test_symmetric_is_standard_where_nothing_is_mirrored():
    x = make((20, 33)).float()
    standard, symmetric = (
        newton_schulz(x, method=method, backend="reference") for method in METHODS[:2]
    )
    assert torch.equal(standard, symmetric)
