"""rms_norm_residual against its formula in float64, on every backend."""

import pytest
import torch
from torch import Tensor

from trm_fast.ops import OPS, rms_norm_residual

from ..conftest import NO_GPU, device_of, skip_unless_usable
from .rms_norm_checks import CASES, Case, assert_right, make, run, truth

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One below and one above what a piece, a task or a tile holds; several of each.
SIZES = (
    ((1, 1, 7), -1), ((33,), -1), ((3, 5, 2), -1), ((40, 16), -1), ((1, 3, 513), -1),
    ((2, 4100), -1), ((2, 1, 1, 64), -1),
    ((1, 3, 1), -2), ((2, 97, 33), -2), ((1, 257, 31), -2), ((2, 3, 513), -2), ((2, 2, 7, 5), -2),
)  # fmt: skip


@pytest.fixture(scope="module", params=["reference", "cpp", "triton"])
def backend(request) -> str:
    """Each backend of this op."""
    skip_unless_usable(request.param)
    return request.param


def skip_unless_runs(backend: str, dtype: torch.dtype) -> None:
    skip_unless_usable(backend)
    reason = OPS["rms_norm_residual"].reason(backend, device_of(backend).type, frozenset({dtype}))
    if reason:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SIZES, ids=str)
def test_outputs_and_gradients_are_those_of_the_formula(backend, device, shape, dim, dtype):
    skip_unless_runs(backend, dtype)
    assert_right(shape, dim, CASES["post-norm"], dtype, backend, device)


