"""What the tests of swiglu share: inputs, the truth in float64 and the error it allows."""

import torch
from torch import Tensor

from trm_fast.ops import swiglu

U = 2.0**-24  # a rounding in float32
NAMES = ("out", "x.grad", "gate_up.grad", "down.grad", "bias.grad")


def make(
    shape: tuple[int, ...], inner: int, width: int, dtype: torch.dtype, device=None
) -> tuple[list[Tensor], Tensor]:
    """Returns x, gate_up, down and bias, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: int = 1) -> Tensor:
        drawn = torch.randn(size, generator=generator) / max(1, scale) ** 0.5
        return drawn.to(device, dtype)

    depth = shape[-1]
    weights = [draw(2 * inner, depth, scale=depth), draw(width, inner, scale=inner), draw(width)]
    return [draw(*shape), *weights], draw(*shape[:-1], width)


def run(inputs: list[Tensor], dout: Tensor, backend: str | None) -> dict[str, Tensor]:
    """Returns the output and the gradient of each input, by name."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = swiglu(*leaves, backend=backend)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, dout)), strict=False))


def truth(
    inputs: list[Tensor], dout: Tensor, dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """The formula in float64, with the error that each element may have.

    A sum of n products in float32 is off by at most n u of the sum of their sizes, and what is
    stored in the dtype by e, a whole eps, as Triton's interpreter cuts off. Errors go on as
    the derivatives say: |silu'| < 1.1, |silu''| <= 0.5, |silu(g)| <= |g|.
    """
    e = torch.finfo(dtype).eps
    shape, width = inputs[0].shape, inputs[2].size(0)
    x, gate_up, down = (tensor.double() for tensor in inputs[:3])
    n, inner = shape[:-1].numel(), down.size(1)
    x, dout = x.reshape(n, shape[-1]), dout.double().reshape(n, width)

    def product(a: Tensor, b: Tensor, off: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """a b and its error, where a is off by ``off``."""
        bound = (a.size(1) * U + e) * (a.abs() @ b.abs())
        return a @ b, bound if off is None else bound + off @ b.abs()

    both, off = product(x, gate_up.T)
    (gate, up), (off_gate, off_up) = ((t[:, :inner], t[:, inner:]) for t in (both, off))
    sigmoid = 1 / (1 + torch.exp(-gate))
    silu = gate * sigmoid
    act = silu * up
    off_silu = 1.1 * off_gate + e * silu.abs()
    off_act = off_silu * up.abs() + silu.abs() * off_up + e * act.abs()
    out, off_out = product(act, down.T, off_act)
    if len(inputs) > 3:
        out, off_out = out + inputs[3].double(), off_out + e * (out + inputs[3].double()).abs()

    dact, off_dact = product(dout, down)
    dup, slope = dact * silu, sigmoid * (1 + gate * (1 - sigmoid))
    off_dup = off_dact * silu.abs() + dact.abs() * off_silu + e * dup.abs()
    dgate, size = dact * up * slope, (dact * up).abs()
    off_dgate = 1.1 * (off_dact * up.abs() + dact.abs() * off_up + 3 * e * size)
    off_dgate += 0.5 * size * off_gate
    grads, off_grads = torch.cat((dgate, dup), 1), torch.cat((off_dgate, off_dup), 1)
    found = {
        "out": (out, off_out),
        "x.grad": product(grads, gate_up, off_grads),
        "gate_up.grad": product(grads.T, x, off_grads.T),
    }
    ddown, off_ddown = product(act.T, dout, off_act.T)
    found["down.grad"] = ddown.T, off_ddown.T
    if len(inputs) > 3:
        found["bias.grad"] = dout.sum(0), (n * U + e) * dout.abs().sum(0)
    for name, last in (("out", width), ("x.grad", shape[-1])):
        found[name] = tuple(t.reshape(*shape[:-1], last) for t in found[name])
    return found


def assert_right(inputs: list[Tensor], dout: Tensor, backend: str | None) -> None:
    dtype = inputs[0].dtype
    found = run(inputs, dout, backend)
    expected = truth(inputs, dout, dtype)
    assert found.keys() == expected.keys()
    for name, (true, bound) in expected.items():
        assert found[name].shape == true.shape and found[name].dtype == dtype
        assert bool(((found[name].double() - true).abs() <= bound).all()), name
