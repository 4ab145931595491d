"""Sums over whole tensors that two gradient filters, their statistics and norm clipping need.

For each gradient g and its running mean mu, in one read-only pass over all of them:

    sums <- [sum(g * mu), sum(g * g), sum(mu * mu)]         float64

or [0, sum(g * g), 0] without means. Products are float32 (float64 for float64 tensors), and the
sums of a tensor are taken in an order that depends on its size only, so that they repeat to the
last bit.

Bytes per float32 element: 8 with means, 4 without.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trm_fast import _native
from trm_fast._autograd import check_not_wrapped
from trm_fast._dispatch import Call, Example, Op
from trm_fast.ops._tensors import in_order_of, is_dense

STORAGE = (torch.float32, torch.bfloat16, torch.float16)

# One row of the table per tensor; csrc/filter_sums/cpu.cpp reads the same columns. The address of a
# mean that is not wanted is 0.
COLUMNS = ("grad", "mean", "sums", "size", "grad_dtype", "mean_dtype")


def filter_sums(
    grads: Sequence[Tensor], means: Sequence[Tensor] = (), *, backend: str | None = None
) -> Tensor:
    """Returns the sums above, one row per tensor, on the device of the tensors.

    Args:
        grads: tensors of any shape and stride, and of any mix of float32, bfloat16 and float16, all
            on one device. float64 runs on the reference.
        means: tensors of the same shapes and device, in float32, bfloat16 or float16; empty for the
            squares of ``grads`` alone.
        backend: the implementation that must run; None takes the first usable one.

    Returns:
        A float64 tensor of shape [len(grads), 3]; float32 on devices without float64.

    Raises:
        ValueError: the lists differ in length, or tensors in shape or device.
        TypeError: a tensor is not a dense floating point tensor.
        BackendError: the named backend cannot run the call.
    """
    if torch.compiler.is_compiling():
        sums: Tensor = torch.ops.trm_fast.filter_sums(list(grads), list(means), backend)
        return sums
    with torch.no_grad():
        return FilterSums(grads, means, backend=backend)(grads)


class FilterSums:
    """The tensors of a call, checked once and kept; called with the gradients of each step.

    Args and errors: as ``filter_sums``. ``grads`` stands for those of all later calls, which must
    have the same shapes and dtypes. Each call overwrites what the last one returned.
    """

    def __init__(
        self, grads: Sequence[Tensor], means: Sequence[Tensor] = (), *, backend: str | None = None
    ) -> None:
        check_not_wrapped("filter_sums", (*grads, *means))
        _check(grads, means)
        self.means = means
        self._sizes = list(map(Tensor.numel, grads))
        self.device = grads[0].device if grads else torch.device("cpu")
        dtypes = frozenset(tensor.dtype for tensor in (*grads, *means))
        self.choice = _op.choose(self.device.type, dtypes, backend)
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = torch.zeros((len(grads), 3), dtype=exact, device=self.device)
        self._table: Tensor | None = None
        self._contiguous = all(map(Tensor.is_contiguous, means))
        self._scattered = [i for i, mean in enumerate(means) if not is_dense(mean)]

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """Returns the sums, in memory that the next call writes again."""
        sizes = list(map(Tensor.numel, grads))
        if sizes != self._sizes:
            raise ValueError(
                f"filter_sums: grads must be of the sizes {self._sizes}, as checked; got {sizes}"
            )
        if grads:
            self.choice.run(self, grads)
        return self.sums

    def run_on_rows(self, kernel: Callable[..., None], grads: Sequence[Tensor]) -> None:
        """Calls a kernel that walks memory by address; other orders of memory go through copies."""
        if self._table is None:
            self._table = self._make_table(grads)
            columns = self._table.numpy().T
            self._grad_column = columns[COLUMNS.index("grad")]
            self._blocks = int((columns[COLUMNS.index("size")] // CHUNK + 1).sum())
        contiguous = self._contiguous and all(map(Tensor.is_contiguous, grads))
        if not contiguous or any(map(Tensor.is_neg, grads)):
            grads = list(map(in_order_of, grads, self.means or map(_dense, grads)))
        self._grad_column[:] = np.fromiter(map(Tensor.data_ptr, grads), np.int64, len(grads))
        copies = {i: self.means[i].contiguous() for i in self._scattered}
        for i, copy in copies.items():
            self._table[i, COLUMNS.index("mean")] = copy.data_ptr()
        kernel(self._table, self._scratch())

    def _make_table(self, grads: Sequence[Tensor]) -> Tensor:
        row_bytes = 3 * self.sums.element_size()
        rows = [
            (
                0,
                self.means[i].data_ptr() if self.means else 0,
                self.sums.data_ptr() + i * row_bytes,
                grad.numel(),
                STORAGE.index(grad.dtype),
                STORAGE.index(self.means[i].dtype) if self.means else 0,
            )
            for i, grad in enumerate(grads)
        ]
        return torch.tensor(rows, dtype=torch.int64)

    def _scratch(self) -> Tensor | None:
        """Returns memory for the partial sums of a GPU; on a CPU there are few enough."""
        if self.device.type != "cuda":
            return None
        return torch.empty((self._blocks, 3), dtype=torch.float64, device=self.device)


CHUNK = 4096  # elements that one block of a GPU adds up


def _dense(tensor: Tensor) -> Tensor:
    return tensor if is_dense(tensor) else tensor.contiguous()


def _check(grads: Sequence[Tensor], means: Sequence[Tensor]) -> None:
    if means and len(means) != len(grads):
        raise ValueError(
            f"filter_sums: means must be of {len(grads)} tensors, one for each gradient, or none; "
            f"got {len(means)}"
        )
    for name, tensors in (("grads", grads), ("means", means)):
        for index, tensor in enumerate(tensors):
            if tensor.layout != torch.strided or tensor.dtype not in (*STORAGE, torch.float64):
                raise TypeError(
                    f"filter_sums: {name}[{index}] must be a dense floating point tensor; got "
                    f"{tensor.layout} {tensor.dtype}"
                )
            like = grads[index] if name == "means" else tensor
            if tensor.device != grads[0].device or tensor.shape != like.shape:
                raise ValueError(
                    f"filter_sums: {name}[{index}] must be {tuple(like.shape)} on "
                    f"{grads[0].device}; got {tuple(tensor.shape)} on {tensor.device}"
                )


_native.LIBRARY.define("filter_sums(Tensor[] grads, Tensor[] means, str? backend) -> Tensor")
_native.LIBRARY.define("filter_sums_rows_(Tensor table, Tensor? scratch) -> ()")
_native.LIBRARY.impl(
    "filter_sums",
    lambda grads, means, backend: filter_sums(grads, means, backend=backend),
    "CompositeExplicitAutograd",
)


def _fake(grads: list[Tensor], means: list[Tensor], backend: str | None) -> Tensor:
    return grads[0].new_empty((len(grads), 3), dtype=torch.float64)


_native.register_fake("filter_sums", _fake)


def sums_of(grad: Tensor, mean: Tensor | None) -> Tensor:
    """Returns the three sums of one tensor, in plain torch and open to autograd."""
    real = torch.float64 if grad.dtype == torch.float64 else torch.float32
    exact = torch.float32 if grad.device.type == "mps" else torch.float64
    g = grad.to(real)
    square = (g * g).sum(dtype=exact)
    if mean is None:
        return torch.stack([torch.zeros_like(square), square, torch.zeros_like(square)])
    mu = mean.to(real, copy=torch.is_grad_enabled())  # the step writes to it
    return torch.stack([(g * mu).sum(dtype=exact), square, (mu * mu).sum(dtype=exact)])


def _reference(call: FilterSums, grads: Sequence[Tensor]) -> None:
    means: Sequence[Any] = call.means or [None] * len(grads)
    call.sums.copy_(torch.stack(list(map(sums_of, grads, means))))


def _on_rows(call: FilterSums, grads: Sequence[Tensor]) -> None:
    call.run_on_rows(torch.ops.trm_fast.filter_sums_rows_.default, grads)


def _on_triton_rows(call: FilterSums, grads: Sequence[Tensor]) -> None:
    from trm_fast.kernels.filter_sums import filter_sums_rows_

    call.run_on_rows(filter_sums_rows_, grads)


def _refuses(backend: str, call: Call) -> str | None:
    if backend != "reference" and torch.float64 in call.dtypes:
        return "runs float32, bfloat16 and float16; got float64, which runs on the reference"
    return None


def _examples(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Example]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]

    def prepare(
        backend: str, real: torch.dtype | None
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        grad, mean = (tensor.to(real or dtype) for tensor in drawn)
        call = FilterSums([grad], [mean], backend=backend)
        return lambda: _discard(call([grad])), {"sums": call.sums}

    # The largest sum is one of squares; each product and each of the few additions in a row rounds.
    return {"with means": Example(prepare, {"sums": 64 * torch.finfo(torch.float32).eps})}


def _discard(_: object) -> None:
    pass


_op = Op(
    name="filter_sums",
    implementations={
        "reference": _reference,
        "cpp": _on_rows,
        "cuda": _on_rows,
        "triton": _on_triton_rows,
    },
    refuses=_refuses,
    examples=_examples,
)
