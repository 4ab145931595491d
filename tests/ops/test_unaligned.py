"""Tensors that lie anywhere, as those that are mapped from files, give the same bits as others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trm_fast import ops
from trm_fast.ops._adaptive_settings import Settings
from trm_fast.ops.latent_update import Network
from trm_fast.ops.vector_latent_update import shapes_of

from ..conftest import skip_unless_usable

Place = Callable[[Tensor], Tensor]


def unaligned(like: Tensor) -> Tensor:
    """A copy that begins one byte behind a multiple of 64, and needs a gradient if that does."""
    memory = bytearray(like.nbytes + 64)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 64 + 1
    made = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=first)
    made = made.view(like.shape).copy_(like.detach())
    assert made.data_ptr() % 64 == 1
    return made.requires_grad_(like.requires_grad)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def with_gradients(op: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    out = op(*(tensor.requires_grad_() for tensor in inputs))
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


def norm(place: Place, dtype: torch.dtype, dim: int) -> list[Tensor]:
    x, weight = drawn(2, 3, 600, dtype=dtype), drawn(3 if dim == -2 else 600)
    return with_gradients(
        lambda x, weight: ops.rms_norm_residual(x, weight=weight, dim=dim, backend="cpp"),
        place(x), place(weight),
    )  # fmt: skip


def loss(place: Place, dtype: torch.dtype, vocabulary: int) -> list[Tensor]:
    labels = place(torch.arange(6).view(2, 3))
    return with_gradients(
        lambda logits: ops.stablemax_cross_entropy(logits, labels, backend="cpp").loss,
        place(drawn(2, 3, vocabulary, dtype=dtype)),
    )


def vectors(place: Place, dtype: torch.dtype, recompute: bool) -> list[Tensor]:
    inputs = [*[drawn(3, 32, dtype=dtype)] * 3, *(drawn(*shape) / 8 for shape in shapes_of(32))]

    def op(x: Tensor, y: Tensor, z: Tensor, *weights: Tensor) -> Tensor:
        y, z = ops.vector_latent_update(
            x, y, z, weights, n=2, T=1, recompute=recompute, backend="cpp"
        )
        return y + z

    return with_gradients(op, *map(place, inputs))


def latent(place: Place, dtype: torch.dtype, recompute: bool) -> list[Tensor]:
    shapes = ((8, 5), (5, 4), (64, 32), (32, 32))
    inputs = [*[drawn(2, 5, 32, dtype=dtype)] * 3, *(drawn(*shape) / 8 for shape in shapes)]

    def op(x: Tensor, y: Tensor, z: Tensor, *weights: Tensor) -> Tensor:
        y, z = ops.latent_update(
            x, y, z, weights, Network("mlp_t"), n=2, T=1, recompute=recompute, backend="cpp"
        )
        return y + z

    return with_gradients(op, *map(place, inputs))


def matrices(place: Place, dtype: torch.dtype, rows: int) -> list[Tensor]:
    given = [place(drawn(rows, 37, dtype=dtype))]
    ops.newton_schulz_(given, dtype=torch.bfloat16, backend="cpp")
    return given


def step(place: Place, dtype: torch.dtype, filter: str) -> list[Tensor]:
    size = 2100
    param, grad = (place(drawn(size, dtype=dtype)) for _ in range(2))
    first, slow, average = (place(drawn(size)) for _ in range(3))
    second, ring = place(drawn(size).square()), place(drawn(3, size))
    counters = [place(torch.tensor(4.0)) for _ in range(2)]
    ops.adaptive_step_(
        [param], [grad], [first], [second], counters[:1], [slow], counters[1:], [average],
        [ring] if filter == "ma" else [],
        settings=Settings(1e-2, filter=filter, lamb=2.0, weight_ema=0.9), backend="cpp",
    )  # fmt: skip
    return [param, first, second, slow, average, ring, *counters]


CASES = {
    "rms_norm_residual": (norm, (-1, -2)),
    "stablemax_cross_entropy": (loss, (7, 40)),
    "vector_latent_update": (vectors, (False, True)),
    "latent_update": (latent, (False, True)),
    "newton_schulz": (matrices, (20, 50)),
    "adaptive_step": (step, ("projection", "ma")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("page", "option"), [(page, option) for page in CASES for option in CASES[page][1]]
)
def test_unaligned_tensors_give_the_same_bits(page, option, dtype):
    skip_unless_usable("cpp")
    if reason := ops.OPS[page].reason("cpp", "cpu", frozenset({torch.bfloat16})):
        pytest.skip(reason)
    op = CASES[page][0]
    pairs = zip(op(torch.clone, dtype, option), op(unaligned, dtype, option), strict=True)
    assert all(torch.equal(aligned, other) for aligned, other in pairs)
