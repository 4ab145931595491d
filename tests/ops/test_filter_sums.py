"""filter_sums: every backend against float64, and that its sums repeat to the last bit."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from trm_fast import BackendError
from trm_fast._dispatch import OPS
from trm_fast.ops import FilterSums, filter_sums

from .adaptive_checks import Arena, bits, strides_of

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
# One below and one above what a lane, a vector, and a block of each backend takes.
SIZES = ((), (0,), (0, 3), (1,), (63,), (65,), (1023,), (1025,), (2049,), (4097,), (20_001,),
         (3, 5, 7))  # fmt: skip
OP = torch.ops.trm_fast.filter_sums.default


def drawn(shape, dtype: torch.dtype = torch.float32, seed: int = 0, device="cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator).to(device, dtype)


def pairs(shapes, dtype: torch.dtype = torch.float32, device="cpu") -> tuple[list, list]:
    grads = [drawn(shape, dtype, 2 * i, device) for i, shape in enumerate(shapes)]
    return grads, [drawn(g.shape, dtype, 2 * i + 1, device) for i, g in enumerate(grads)]


def truth(grad: Tensor, mean: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The sums in float64, and those of the absolute values of their terms."""
    g = grad.detach().double().cpu().numpy()
    mu = np.zeros_like(g) if mean is None else mean.double().cpu().numpy()
    terms = (g * mu, g * g, mu * mu)
    return tuple(np.array([f(t).sum() for t in terms]) for f in (np.asarray, np.abs))


def assert_sums(found: Tensor, grads: list[Tensor], means: list[Tensor] | None = None) -> None:
    """A term is rounded once as a product, and at most 32 times while it is added in float32; the
    rest is float64."""
    assert found.dtype == torch.float64 and found.shape == (len(grads), 3)
    for row, grad, mean in zip(found.cpu(), grads, means or [None] * len(grads), strict=True):
        expected, terms = truth(grad, mean)
        assert (np.abs(row.numpy() - expected) <= 33 * 2.0**-24 * terms).all()


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size_is_right(backend, device, shape):
    grads, means = pairs([shape], device=device)
    assert_sums(filter_sums(grads, means, backend=backend), grads, means)
    assert_sums(filter_sums(grads, backend=backend), grads)


def test_many_tensors_of_different_sizes_are_right_together(backend, device):
    grads, means = pairs(SIZES, device=device)
    assert_sums(filter_sums(grads, means, backend=backend), grads, means)
    assert_sums(filter_sums(grads, backend=backend), grads)


@pytest.mark.parametrize("mean", STORAGE)
@pytest.mark.parametrize("grad", STORAGE)
def test_every_pairing_of_storage_is_right(backend, device, grad, mean):
    grads, means = [drawn((1500,), grad, 0, device)], [drawn((1500,), mean, 1, device)]
    assert_sums(filter_sums(grads, means, backend=backend), grads, means)
    assert_sums(filter_sums(grads, backend=backend), grads)


def test_mixed_storage_is_right_in_one_call(backend, device):
    kinds = [(g, m) for g in STORAGE for m in STORAGE]
    grads = [drawn((70 + i,), g, i, device) for i, (g, _) in enumerate(kinds)]
    means = [drawn((70 + i,), m, 50 + i, device) for i, (_, m) in enumerate(kinds)]
    assert_sums(filter_sums(grads, means, backend=backend), grads, means)


def test_empty_tensors_give_zeros(backend, device):
    grads = [torch.zeros(shape, device=device) for shape in ((0,), (2, 0))]
    assert filter_sums(grads, grads, backend=backend).tolist() == [[0.0] * 3] * 2


def test_no_tensors_give_no_rows(backend):
    assert filter_sums([], backend=None if backend == "cuda" else backend).shape == (0, 3)


def test_sums_without_means_are_those_of_squares(backend, device):
    grads, means = pairs([(1500,)], device=device)
    alone, both = filter_sums(grads, backend=backend), filter_sums(grads, means, backend=backend)
    assert alone[:, ::2].tolist() == [[0.0, 0.0]]
    assert alone[0, 1] == both[0, 1]


def test_large_and_small_sums_keep_their_digits(backend, device):
    """Units of float32 at 2^20 are 2^-3, more than all other terms together; only those that are
    added to the large one in float32, at most 32, may be lost."""
    grads = [torch.full((100_000,), 2.0**-10, device=device)]
    grads[0][0] = 2.0**10
    small = filter_sums(grads, backend=backend)[0, 1].item() - 2.0**20
    assert abs(small - 99_999 * 2.0**-20) <= 32 * 2.0**-20


