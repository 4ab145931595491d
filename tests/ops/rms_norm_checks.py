"""What the tests of rms_norm_residual share: inputs, the truth in float64 and allowed errors."""

from typing import NamedTuple

import torch
from torch import Tensor

from trm_fast.ops import rms_norm_residual

U = 2.0**-24  # a rounding in float32
EPS = 1e-5


class Case(NamedTuple):
    """Which parts of the op a test uses."""

    residual: bool = True
    weight: bool = False
    total: bool = False


CASES = {
    "post-norm": Case(),
    "norm alone": Case(residual=False),
    "weight": Case(weight=True),
    "weight alone": Case(residual=False, weight=True),
    "pre-norm": Case(total=True),
    "all": Case(weight=True, total=True),
}


class Inputs(NamedTuple):
    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    dout: Tensor
    dsum: Tensor | None

    def to(self, *args, **kwargs) -> "Inputs":
        return Inputs(*(None if t is None else t.to(*args, **kwargs) for t in self))

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self[:3] if tensor is not None]

    @property
    def grads(self) -> list[Tensor]:
        return [self.dout] if self.dsum is None else [self.dout, self.dsum]


def make(shape: tuple[int, ...], dim: int, case: Case, dtype: torch.dtype, device=None) -> Inputs:
    """Random tensors; the weight is float32, as parameters are."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    weight = 1 + draw(shape[dim]).float() / 4 if case.weight else None
    inputs = Inputs(
        draw(*shape),
        draw(*shape) if case.residual else None,
        weight,
        draw(*shape),
        draw(*shape) if case.total else None,
    )
    return inputs


def run(inputs: Inputs, dim: int, backend: str | None, eps: float = EPS) -> list[Tensor]:
    """Returns the outputs, then the gradients of x, residual and weight, those that there are."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.leaves]
    rest = iter(leaves)
    x, residual, weight = (None if t is None else next(rest) for t in inputs[:3])
    options = {"dim": dim, "eps": eps, "backend": backend}
    found = rms_norm_residual(x, residual, weight, return_sum=inputs.dsum is not None, **options)
    outputs = list(found) if isinstance(found, tuple) else [found]
    grads = torch.autograd.grad(outputs, leaves, inputs.grads)
    return [*(tensor.detach() for tensor in outputs), *grads]


def truth(
    inputs: Inputs,
    dim: int,
    dtype: torch.dtype,
    eps: float = EPS,
    returned: Tensor | None = None,
) -> list[tuple[Tensor, float]]:
    """The outputs and gradients of ``run`` in float64, with the error that each may have.

    What follows h is taken from the h that was ``returned``, if it was. u is half of float32's eps,
    e the eps of the dtype, n the size of the mean, N the number of means. The sum of n squares is
    off by at most n u of itself, its root by half of that, and few more roundings follow; the
    result is rounded to the dtype, by up to e, as Triton's interpreter cuts off. In the gradient
    u = h r may be taken from the rounded output, another e / 2 in two places, and its mean is a sum
    of n terms; all of it is at most r (|g| + |u| mean |g u|). Sums of N terms make the gradient of
    the weight.
    """
    e = torch.finfo(dtype).eps
    x, residual, weight, dout, dsum = inputs.to(torch.float64)
    h = x if residual is None else x + residual
    exact, h = h, h if returned is None else returned.double()
    n, means = h.size(dim), h.numel() // max(1, h.size(dim))
    r = ((h * h).mean(dim, keepdim=True) + eps) ** -0.5
    w = 1.0 if weight is None else weight if dim == -1 else weight[:, None]
    u, g = h * r, w * dout
    out, dx = u * w, r * (g - u * (g * u).mean(dim, keepdim=True))
    size = r * (g.abs() + u.abs() * (g * u).abs().mean(dim, keepdim=True))
    if dsum is not None:
        dx, size = dx + dsum, size + dsum.abs()
    bound = float(size.max()) * ((2 * n + 8) * U + 2 * e)
    found = [(out, float(out.abs().max()) * ((n / 2 + 8) * U + e))]
    if dsum is not None:
        found.append((exact, 0.0 if residual is None else e * float(exact.abs().max())))
    found.append((dx, bound))
    if residual is not None:
        found.append((dx, bound))
    if weight is not None:
        others = [i for i in range(h.dim()) if i != h.dim() + dim]
        total = (dout * u).abs().sum(others)
        found.append(((dout * u).sum(others), float(total.max()) * (means + n / 2 + 8) * U))
    return found


def assert_right(shape, dim, case, dtype, backend, device, eps: float = EPS) -> None:
    inputs = make(shape, dim, case, dtype, device)
    found = run(inputs, dim, backend, eps)
    expected = truth(inputs, dim, dtype, eps, found[1] if case.total else None)
    assert len(found) == len(expected)
    for result, (true, bound) in zip(found, expected, strict=True):
        assert result.shape == true.shape
        assert float((result.double() - true).abs().max()) <= bound
