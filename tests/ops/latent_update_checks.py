"""What the tests of latent_update share: inputs, the formula, and the error that it allows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trm_fast.ops import OPS, Network, latent_update

from ..conftest import device_of, skip_unless_usable


class Case(NamedTuple):
    """Sizes of a call; ``mix`` is the inner width of the token mixer."""

    mixer: str = "mlp_t"
    batch: int = 3
    length: int = 7
    width: int = 32
    inner: int = 32
    mix: int = 34
    heads: int = 1
    layers: int = 1
    theta: float | None = 10000.0
    n: int = 2
    T: int = 2
    grad_cycles: int = 1

    @property
    def network(self) -> Network:
        return Network(self.mixer, self.heads, self.theta)

    @property
    def counts(self) -> dict[str, int]:
        return {"n": self.n, "T": self.T, "grad_cycles": self.grad_cycles}

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.length, self.width

    def __str__(self) -> str:
        same = self._field_defaults
        changed = [f"{k}{v}" for k, v in self._asdict().items() if v != same[k] and k != "mixer"]
        return "-".join([self.mixer, *changed])


class Inputs(NamedTuple):
    x: Tensor
    y: Tensor
    z: Tensor
    weights: list[Tensor]
    dy: Tensor
    dz: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [self.x, self.y, self.z, *self.weights]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        first = [change(tensor) for tensor in self[:3]]
        weights = [change(weight) for weight in self.weights]
        return Inputs(*first, weights, change(self.dy), change(self.dz))


def make(case: Case, dtype: torch.dtype = torch.float32, device=None, seed: int = 0) -> Inputs:
    """Random states and their gradients in ``dtype``, and weights that it can hold, in float32 (in
    float64 for float64)."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    def weight(rows: int, cols: int) -> Tensor:
        return (torch.randn(rows, cols, generator=generator) / max(1, cols) ** 0.5).to(dtype)

    length, width, inner, mix = case.length, case.width, case.inner, case.mix
    shapes = [(3 * width, width), (width, width)]
    if case.mixer == "mlp_t":
        shapes = [(2 * mix, length), (length, mix)]
    shapes = [*shapes, (2 * inner, width), (width, inner)] * case.layers
    states = [draw(*case.shape) for _ in range(5)]
    weights = [weight(*shape).to(device, stored) for shape in shapes]
    return Inputs(*states[:3], weights, *states[3:])


def skip_unless_runs(backend: str, dtype: torch.dtype = torch.float32) -> None:
    skip_unless_usable(backend)
    kind = device_of(backend).type
    reason = OPS["latent_update"].reason(backend, kind, frozenset({dtype}))
    if reason:
        pytest.skip(f"{backend}: {reason}")


def names_of(case: Case) -> list[str]:
    """The names of what ``results`` finds."""
    states = ["x.grad", "y.grad", "z.grad"] if case.grad_cycles == case.T else ["x.grad"]
    weights = [f"weights[{i}].grad" for i in range(4 * case.layers)]
    return ["y", "z", *(states + weights if case.grad_cycles else [])]


