"""The sums of two filters and of clipping: ours beside the torch operators that give the same.

A table is one model size on one device. A row is measured after its sums were found right.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import trm_fast
from trm_fast._dispatch import ORDER
from trm_fast.ops import FilterSums

from ._tables import DEVICES, Case, Row, Unavailable, rows_of
from ._workload import COPY, SIZES

DOTS = "torch dots of each tensor"
NORM = "torch._foreach_norm, squares alone"


OURS, ALONE = "trm_fast ", ", squares alone"


class FilterSumsTable:
    """Gradients and means that all variants share.

    What a backward pass has just written is warm, as is what a step has written before.
    """

    baselines = (DOTS, NORM)
    floor = COPY
    unit = "B"

    def __init__(self, size: str, device: str) -> None:
        self.device = device
        generator = torch.Generator().manual_seed(0)
        self.grads, self.means = (
            [(torch.rand(shape, generator=generator) * 2 - 1).to(device) for shape in SIZES[size]]
            for _ in range(2)
        )
        self.size = sum(grad.numel() for grad in self.grads)

    def row(self, name: str) -> Row:
        if name == COPY:
            source = torch.rand(self.size, device=self.device)
            target = torch.empty_like(source)
            return Row(lambda: target.copy_(source), work=2 * source.nbytes)
        means = name != NORM and not name.endswith(ALONE)
        sums = {DOTS: self._dots, NORM: self._norms}.get(name) or self._ours(name, means)
        self._check(name, sums(), means)
        # Each dot product reads both of its operands.
        size = 16 if name == DOTS else 8 if means else 4
        return Row(sums, work=size * self.size, least=name.startswith(OURS))

    def _ours(self, name: str, means: bool) -> Callable[[], Tensor]:
        backend = name.removeprefix(OURS).removesuffix(ALONE)
        reason = trm_fast.backends()["filter_sums"][self.device][backend]
        if reason not in ("usable", "chosen"):
            raise Unavailable(reason)
        call = FilterSums(self.grads, self.means if means else [], backend=backend)
        return lambda: call(self.grads)

    def _dots(self) -> Tensor:
        """One reduction for each tensor and sum."""
        pairs = zip(self.grads, self.means, strict=True)
        flat = [(grad.view(-1), mean.view(-1)) for grad, mean in pairs]
        sums = [torch.dot(x, y) for g, mu in flat for x, y in ((g, mu), (g, g), (mu, mu))]
        return torch.stack(sums).view(-1, 3)

    def _norms(self) -> Tensor:
        square = torch.stack(torch._foreach_norm(self.grads)).square()
        return torch.stack((0 * square, square, 0 * square), 1)

    def _check(self, name: str, sums: Tensor, means: bool) -> None:
        """Raises AssertionError where a sum is off: all terms are below 1, and no variant adds more
        than 4096 of them in float32 before it goes on in pairs or in float64."""
        for row, g, mu in zip(sums.double(), self.grads, self.means, strict=True):
            g, mu = g.double(), mu.double() * means
            true = torch.stack([(g * mu).sum(), (g * g).sum(), (mu * mu).sum()])
            if not bool(((row - true).abs() <= 4096 * 2.0**-24 * g.numel()).all()):
                raise AssertionError(f"{name}: sums must be {true}; got {row}")


def _case(size: str, device: str) -> Case:
    ours = [f"{OURS}{backend}" for backend in ORDER[device]]
    fast = [name for name in ours if not name.endswith("reference")]
    rows = (*fast, *(name + ALONE for name in fast), DOTS, NORM, COPY)
    reference = f"{OURS}reference"
    return Case(
        f"{size}-{device}", f"Sums of gradients and means, {size}, {device}",
        partial(FilterSumsTable, size, device), rows, (reference, reference + ALONE),
        default=size == "TRM 7M",
    )  # fmt: skip


test_filter_sums = rows_of(_case(size, device) for device in DEVICES for size in SIZES)