@pytest.mark.interpreted(dtype=[torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", [(2, 3, 33), (1, 257, 35), (3, 2, 515)], ids=str)
@pytest.mark.parametrize("case", list(CASES)[1:])
def test_every_part_is_that_of_the_formula(backend, device, case, shape, dim, dtype):
    skip_unless_runs(backend, dtype)
    assert_right(shape, dim, CASES[case], dtype, backend, device)


@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_eps_is_added_to_the_mean(backend, device, eps):
    assert_right((3, 5, 9), -1, CASES["all"], torch.float32, backend, device, eps)


@pytest.mark.parametrize("dim", [-1, -2])
def test_more_samples_than_one_thread_takes(backend, device, dim):
    """Of the kernels; the interpreter would take long."""
    if backend == "triton" and NO_GPU:
        pytest.skip("triton: a GPU shows it; the interpreter runs one program after another")
    assert_right((48, 97, 128), dim, CASES["all"], torch.float32, backend, device)


def plain(x: Tensor, residual: Tensor, weight: Tensor, dim: int) -> Tensor:
    """What one would write in torch, in the dtype of x."""
    h = x + residual
    out = h * torch.rsqrt(h.square().mean(dim, keepdim=True) + 1e-5)
    return out * (weight if dim == -1 else weight[:, None]).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("dim", [-1, -2])
def test_low_precision_is_as_good_as_plain_torch(backend, device, dim, dtype):
    """Error at most twice that of plain torch, three times for gradients; an ulp is always free."""
    skip_unless_runs(backend, dtype)
    inputs = make((4, 31, 65), dim, CASES["weight"], dtype, device)
    x, residual, weight = (tensor.detach().requires_grad_() for tensor in inputs.leaves)
    theirs = plain(x, residual, weight, dim)
    theirs = [theirs, *torch.autograd.grad(theirs, (x, residual, weight), inputs.dout)]
    ours, expected = run(inputs, dim, backend), truth(inputs, dim, dtype)
    for result, other, (true, _), factor in zip(ours, theirs, expected, (2, 3, 3, 3), strict=True):
        ulp = torch.finfo(dtype).eps * float(true.abs().max())
        error, bound = (float((t.detach().double() - true).abs().max()) for t in (result, other))
        assert error <= max(ulp, factor * bound)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dim", [-1, -2])
def test_the_reference_has_the_gradient_of_itself(case, dim):
    skip_unless_usable("reference")
    inputs = make((2, 3, 4), dim, CASES[case], torch.float64)
    leaves = [tensor.double().requires_grad_() for tensor in inputs.leaves]

    def call(*given):
        rest = iter(given)
        tensors = (None if tensor is None else next(rest) for tensor in inputs[:3])
        return rms_norm_residual(*tensors, dim=dim, return_sum=CASES[case].total)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("dim", [-1, -2])
def test_empty_input_gives_empty_output(backend, device, shape, dim):
    inputs = make(shape, dim, CASES["all"], torch.float32, device)
    out, h, dx, dresidual, dweight = run(inputs, dim, backend)
    assert out.shape == h.shape == dx.shape == dresidual.shape == shape
    assert torch.equal(dweight, torch.zeros_like(inputs.weight))


VIEWS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "rows apart": lambda x: torch.cat((x, x), -1)[..., : x.size(-1)],
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(backend, device, view, dim):
    inputs = make((2, 7, 9), dim, CASES["all"], torch.float32, device)
    given = inputs._replace(
        **{name: VIEWS[view](getattr(inputs, name)) for name in ("x", "residual", "dout", "dsum")}
    )
    plain = given._replace(
        **{name: getattr(given, name).clone() for name in ("x", "residual", "dout", "dsum")}
    )
    # Torch may add up a mean in another order where its input lies in another one.
    near = {"rtol": 0, "atol": 64 * 2.0**-24} if backend == "reference" else {"rtol": 0, "atol": 0}
    for result, expected in zip(run(given, dim, backend), run(plain, dim, backend), strict=True):
        torch.testing.assert_close(result, expected, **near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [-1, -2])
def test_the_norm_is_that_of_the_sum_that_is_returned(backend, device, dim, dtype):
    skip_unless_runs(backend, dtype)
    x, residual, *_ = make((2, 5, 33), dim, Case(), dtype, device)
    out, h = rms_norm_residual(x, residual, dim=dim, return_sum=True, backend=backend)
    assert torch.equal(out, rms_norm_residual(h, dim=dim, backend=backend))


def test_the_sum_of_one_tensor_is_itself(backend, device):
    x = make((3, 5), -1, Case(), torch.float32, device).x
    assert rms_norm_residual(x, return_sum=True, backend=backend)[1] is x


@pytest.mark.parametrize("case", ["pre-norm", "all"])
def test_one_of_two_outputs_may_carry_the_gradient(backend, device, case):
    inputs = make((3, 4, 9), -1, CASES[case], torch.float32, device)
    x = inputs.x.clone().requires_grad_()
    call = {"return_sum": True, "backend": backend}
    _, h = rms_norm_residual(x, inputs.residual, inputs.weight, **call)
    assert torch.equal(*torch.autograd.grad(h, x, inputs.dsum), inputs.dsum)
    out, _ = rms_norm_residual(x, inputs.residual, inputs.weight, **call)
    dx, bound = truth(inputs._replace(dsum=0 * inputs.dsum), -1, torch.float32)[2]
    found = torch.autograd.grad(out, x, inputs.dout)[0]
    assert float((found.double() - dx).abs().max()) <= bound


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_gradients_that_are_needed_are_given(backend, device, needed):
    inputs = make((3, 4, 9), -1, CASES["weight"], torch.float32, device)
    expected = run(inputs, -1, backend)[1 + needed]
    given = [tensor.clone() for tensor in inputs.leaves]
    given[needed].requires_grad_()
    rms_norm_residual(*given, backend=backend).backward(inputs.dout)
    assert torch.equal(given[needed].grad, expected)
    assert all(given[i].grad is None for i in range(3) if i != needed)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", CASES)
def test_without_gradients_the_result_is_the_same(backend, device, case, mode):
    inputs = make((2, 5, 33), -2, CASES[case], torch.float32, device)
    expected = run(inputs, -2, backend)
    options = {"dim": -2, "return_sum": CASES[case].total, "backend": backend}
    with mode():
        x = inputs.x.clone().requires_grad_()
        found = rms_norm_residual(x, inputs.residual, inputs.weight, **options)
    found = found if isinstance(found, tuple) else (found,)
    for result, other in zip(found, expected, strict=False):
        assert torch.equal(result, other)
    assert not found[0].requires_grad


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_autocast_decides_the_dtype(backend, device, dtype):
    skip_unless_runs(backend, dtype)
    inputs = make((2, 5, 33), -1, CASES["all"], torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]
    with torch.autocast(device.type, dtype):
        out, h = rms_norm_residual(*leaves, return_sum=True, backend=backend)
    low = inputs.to(dtype)._replace(weight=inputs.weight.detach())
    assert out.dtype == h.dtype == dtype
    expected = run(low._replace(x=low.x.detach(), residual=low.residual.detach()), -1, backend)
    grads = torch.autograd.grad((out, h), leaves, (low.dout, low.dsum))
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    for result, other in zip((out, h, *grads), expected, strict=True):
        assert torch.equal(result, other.to(result.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_weight_has_its_dtype(backend, device, dtype):
    inputs = make((2, 5, 33), -1, CASES["weight"], torch.float32, device)
    weight = inputs.weight.to(dtype)
    weights = (weight, weight.float())
    low, full = (run(inputs._replace(weight=w), -1, backend)[-1] for w in weights)
    assert low.dtype == dtype and torch.equal(low, full.to(dtype))


def test_float64_stays_float64():
    skip_unless_usable("reference")
    inputs = make((2, 5, 33), -1, CASES["weight"], torch.float32).to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(inputs, -1, None)
    expected = truth(inputs, -1, torch.float64)
    # Of float64: 2 n + 8 roundings, as in `truth`.
    for result, (true, bound) in zip(found, expected, strict=True):
        assert result.dtype == torch.float64
        assert float((result - true).abs().max()) <= bound * 2.0**-28


def test_large_float16_does_not_overflow(backend, device):
    skip_unless_runs(backend, torch.float16)
    x = torch.full((2, 8), 6e4, dtype=torch.float16, device=device)
    assert torch.equal(rms_norm_residual(x, x, backend=backend), torch.ones_like(x))


@pytest.mark.parametrize("dim", [-1, -2])
def test_zeros_stay_zero(backend, device, dim):
    x = torch.zeros(2, 3, 5, device=device)
    assert torch.equal(rms_norm_residual(x, x, dim=dim, backend=backend), x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_own_mean_alone(backend, device, value):
    x = make((3, 4, 9), -1, Case(), torch.float32, device).x
    expected = rms_norm_residual(x, backend=backend)
    x[1, 2, 3] = value
    found = rms_norm_residual(x, backend=backend)
    assert found[1, 2, 3].isnan()
    found[1, 2], expected[1, 2] = 0, 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_result_does_not_depend_on_the_number_of_threads(dim, dtype):
    skip_unless_usable("cpp")
    inputs, before = make((9, 97, 515), dim, CASES["all"], dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(inputs, dim, "cpp"))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


@pytest.mark.parametrize(("case", "kept"), [("post-norm", 1), ("weight", 2), ("all", 1)])
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_little_is_kept_for_backward(name, case, kept):
    """The output, or h, or x and residual; beside them only what is small."""
    skip_unless_usable(name)
    inputs = make((2, 5, 33), -1, CASES[case], torch.float32, device_of(name))
    leaves = [tensor.requires_grad_() for tensor in inputs.leaves]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda t: t):
        rms_norm_residual(*leaves, return_sum=CASES[case].total, backend=name)
    assert sizes.count(inputs.x.numel()) == kept
    assert sum(size for size in sizes if size < inputs.x.numel()) <= 10 + 33


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(), (7,), (33, 32), (0, 3), (2, 9, 4)], ids=str)
def test_the_examples_of_the_op_keep_their_tolerance(backend, device, shape, dtype):
    """What ``trm-fast doctor`` runs on the machines of users."""
    skip_unless_runs(backend, dtype)
    for name, example in OPS["rms_norm_residual"].examples(shape, dtype, device).items():
        errors = example.errors(backend)
        assert errors.keys() == example.tolerance.keys()
        assert all(errors[key] <= example.tolerance[key] for key in errors), (name, errors)