@pytest.mark.parametrize("start", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", STORAGE)
def test_misaligned_tensors_are_right(backend, device, dtype, start):
    arena, shapes = Arena(), [(1029,), (33, 5)]
    grads, means = pairs(shapes, dtype, device)
    grads = [arena.place(t, strides_of(t.shape, range(t.dim())), start) for t in grads]
    means = [arena.place(t, strides_of(t.shape, range(t.dim())), start + 1) for t in means]
    assert_sums(filter_sums(grads, means, backend=backend), grads, means)


LAYOUTS = {
    "turned": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    "gaps": lambda t: torch.stack((t, 0 * t - 99), -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "negative": lambda t: torch._neg_view(-t),
    "contiguous": lambda t: t,
}


@pytest.mark.parametrize("mean", ["contiguous", "turned", "gaps"])
@pytest.mark.parametrize("grad", LAYOUTS)
def test_every_order_of_memory_is_right(backend, device, grad, mean):
    grads, means = pairs([(7, 9, 11)], device=device)
    grads, means = [LAYOUTS[grad](grads[0])], [LAYOUTS[mean](means[0])]
    assert_sums(filter_sums(grads, means, backend=backend), grads, means)
    assert_sums(filter_sums(grads, backend=backend), grads)


def test_inputs_are_only_read(backend, device):
    grads, means = pairs([(1500,), (3, 5)], torch.bfloat16, device)
    before = [(bits(t), t._version) for t in (*grads, *means)]
    filter_sums(grads, means, backend=backend)
    assert [(bits(t), t._version) for t in (*grads, *means)] == before


def test_threads_and_neighbours_do_not_change_a_bit(backend, device):
    """Shares of 8 blocks of 2048: this is more than three of them, with a rest."""
    grads, means = pairs([(700,), (60_001,), (9000,)], device=device)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(bits(filter_sums(grads, means, backend=backend)))
    finally:
        torch.set_num_threads(before)
    assert results[1:] == results[:1] * 2
    single = [filter_sums([g], [m], backend=backend) for g, m in zip(grads, means, strict=True)]
    assert bits(torch.cat(single)) == results[0]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_with_its_tensor(backend, device, value):
    grads, means = pairs([(1500,), (40,)], device=device)
    grads[0][7] = value
    sums = filter_sums(grads, means, backend=backend)
    assert not sums[0, :2].isfinite().any() and sums[1].isfinite().all()
    assert sums[0, 2].isfinite()


def test_kept_sums_are_those_of_each_call(backend, device):
    grads, means = pairs([(1500,), (3, 5)], device=device)
    kept = FilterSums(grads, means, backend=backend)
    first = kept(grads)
    assert_sums(first, grads, means)
    others = [drawn(g.shape, seed=9 + i, device=device) for i, g in enumerate(grads)]
    means[0].mul_(2)
    with torch.no_grad():
        assert kept(others).data_ptr() == first.data_ptr()
    assert_sums(first, others, means)


def test_float64_runs_on_the_reference():
    grads, means = pairs([(5000,)], torch.float64)
    expected, terms = truth(grads[0], means[0])
    found = filter_sums(grads, means)[0].numpy()
    # torch adds up pairwise: far less than one rounding for each of the 13 halvings of 5000.
    assert (np.abs(found - expected) <= 13 * 2.0**-53 * terms).all()


@pytest.mark.parametrize("name", ["cpp", "triton", "cuda"])
def test_a_named_native_backend_refuses_float64_with_the_reason(name):
    with pytest.raises(BackendError, match=f"filter_sums: the named backend '{name}' cannot run: "):
        filter_sums([torch.ones(3, dtype=torch.float64)], backend=name)


# Arguments, then the error, the argument, what is required of it, and what came.
REFUSED = {
    "fewer means": (
        [torch.ones(3), torch.ones(4)], [torch.ones(3)], ValueError, "means", "2 tensors", "1",
    ),
    "a mean of another shape": (
        [torch.ones(3)], [torch.ones(4)], ValueError, r"means\[0\]", r"\(3,\)", r"\(4,\)",
    ),
    "a mean elsewhere": (
        [torch.ones(3)], [torch.ones(3, device="meta")], ValueError, r"means\[0\]", "on cpu",
        "meta",
    ),
    "a gradient elsewhere": (
        [torch.ones(3), torch.ones(3, device="meta")], [], ValueError, r"grads\[1\]", "on cpu",
        "meta",
    ),
    "a sparse gradient": (
        [torch.ones(3).to_sparse()], [], TypeError, r"grads\[0\]", "dense", "torch.sparse_coo",
    ),
    "an integer gradient": (
        [torch.ones(3).int()], [], TypeError, r"grads\[0\]", "floating point", "torch.int32",
    ),
    "a complex mean": (
        [torch.ones(3)], [torch.ones(3).to(torch.complex64)], TypeError, r"means\[0\]",
        "floating point", "torch.complex64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tensors_are_refused_by_name(case):
    grads, means, error, *words = REFUSED[case]
    with pytest.raises(error) as caught:
        filter_sums(grads, means)
    for word in ("filter_sums: ", *words):
        caught.match(word)


@pytest.mark.parametrize("means", [True, False])
@pytest.mark.parametrize("shapes", [[(3, 5), (4,)], [(0,)], [()]], ids=str)
def test_opcheck_passes(shapes, means):
    lists = pairs(shapes)
    torch.library.opcheck(OP, (lists[0], lists[1] if means else [], None))


def test_fake_tensors_are_accepted():
    with FakeTensorMode():
        sums = OP([torch.ones(3), torch.ones(2)], [], None)
    assert sums.shape == (2, 3) and sums.dtype == torch.float64


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("means", [True, False])
def test_compiled_equals_eager(backend, device, means, compiler):
    torch._dynamo.reset()
    grads, kept = pairs([(40,), (1500,)], device=device)
    kept = kept if means else []
    step = torch.compile(filter_sums, fullgraph=True, backend=compiler)
    expected = filter_sums(grads, kept, backend=backend)
    assert bits(step(grads, kept, backend=backend)) == bits(expected)
    torch._dynamo.reset()


def test_gradients_that_require_grad_are_summed_outside_the_graph(backend, device):
    grad = drawn((40,), device=device).requires_grad_()
    sums = filter_sums([grad], backend=backend)
    assert not sums.requires_grad
    assert_sums(sums, [grad])


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", [(3, 5), (0,), (5000,)], ids=str)
def test_the_examples_of_the_op_keep_their_tolerance(backend, device, shape, dtype):
    """What ``trm-fast doctor`` runs on the machines of users."""
    for name, example in OPS["filter_sums"].examples(shape, dtype, device).items():
        errors = example.errors(backend)
        assert all(errors[key] <= example.tolerance[key] for key in errors), (name, errors)
