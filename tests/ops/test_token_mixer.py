"""The numbers of token_mixer: every backend against the formula in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from trm_fast._dispatch import OPS
from trm_fast.ops import token_mixer

from ..conftest import NO_GPU, device_of, skip_unless_usable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["reference", "triton"])
def backend(request) -> str:
    skip_unless_usable(request.param)
    return request.param


def skip_unless_exact(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and NO_GPU:
        pytest.skip("triton: the interpreter cuts bfloat16 off, where a GPU rounds")


def drawn(batch, length, width, inner, dtype=torch.float64, weights=None):
    """x, gate_up, down of the scale of trained ones, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, d_out = (randn(batch, length, width).to(dtype) for _ in range(2))
    gate_up = randn(2 * inner, length) / max(length, 1) ** 0.5
    down = randn(length, inner) / max(inner, 1) ** 0.5
    kept = weights or dtype
    return [x, gate_up.to(kept), down.to(kept)], d_out


def truth(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sample by sample."""
    inner = down.shape[1]
    outs = []
    for tokens in x:
        gate, up = gate_up[:inner] @ tokens, gate_up[inner:] @ tokens
        outs.append(down @ (gate * torch.sigmoid(gate) * up))
    return torch.stack(outs) if outs else x.clone()


def plain(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The operators that official TRM applies: to the transpose, with weights that are cast."""
    gate, up = linear(x.mT, gate_up.to(x.dtype)).chunk(2, -1)
    return linear(silu(gate) * up, down.to(x.dtype)).mT


def grads_of(function, tensors: list[Tensor], d_out: Tensor, **options) -> list[Tensor]:
    """Output, then the gradients of x, gate_up and down."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def run(backend: str, tensors: list[Tensor], d_out: Tensor) -> list[Tensor]:
    device = device_of(backend)
    moved = [x.to(device) for x in tensors]
    return [x.cpu() for x in grads_of(token_mixer, moved, d_out.to(device), backend=backend)]


def true_grads(tensors: list[Tensor], d_out: Tensor) -> list[Tensor]:
    return grads_of(truth, [x.double() for x in tensors], d_out.double())


def assert_near_torch(backend: str, tensors: list[Tensor], d_out: Tensor) -> None:
    """At most twice the error of plain torch in the same dtype, in gradients three times.

    Torch may be exact by luck, so an ulp of the largest value is allowed too; in float32, where all
    error is that of sums over length, inner and width, as many as a random walk of their steps.
    """
    found = run(backend, tensors, d_out)
    theirs, expected = grads_of(plain, tensors, d_out), true_grads(tensors, d_out)
    steps = sum(tensors[0].shape) + tensors[2].shape[1]
    for i, (ours, torchs, true) in enumerate(zip(found, theirs, expected, strict=True)):
        assert ours.dtype == torchs.dtype
        ulps = steps**0.5 if tensors[0].dtype == torch.float32 else 1.0
        floor = ulps * torch.finfo(tensors[0].dtype).eps * true.abs().max()
        bound = torch.maximum((3 if i else 2) * (torchs.double() - true).abs().max(), floor)
        assert (ours.double() - true).abs().max() <= bound


@pytest.mark.parametrize("size", [(2, 9, 5, 7), (1, 1, 1, 1), (3, 97, 4, 8)], ids=str)
def test_the_reference_is_the_formula(size):
    tensors, d_out = drawn(*size)
    found, expected = run("reference", tensors, d_out), true_grads(tensors, d_out)
    for ours, true in zip(found, expected, strict=True):
        # Sums over length, inner and all channels, of terms below 16 that round once each.
        bound = 16 * sum(size) * size[0] * torch.finfo(torch.float64).eps
        assert (ours - true).abs().max() <= bound


# Around the blocks of positions (16, 32), rows (64) and channels (64, 128), and the official ones.
SIZES = [
    (1, 1, 1, 1), (2, 7, 5, 3), (1, 81, 130, 65), (2, 97, 64, 63), (1, 97, 129, 64),
    (3, 32, 16, 24), (2, 33, 66, 130), (1, 916, 4, 5),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_error_is_that_of_torch(backend, size, dtype):
    skip_unless_exact(backend, dtype)
    assert_near_torch(backend, *drawn(*size, dtype=dtype))


@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_weights_are_cast_and_their_gradients_cast_back(backend, weights):
    tensors, d_out = drawn(2, 9, 16, 8, dtype=torch.float16, weights=weights)
    assert_near_torch(backend, tensors, d_out)
    assert [x.dtype for x in run(backend, tensors, d_out)] == [torch.float16] * 2 + [weights] * 2


def test_gradients_pass_gradcheck():
    tensors, _ = drawn(2, 5, 3, 4)
    assert torch.autograd.gradcheck(token_mixer, [x.requires_grad_() for x in tensors])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_any_part_of_the_gradients_is_the_same(backend, wanted):
    tensors, d_out = drawn(2, 9, 16, 8, dtype=torch.float32)
    device = device_of(backend)
    moved = [x.to(device).requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    out = token_mixer(*moved, backend=backend)
    grads = torch.autograd.grad(out, [moved[i] for i in wanted], d_out.to(device))
    every = run(backend, tensors, d_out)[1:]
    assert all(torch.equal(g.cpu(), every[i]) for i, g in zip(wanted, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_views_with_gaps_are_read_as_they_are(backend, dtype):
    (x, gate_up, down), d_out = drawn(2, 9, 16, 8, dtype=dtype)
    views = [
        torch.stack((x, x), -1)[..., 0],
        gate_up.mT.contiguous().mT,
        torch.cat((down, down), 1)[:, :8],
    ]
    assert not any(view.is_contiguous() for view in views)
    turned = d_out.mT.contiguous().mT
    found, expected = run(backend, views, turned), true_grads([x, gate_up, down], d_out)
    for ours, true in zip(found, expected, strict=True):
        # Weights, gate, up, act, d_act, both gradients and the result are rounded once each.
        bound = 8 * torch.finfo(dtype).eps * max(1.0, float(true.abs().max()))
        assert (ours.double() - true).abs().max() <= bound


@pytest.mark.parametrize("size", [(0, 9, 4, 3), (2, 9, 0, 3), (2, 0, 4, 3), (2, 9, 4, 0)], ids=str)
def test_nothing_gives_nothing(backend, size):
    tensors, d_out = drawn(*size, dtype=torch.float32)
    found = run(backend, tensors, d_out)
    assert [x.shape for x in found] == [d_out.shape, *(x.shape for x in tensors)]
    assert not any(x.any() for x in found)


def test_the_same_call_gives_the_same_bits_and_changes_no_input(backend):
    tensors, d_out = drawn(2, 33, 16, 8, dtype=torch.float16)
    before = [x.clone() for x in tensors]
    one, other = (run(backend, tensors, d_out) for _ in range(2))
    assert all(map(torch.equal, one, other)) and all(map(torch.equal, tensors, before))


def test_a_large_gate_neither_overflows_nor_is_lost(backend):
    tensors, d_out = drawn(1, 9, 16, 8, dtype=torch.float32)
    tensors[1][:8] *= 1e4
    found, expected = run(backend, tensors, d_out), true_grads(tensors, d_out)
    for ours, true in zip(found, expected, strict=True):
        # A gate of 1e4 is off by 1e4 eps, and so is where the slope of silu between 0 and 1 lies.
        assert (ours.double() - true).abs().max() <= 1e4 * 2.0**-23 * true.abs().max()


@pytest.mark.parametrize("shape", [(), (7,), (33, 32), (5, 100), (2, 9, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_examples_are_within_their_bounds(backend, shape, dtype):
    examples = OPS["token_mixer"].examples(shape, dtype, device_of(backend))
    for example in examples.values():
        errors = example.errors(backend)
        assert {*errors} == {"out", "d_x", "d_gate_up", "d_down"}
        assert all(errors[name] <= example.tolerance[name] for name in errors)
