"""rope_attention beside the operators of official TRM, eager and compiled, with their gradients.

8 heads of 64 over 97 tokens, views of one fused projection as in the model. Before anything is
timed, every variant must give the numbers of the formula in float64.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trm_fast.ops import OPS, rope_attention

from ._tables import DEVICES, Case, Row, Unavailable, rows_of

LENGTH, HEADS, DIM = 97, 8, 64
BATCHES = {"cpu": (4, 16), "cuda": (768,)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TORCH, COMPILED = "torch operators", "torch operators, torch.compile"
COMPILED_REFERENCE = "trm_fast reference, torch.compile"


def official(cos: Tensor, sin: Tensor):
    """The rotation by cat and neg in float32, and torch's attention."""

    def rotate(x: Tensor) -> Tensor:
        wide = x.float()
        turned = torch.cat((-wide[..., DIM // 2 :], wide[..., : DIM // 2]), -1)
        return (wide * cos + turned * sin).to(x.dtype)

    def attend(fused: Tensor) -> Tensor:
        q, k, v = fused.unflatten(2, (3, HEADS, DIM)).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q), rotate(k), v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return attend


def ours(backend: str):
    def attend(fused: Tensor) -> Tensor:
        return rope_attention(*fused.unflatten(2, (3, HEADS, DIM)).unbind(2), backend=backend)

    return attend


def _angles(device: str) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, DIM, 2).double() / DIM)
    angle = torch.outer(torch.arange(LENGTH).double(), frequency)
    pair = (torch.cat((t, t), 1)[:, None] for t in (angle.cos(), angle.sin()))
    cos, sin = (t.to(device, torch.float32) for t in pair)
    return cos, sin


def truth(fused: Tensor) -> Tensor:
    return ours("reference")(fused.double())


def check(name: str, attend, fused: Tensor, d_out: Tensor) -> None:
    """Raises AssertionError where output or gradient is off by more than rounding explains: q', k',
    P, d_S and the result each once, which logits of up to 6 enlarge."""
    pairs = []
    for function, x, d in ((attend, fused, d_out), (truth, fused.double(), d_out.double())):
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        pairs.append((out.double(), torch.autograd.grad(out, leaf, d)[0].double()))
    for found, true in zip(*pairs, strict=True):
        error = float((found - true).abs().max() / true.abs().max())
        if not error <= 16 * torch.finfo(fused.dtype).eps:
            raise AssertionError(f"{name}: error must be that of rounding; got {error:.2g}")


class RopeAttentionTable:
    """Variants of one batch, dtype and pass."""

    baselines = (TORCH, COMPILED)
    floor = None
    unit = "B"

    def __init__(self, device: str, batch: int, dtype: str, pass_: str) -> None:
        self.device, self.dtype, self.backward = device, dtype, pass_ == "backward"
        torch._dynamo.reset()
        generator = torch.Generator().manual_seed(0)
        self.attend = official(*_angles(device))
        shape = (batch, LENGTH, 3 * HEADS * DIM)
        fused = torch.randn(shape, generator=generator).to(device, DTYPES[dtype])
        self.given = [fused.requires_grad_()]
        self.d_out = torch.randn(batch, LENGTH, HEADS * DIM, generator=generator).to(fused)
        self.work = fused.nbytes // 3 * (11 if self.backward else 4)

    def row(self, name: str) -> Row:
        function = self._function(name)
        check(name, function, *self.given, self.d_out)

        def step() -> None:
            if self.backward:
                torch.autograd.grad(function(*self.given), self.given, self.d_out)
            else:
                with torch.no_grad():
                    function(*self.given)

        return Row(step, work=self.work)

    def _function(self, name: str) -> Callable[..., Tensor]:
        if name == TORCH:
            return self.attend
        if name == COMPILED:
            return torch.compile(self.attend)
        if name == COMPILED_REFERENCE:
            return torch.compile(ours("reference"), fullgraph=True)
        backend = name.removeprefix("trm_fast ")
        reason = OPS["rope_attention"].reason(backend, self.device, frozenset({DTYPES[self.dtype]}))
        if reason is not None:
            raise Unavailable(reason)
        return ours(backend)


def _case(device: str, batch: int, dtype: str, pass_: str) -> Case:
    names = [f"trm_fast {backend}" for backend in OPS["rope_attention"].order[device]]
    return Case(
        f"{device}-{batch}-{dtype}-{pass_}",
        f"Attention, batch {batch}, {dtype}, {pass_}, {device}",
        partial(RopeAttentionTable, device, batch, dtype, pass_),
        (TORCH, COMPILED, *names), (COMPILED_REFERENCE,),
        # On a CPU the op is a part of latent_update, whose table shows what it gains.
        default=device == "cuda",
    )  # fmt: skip


test_rope_attention = rows_of(
    _case(device, batch, dtype, pass_)
    for device in DEVICES
    for batch in BATCHES[device]
    for dtype in DTYPES
    for pass_ in ("forward", "backward")
)
