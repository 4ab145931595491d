"""The Triton kernels of newton_schulz, called past the page: every kernel, form, dtype and view."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ..conftest import device_of, skip_unless_usable
from .newton_schulz_checks import Triples, allowed, error, make

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)

import triton
import triton.language as tl
from trm_fast.kernels import _newton_schulz_kernels, _tables
from trm_fast.kernels import newton_schulz as kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("standard", "symmetric", "gram")
YOU = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
)  # fmt: skip
CUBIC = ((3.3656576, -3.3420992, 0.0), (2.5744352, -1.4957376, 0.0), (2.5368962, -1.4312570, 0.0))
EPS = 1e-7
ALL = (1, 2, 3, 4)  # restarts of the standard form
SENTINEL = -77.0


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    skip_unless_usable("triton")
    threads = torch.get_num_threads()
    # The float64 products of the bounds are so small that waking a thread takes longer.
    torch.set_num_threads(1)
    yield device_of("triton")
    torch.set_num_threads(threads)


@pytest.fixture
def product_by_product(monkeypatch) -> None:
    use_products(monkeypatch)


def use_products(monkeypatch) -> None:
    """Sends every size to the kernels of single products, with several tiles in a small matrix."""
    blocks = {"BLOCK": 16, "BLOCK_K": 16}, {"num_warps": 1, "num_stages": 2}
    monkeypatch.setattr(kernels, "IN_ONE_TILE", {2: 0, 4: 0})
    monkeypatch.setattr(kernels, "product_blocks", lambda *_: blocks)
    monkeypatch.setattr(kernels, "TILE", 16)
    monkeypatch.setattr(kernels, "PARTS", 4)


def restarts_for(form: str, dtype: torch.dtype, steps: int) -> tuple[int, ...]:
    """All steps, or what the Gram form needs in a dtype for inputs of a condition of 10."""
    if form == "gram":
        return (1, 3) if dtype == torch.bfloat16 else (2,)
    return tuple(range(1, steps))


def truth(x: Tensor, triples: Triples, eps: float = EPS, off: float = 0.0) -> Tensor:
    """The polynomials of the singular values over the norm, which is ``off`` by that share."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / max(float(s.norm()), eps) * (1 + off)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


def shared_error(x: Tensor, triples: Triples) -> float:
    """What all elements have in common, and ``allowed`` does not know.

    The norm: 4 u for sums by tiles, 2 u for the root, 2 u for each of two divisions, where u is
    half of float32's eps; and the coefficients, which float32 rounds.
    """
    rounded = tuple(tuple(torch.tensor(triple).tolist()) for triple in triples)
    return error(truth(x, rounded, off=10 * 2.0**-24), truth(x, triples))


