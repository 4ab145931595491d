"""SwiGLU: ours beside plain torch and torch.compile, with the memory that each keeps for backward.

The reference is plain torch. Sizes are those of a tiny recursive model of width 512. A
row is measured after its results were compared with the formula in float64.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import trm_fast
from trm_fast.ops import OPS, swiglu

from ._tables import DEVICES, Case, Row, Unavailable, rows_of

OURS, COMPILED = "trm_fast ", "torch.compile"
PLAIN = f"{OURS}reference"
WIDTH, INNER = 512, 1536
# Rows, dtype.
SIZES = {
    "cpu": [(4 * 97, torch.float32), (16 * 97, torch.float32), (16 * 97, torch.bfloat16)],
    "cuda": [(768 * 97, torch.float32), (768 * 97, torch.bfloat16)],
}

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(backend: str) -> Network:
    return lambda x, gate_up, down: swiglu(x, gate_up, down, backend=backend)


class Workload:
    """The tensors that all variants share, and the truth."""

    def __init__(self, rows: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = ((rows, WIDTH), (2 * INNER, WIDTH), (WIDTH, INNER), (rows, WIDTH))
        scales = (1.0, WIDTH**-0.5, INNER**-0.5, 1.0)
        drawn = [
            (torch.randn(shape, generator=generator) * scale).to(device, dtype)
            for shape, scale in zip(shapes, scales, strict=True)
        ]
        self.inputs, self.dout = drawn[:3], drawn[3]
        self.leaves = [tensor.clone().requires_grad_() for tensor in self.inputs]
        doubles = [tensor.double().requires_grad_() for tensor in self.inputs]
        gate, up = (doubles[0] @ doubles[1].T).chunk(2, 1)
        out = (gate * torch.sigmoid(gate) * up) @ doubles[2].T
        self.truth = out.detach(), *torch.autograd.grad(out, doubles, self.dout.double())

    def both_ways(self, network: Network) -> tuple[Tensor, ...]:
        out = network(*self.leaves)
        return out, *torch.autograd.grad(out, self.leaves, self.dout)

    def forward(self, network: Network) -> Tensor:
        with torch.no_grad():
            return network(*self.inputs)

    def check(self, name: str, network: Network) -> None:
        """Raises AssertionError where a result is off by more than eight roundings of its dtype, of
        which plain torch makes six, or by sums of thousands of terms in float32."""
        bound = 8 * torch.finfo(self.dout.dtype).eps + 4096 * 2.0**-24
        for found, true in zip(self.both_ways(network), self.truth, strict=True):
            error = float((found.detach().double() - true).abs().max() / true.abs().max())
            if not error <= bound:
                raise AssertionError(f"{name}: error must be <= {bound:.1g}; got {error}")

    def kept(self, network: Network) -> int:
        """Returns the bytes that a call keeps for backward, beyond x and the weights."""
        given = {tensor.data_ptr() for tensor in self.leaves}
        found: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = network(*self.leaves)
        del out
        return sum(found.values())


class SwiGLUTable:
    """Variants of one size and pass.

    What is computed a second time in the backward pass is not counted: it is no part of the task.
    """

    baselines = (PLAIN,)
    floor = None
    unit = "FLOP"

    def __init__(self, device: str, rows: int, dtype: torch.dtype, pass_: str) -> None:
        self.device, self.backward = device, pass_ == "backward"
        self.work = 3 * 2 * (3 if self.backward else 1) * rows * WIDTH * INNER
        self.workload = Workload(rows, dtype, device)
        torch._dynamo.reset()  # or the compiler gives up on what it has compiled for many sizes

    def row(self, name: str) -> Row:
        network = self._network(name)
        self.workload.check(name, network)
        call = self.workload.both_ways if self.backward else self.workload.forward
        facts = {"kept_bytes": self.workload.kept(network)}
        return Row(lambda: call(network), work=self.work, facts=lambda: facts)

    def _network(self, name: str) -> Network:
        if name == COMPILED:
            return torch.compile(_ours("reference"), dynamic=False)
        backend = name.removeprefix(OURS)
        reason = trm_fast.backends()["swiglu"][self.device][backend]
        if reason not in ("usable", "chosen"):
            raise Unavailable(reason)
        return _ours(backend)


def _case(device: str, rows: int, dtype: torch.dtype, pass_: str) -> Case:
    short = str(dtype).removeprefix("torch.")
    names = [f"{OURS}{backend}" for backend in OPS["swiglu"].order[device]]
    return Case(
        f"{device}-{rows}-{short}-{pass_}",
        f"SwiGLU, {pass_}, {rows} x {WIDTH} to {INNER} to {WIDTH} {short}, {device}",
        partial(SwiGLUTable, device, rows, dtype, pass_), (*names, COMPILED),
        default=(rows, dtype) in ((16 * 97, torch.bfloat16), (768 * 97, torch.bfloat16)),
    )  # fmt: skip


test_swiglu = rows_of(
    _case(device, *size, pass_)
    for device in DEVICES
    for size in SIZES[device]
    for pass_ in ("forward", "backward")
)
