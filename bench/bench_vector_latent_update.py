"""The recursion on vectors: ours beside eager torch and torch.compile, forward and whole step.

T = 3 levels of n = 6 steps, y once per level, gradients of the last level, as a classifier trains.
A row is measured after its results were compared with the same recursion in float64. Rates count
the multiply-adds of the formula read literally, 81 h^2 for each row of the batch, of which ours
computes 49 h^2; beside them stands the rate of torch.mm at the shape of the batch.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from trm_fast.ops import OPS, vector_latent_update

from ._tables import DEVICES, Case, Row, Unavailable, rows_of

SIZES = [(128, 32), (128, 256), (256, 32), (256, 256)]
N, T = 6, 3
OURS, EAGER, COMPILED, GEMM = "trm_fast ", "eager", "torch.compile", "torch.mm, 20 times"
PRODUCTS = 20
Recursion = Callable[..., tuple[Tensor, Tensor]]


def plain(x: Tensor, y: Tensor, z: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The recursion as one writes it in torch."""
    for level in range(T):
        with torch.set_grad_enabled(torch.is_grad_enabled() and level == T - 1):
            for _ in range(N):
                z = z + _network(torch.cat((x, y, z), 1), *weights[:6])
            y = y + _network(torch.cat((y, z), 1), *weights[6:])
    return y, z


def _network(
    v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gain: Tensor, shift: Tensor
) -> Tensor:
    return layer_norm(linear(gelu(linear(v, w1, b1)), w2, b2), gain.shape, gain, shift)


class Workload:
    """States, weights and a gradient of y, shared by all variants."""

    def __init__(self, hidden: int, batch: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.x, self.y, self.z, self.grad = (draw(batch, hidden) for _ in range(4))
        self.x.requires_grad_()
        self.weights = []
        for parts in (3, 2):
            for columns in (parts * hidden, hidden):
                self.weights += [draw(hidden, columns) / columns**0.5, 0.3 * draw(hidden)]
            self.weights += [1 + 0.3 * draw(hidden), 0.3 * draw(hidden)]
        self.leaves = [self.x, *(weight.requires_grad_() for weight in self.weights)]
        with torch.no_grad():
            doubles = [t.double() for t in (self.x, self.y, self.z, *self.weights)]
            self.truth = plain(*doubles[:3], doubles[3:])

    def forward(self, run: Recursion) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return run(self.x, self.y, self.z, self.weights)

    def step(self, run: Recursion) -> tuple[Tensor, ...]:
        y, _ = run(self.x, self.y, self.z, self.weights)
        return torch.autograd.grad(y, self.leaves, self.grad)

    def judge(self, name: str, run: Recursion) -> float:
        """Returns the larger error of both states.

        Raises:
            AssertionError: it is more than float32 explains.
        """
        errors = []
        for found, true in zip(self.forward(run), self.truth, strict=True):
            error = float((found.double() - true).norm() / true.norm())
            # 21 updates, each with some roundings.
            if not error < 1e-5:
                raise AssertionError(f"{name}: error must be below 1e-5; got {error:.2g}")
            errors.append(error)
        return max(errors)


class Vectors:
    """Variants of one size and pass, and products of the same shape."""

    baselines = (EAGER, COMPILED)
    floor = GEMM
    unit = "FLOP"

    def __init__(self, hidden: int, batch: int, device: str, what: str) -> None:
        self.hidden, self.batch, self.device, self.what = hidden, batch, device, what
        torch._dynamo.reset()
        self.workload = Workload(hidden, batch, device)

    def row(self, name: str) -> Row:
        if name == GEMM:
            return self._products()
        variant = self._variant(name)
        error = self.workload.judge(name, variant)
        run = self.workload.step if self.what == "step" else self.workload.forward
        run(variant)
        # By the formula read literally; with gradients of the last level.
        work = 2 * 81 * self.batch * self.hidden**2 * (1 + 2 * (self.what == "step") / T)
        return Row(lambda: run(variant), work=work, facts=lambda: {"error": error})

    def _variant(self, name: str) -> Recursion:
        if name in (EAGER, COMPILED):
            return plain if name == EAGER else torch.compile(plain)
        backend, _, kept = name.removeprefix(OURS).partition(", ")
        reason = OPS["vector_latent_update"].reason(
            backend, self.device, frozenset({torch.float32})
        )
        if reason is not None:
            raise Unavailable(reason)
        return partial(vector_latent_update, n=N, T=T, recompute=not kept, backend=backend)

    def _products(self) -> Row:
        shapes = ((rows, self.hidden) for rows in (self.batch, self.hidden))
        a, b = (torch.randn(shape, device=self.device) for shape in shapes)

        def step() -> None:
            for _ in range(PRODUCTS):
                torch.mm(a, b)

        return Row(step, work=PRODUCTS * 2 * self.batch * self.hidden**2)


def _case(hidden: int, batch: int, device: str, what: str) -> Case:
    ours = f"{OURS}{'cpp' if device == 'cpu' else 'triton'}"
    # What is kept makes no difference without a backward pass.
    kept = [f"{ours}, kept"] if what == "step" else []
    return Case(
        f"{hidden}-{batch}-{device}-{what}",
        f"Vectors, {what}, hidden {hidden}, batch {batch}, {device}",
        partial(Vectors, hidden, batch, device, what), (EAGER, COMPILED, ours, *kept, GEMM),
        default=(hidden, batch) == (128, 32),
    )  # fmt: skip


test_vector_latent_update = rows_of(
    _case(hidden, batch, device, what)
    for device in DEVICES
    for hidden, batch in SIZES
    if device == "cpu" or hidden <= 128  # triton runs no larger ones
    for what in ("forward", "step")
)