def bound_for(
    x: Tensor, triples: Triples, cuts: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> float:
    return allowed(tuple(x.shape), 10.0, triples, cuts, dtype, seed) + shared_error(x, triples)


def assert_right(shapes, form, dtype, device, triples=YOU, restarts=None, storage=None):
    cuts = restarts_for(form, dtype, len(triples)) if restarts is None else restarts
    stored = storage or dtype
    inputs = [make(shape, 10.0, seed) for seed, shape in enumerate(shapes)]
    matrices = [x.to(device, stored) for x in inputs]
    kernels.newton_schulz_(matrices, triples, form, cuts, dtype, EPS)
    for seed, (x, found) in enumerate(zip(inputs, matrices, strict=True)):
        expected = truth(x.to(stored), triples)
        # Storing rounds once more; the interpreter cuts off in bfloat16, a whole unit.
        storing = torch.finfo(stored).eps * float(expected.norm())
        bound = bound_for(x, triples, cuts, dtype, seed) + storing
        assert error(found.cpu(), expected) <= bound


# Each kernel, at its edges.
ONE_LAUNCH = (
    ("whole", (1, 7), torch.float16, "gram"), ("whole", (16, 16), torch.bfloat16, "standard"),
    ("whole", (31, 17), torch.float32, "gram"), ("whole", (17, 31), torch.float32, "symmetric"),
    ("whole", (33, 64), torch.float16, "standard"), ("whole", (64, 33), torch.bfloat16, "gram"),
    ("chunked", (17, 1), torch.float32, "standard"), ("chunked", (33, 20), torch.float32, "gram"),
    ("chunked", (97, 33), torch.bfloat16, "gram"), ("chunked", (20, 33), torch.float16, "standard"),
    ("cached", (33, 40), torch.float32, "standard"), ("cached", (65, 129), torch.float16, "gram"),
)  # fmt: skip


@pytest.mark.parametrize(("kernel", "shape", "dtype", "form"), ONE_LAUNCH, ids=str)
def test_one_launch_is_the_polynomial_of_the_singular_values(device, kernel, shape, dtype, form):
    n, m = sorted(shape)
    assert kernels.single_launch(n, m, dtype)[0] is getattr(kernels, f"{kernel}_kernel")
    assert kernels.in_one_launch(n, m, dtype)
    assert_right([shape], form, dtype, device)


@pytest.mark.interpreted(form=["standard"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_products_are_the_polynomial_of_the_singular_values(
    device, product_by_product, form, dtype
):
    assert_right([(20, 33)], form, dtype, device)


@pytest.mark.parametrize("shape", [(20, 17), (16, 16), (1, 7), (17, 1)], ids=str)
def test_products_take_every_shape(device, product_by_product, shape):
    assert_right([shape, shape], "gram", torch.float16, device)


def test_the_products_of_a_real_size_are_right(device):
    assert not kernels.in_one_launch(70, 129, torch.float32)
    assert_right([(129, 70)], "gram", torch.float32, device)


@pytest.mark.parametrize("restarts", [(), (1,), (3,), (2, 4), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("shape", [(9, 9), (9, 20)], ids=str)
def test_every_set_of_restarts_gives_the_same_polynomial(device, restarts, shape):
    assert_right([shape], "gram", torch.float32, device, restarts=restarts)


@pytest.mark.parametrize("restarts", [(), (1,), (2, 4)], ids=str)
def test_products_restart_where_they_are_told(device, product_by_product, restarts):
    assert_right([(20, 20)], "gram", torch.float32, device, restarts=restarts)


def test_the_cache_restarts_where_it_is_told(device):
    assert_right([(33, 36)], "gram", torch.float32, device, restarts=(1,))


@pytest.mark.parametrize("form", FORMS)
def test_a_cubic_needs_no_square(device, product_by_product, form):
    assert_right([(20, 20)], form, torch.float32, device, CUBIC)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_and_arithmetic_may_differ(device, storage, dtype):
    assert_right([(9, 20)], "standard", dtype, device, storage=storage)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_store_in_the_dtype_of_the_matrix(device, product_by_product, dtype):
    assert_right([(20, 17)], "gram", torch.float16, device, storage=dtype)


def test_different_shapes_in_one_call(device):
    shapes = [(5, 7), (7, 5), (20, 10), (5, 7), (1, 1), (10, 20), (20, 10)]
    assert_right(shapes, "gram", torch.float32, device)


def views(memory: Tensor) -> list[Tensor]:
    """Matrices with gaps between their rows or columns, at odd and even addresses."""
    return [
        memory[0:20, 0:32], memory[1:34, 33:50], memory[35:55, 3:40].mT, memory[56:60, 1:33:2],
        memory[61:81:3, 5:9], memory[82:83, 7:20], memory[84:96, 2:3],
    ]  # fmt: skip


@pytest.mark.parametrize("storage", DTYPES)
def test_only_the_views_are_written(device, storage):
    memory = torch.full((100, 64), SENTINEL, dtype=storage, device=device)
    inputs = []
    for seed, view in enumerate(views(memory)):
        inputs.append(make(tuple(view.shape), None, seed).to(view))
        view.copy_(inputs[-1])
    kernels.newton_schulz_(views(memory), YOU, "standard", (), torch.float32, EPS)
    for view, x in zip(views(memory), inputs, strict=True):
        alone = x.clone()
        kernels.newton_schulz_([alone], YOU, "standard", (), torch.float32, EPS)
        assert torch.equal(view, alone)
        view.fill_(SENTINEL)
    assert (memory == SENTINEL).all()


def test_products_write_only_the_views(device, product_by_product):
    memory = torch.full((40, 64), SENTINEL, device=device)
    wide, tall = memory[1:21, 3:20], memory[2:21, 42:59]
    for view in (wide, tall):
        x = make(tuple(view.shape), 10.0)
        view.copy_(x)
        kernels.newton_schulz_([view], YOU, "symmetric", ALL, torch.float32, EPS)
        assert error(view.cpu(), truth(x.float(), YOU)) <= bound_for(x, YOU, ALL, torch.float32)
        view.fill_(SENTINEL)
    assert (memory == SENTINEL).all()


def every_path(monkeypatch) -> Iterator[tuple[int, int]]:
    """A size for each kernel of one launch, then the products."""
    yield from ((5, 7), (7, 20), (33, 36))
    use_products(monkeypatch)
    yield (17, 20)


@pytest.mark.interpreted(dtype=[torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_stays_zero(device, dtype, monkeypatch):
    for shape in every_path(monkeypatch):
        zero = torch.zeros(shape, device=device, dtype=dtype)
        kernels.newton_schulz_([zero], YOU, "gram", (2,), dtype, EPS)
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_the_norm_neither_overflows_nor_vanishes(device, scale, monkeypatch):
    for shape in every_path(monkeypatch):
        x = make(shape, 10.0)
        found = (x * scale).to(device, torch.float32)
        kernels.newton_schulz_([found], YOU, "standard", (), torch.float32, 1e-37)
        assert error(found.cpu(), truth(x, YOU)) <= bound_for(x, YOU, ALL, torch.float32)


def test_a_norm_below_eps_is_divided_by_eps(device, monkeypatch):
    for shape in every_path(monkeypatch):
        x = make(shape, 10.0)
        x = x / x.norm()  # norm 1, eps 4
        found = x.to(device, torch.float32)
        kernels.newton_schulz_([found], YOU, "standard", (), torch.float32, 4.0)
        # As near as for x over its norm, whose singular values are four times these.
        bound = bound_for(x, YOU, ALL, torch.float32)
        assert error(found.cpu(), truth(x, YOU, eps=4.0)) <= bound


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def counted(monkeypatch) -> dict[str, Counted]:
    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    found = {name: Counted(getattr(kernels, name)) for name in names}
    for name, kernel in found.items():
        monkeypatch.setattr(kernels, name, kernel)
    return found


def launches(counted: dict[str, Counted]) -> dict[str, int]:
    return {name: kernel.launches for name, kernel in counted.items() if kernel.launches}


def test_matrices_of_one_shape_share_one_launch(device, counted):
    matrices = [make((5, 7), None, seed).to(device, torch.float32) for seed in range(6)]
    kernels.newton_schulz_(matrices, YOU, "gram", (2,), torch.float32, EPS)
    assert launches(counted) == {"whole_kernel": 1}


@pytest.mark.parametrize(("form", "symmetric", "multiply"), [("symmetric", 10, 5), ("gram", 16, 2)])
def test_products_share_their_launches(
    device, product_by_product, counted, form, symmetric, multiply
):
    matrices = [make((17, 20), None, seed).to(device, torch.float32) for seed in range(3)]
    kernels.newton_schulz_(matrices, YOU, form, (2,), torch.float32, EPS)
    assert launches(counted) == {
        "norm_kernel": 1,
        "normalise_kernel": 1,
        "symmetric_kernel": symmetric,
        "multiply_kernel": multiply,
    }


@triton.jit
def triangle_kernel(out_ptr, tile_ptr):
    row, col = _newton_schulz_kernels._triangle(tl.load(tile_ptr + tl.program_id(0)))
    tl.store(out_ptr + 2 * tl.program_id(0), row)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, col)


def test_tiles_of_a_triangle_are_counted_row_by_row(device):
    rows = [0, 1, 2, 3, 100, 4095, 30_000, 65_535]
    expected = [place for row in rows for place in ([row, 0], [row, row])]
    tiles = [row * (row + 1) // 2 + col for row, col in expected]
    found = torch.empty(len(tiles), 2, dtype=torch.int64, device=device)
    triangle_kernel[(len(tiles),)](found, torch.tensor(tiles, device=device))
    assert found.tolist() == expected


def test_a_table_is_uploaded_once(device):
    words = torch.arange(5).numpy()
    one = _tables.upload("a table of this test", lambda: words, device)
    assert one.tolist() == [0, 1, 2, 3, 4]
    assert _tables.upload("a table of this test", pytest.fail, device) is one
    assert _tables.upload("another", lambda: words + 1, device).tolist() == [1, 2, 3, 4, 5]