def results(
    call: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, case: Case
) -> dict[str, Tensor]:
    """Returns the outputs of a call and, where there are any, the gradients, by name."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
    y, z = call(*leaves[:3], leaves[3:])
    found = [y.detach(), z.detach()]
    if case.grad_cycles:
        wanted = leaves if case.grad_cycles == case.T else [leaves[0], *leaves[3:]]
        found += torch.autograd.grad((y, z), wanted, (inputs.dy.to(y), inputs.dz.to(z)))
    return dict(zip(names_of(case), found, strict=True))


def run(inputs: Inputs, case: Case, backend: str | None, **options: Any) -> dict[str, Tensor]:
    """Returns outputs and gradients of the op."""

    def call(x: Tensor, y: Tensor, z: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        return latent_update(
            x, y, z, weights, case.network, **case.counts, backend=backend, **options
        )

    return results(call, inputs, case)


def truth(inputs: Inputs, case: Case) -> dict[str, Tensor]:
    """The formula in float64; its gradients are those of torch, whose formulas are not ours."""
    return plain(inputs.map(Tensor.double), case)


def plain(inputs: Inputs, case: Case) -> dict[str, Tensor]:
    """The same in the dtype of the inputs, with weights, norms and rotations cast as the official
    code does."""

    def call(x: Tensor, y: Tensor, z: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        for cycle in range(case.T):
            with torch.set_grad_enabled(cycle >= case.T - case.grad_cycles):
                for _ in range(case.n):
                    z = net(z + (y + x), weights, case)
                y = net(y + z, weights, case)
        return y, z

    return results(call, inputs, case)


def net(h: Tensor, weights: list[Tensor], case: Case) -> Tensor:
    cast = [weight.to(h.dtype) for weight in weights]
    for layer in range(case.layers):
        mix_in, mix_out, gate_up, down = cast[4 * layer : 4 * layer + 4]
        if case.mixer == "mlp_t":
            turned = h.transpose(1, 2)
            h = rms(turned + swiglu(turned, mix_in, mix_out)).transpose(1, 2)
        else:
            h = rms(h + attention(h, mix_in, case) @ mix_out.T)
        h = rms(h + swiglu(h, gate_up, down))
    return h


def wide(h: Tensor) -> Tensor:
    return h if h.dtype == torch.float64 else h.float()


def rms(h: Tensor, eps: float = 1e-5) -> Tensor:
    v = wide(h)
    return (v / torch.sqrt((v * v).mean(-1, keepdim=True) + eps)).to(h.dtype)


def swiglu(h: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (h @ gate_up.T).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up) @ down.T


def attention(h: Tensor, qkv: Tensor, case: Case) -> Tensor:
    batch, length, width = h.shape
    parts = (h @ qkv.T).view(batch, length, 3, case.heads, width // case.heads)
    q, k, v = (parts[:, :, i].transpose(1, 2) for i in range(3))
    q, k = (rotated(part, case.theta) for part in (q, k))
    scores = wide(q) @ wide(k).mT / (width // case.heads) ** 0.5
    mixed = torch.softmax(scores, -1).to(h.dtype) @ v
    return mixed.transpose(1, 2).reshape(batch, length, width)


def rotated(q: Tensor, theta: float | None) -> Tensor:
    """q [..., length, dim], by the angle l theta^(-2i / dim) in the plane of features i and
    i + dim / 2."""
    if theta is None:
        return q
    cos, sin = (table.to(q.device, wide(q).dtype) for table in tables(*q.shape[-2:], theta))
    a, b = wide(q).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(q.dtype)


def tables(length: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    angle = torch.arange(length, dtype=torch.float64)[:, None]
    angle = angle * theta ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    return angle.cos(), angle.sin()


def errors(found: Tensor, true: Tensor) -> tuple[float, float]:
    """Errors in the Euclidean and in the largest norm, relative to the true ones."""
    off = (found.double() - true).flatten()
    norms = (2, float("inf"))
    found_norms = [float(torch.linalg.vector_norm(off, p)) for p in norms]
    scales = [float(torch.linalg.vector_norm(true, p)) or 1.0 for p in norms]
    return found_norms[0] / scales[0], found_norms[1] / scales[1]


def assert_as_good_as_plain(
    inputs: Inputs, case: Case, backend: str | None, shakes: int = 1, **options
) -> None:
    """A recursion enlarges the error of each rounding for all who round, so the measure is plain
    torch: twice its error in the Euclidean norm, three times for gradients, and twice that for the
    largest error, which one element decides. Plain torch may be lucky, so what an eps, two
    roundings, in each input makes of the truth counts as its error too, and as that of ``shakes``
    independent ones; an eps is always free."""
    found, expected = run(inputs, case, backend, **options), truth(inputs, case)
    theirs, moved = plain(inputs, case), truth(shaken(inputs, shakes), case)
    assert found.keys() == expected.keys()
    for name, true in expected.items():
        stored = inputs.weights[0].dtype if name.startswith("weights") else inputs.x.dtype
        assert found[name].shape == true.shape and found[name].dtype == stored, name
        others, factor = (theirs[name], moved[name]), 3 if name.endswith("grad") else 2
        assert_near(found[name], others, true, factor, name)


def shaken(inputs: Inputs, shakes: int) -> Inputs:
    """The inputs in float64, each element off by up to an eps of the dtype of x, so many times."""
    generator = torch.Generator().manual_seed(1)
    eps = torch.finfo(inputs.x.dtype).eps * shakes**0.5

    def shake(tensor: Tensor) -> Tensor:
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return tensor.double() * (1 + eps * noise.to(tensor.device))

    return inputs.map(shake)


def assert_near(
    found: Tensor, others: tuple[Tensor, ...], true: Tensor, factor: int, name: str
) -> None:
    """The first of the others is plain torch's."""
    eps = torch.finfo(others[0].dtype).eps
    limits = [max(each) for each in zip(*(errors(other, true) for other in others), strict=True)]
    assert limits[0] < 0.3, (name, limits)  # else hardly anything could fail
    for ours, theirs, most in zip(errors(found, true), limits, (factor, 2 * factor), strict=True):
        assert ours <= max(most * theirs, eps), (name, ours, theirs)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same to the last bit; NaN is NaN."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)
