"""token_mixer beside the operators of official TRM, eager and compiled, with their gradients.

97 tokens of width 512, inner 512, float32 weights. Before anything is timed, every variant must
give the numbers of the formula in float64.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from trm_fast.ops import OPS, token_mixer

from ._tables import DEVICES, Case, Row, Unavailable, rows_of

LENGTH, WIDTH, INNER = 97, 512, 512
BATCHES = {"cpu": (4, 16), "cuda": (768,)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TORCH, COMPILED = "torch operators", "torch operators, torch.compile"
COMPILED_REFERENCE = "trm_fast reference, torch.compile"


def official(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Transpose, SwiGLU with weights cast at each use, transpose."""
    gate, up = linear(x.mT, gate_up.to(x.dtype)).chunk(2, -1)
    return linear(silu(gate) * up, down.to(x.dtype)).mT


def ours(backend: str):
    def mix(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return token_mixer(x, gate_up, down, backend=backend)

    return mix


def check(name: str, mix, given: list[Tensor], d_out: Tensor) -> None:
    """Raises AssertionError where a result is off by more than rounding explains: weights, gate,
    up, silu, act and d_act each once, the result once more."""
    pairs = []
    for function, cast in ((mix, lambda t: t), (official, Tensor.double)):
        leaves = [cast(t.detach()).requires_grad_() for t in given]
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, cast(d_out))
        pairs.append([t.double() for t in (out, *grads)])
    for found, true in zip(*pairs, strict=True):
        error = float((found - true).abs().max() / true.abs().max())
        if not error <= 16 * torch.finfo(given[0].dtype).eps:
            raise AssertionError(f"{name}: error must be that of rounding; got {error:.2g}")


class TokenMixerTable:
    """Variants of one batch, dtype and pass."""

    baselines = (TORCH, COMPILED)
    floor = None
    unit = "FLOP"

    def __init__(self, device: str, batch: int, dtype: str, pass_: str) -> None:
        self.device, self.dtype, self.backward = device, dtype, pass_ == "backward"
        torch._dynamo.reset()
        generator = torch.Generator().manual_seed(0)
        shapes = ((batch, LENGTH, WIDTH), (2 * INNER, LENGTH), (LENGTH, INNER))
        x, gate_up, down = (torch.randn(s, generator=generator).to(device) for s in shapes)
        given = (x.to(DTYPES[dtype]), gate_up / LENGTH**0.5, down / INNER**0.5)
        self.given = [tensor.requires_grad_() for tensor in given]
        self.d_out = torch.randn(shapes[0], generator=generator).to(self.given[0])
        self.work = (18 if self.backward else 6) * LENGTH * INNER * WIDTH * batch

    def row(self, name: str) -> Row:
        function = self._function(name)
        check(name, function, self.given, self.d_out)

        def step() -> None:
            if self.backward:
                torch.autograd.grad(function(*self.given), self.given, self.d_out)
            else:
                with torch.no_grad():
                    function(*self.given)

        return Row(step, work=self.work)

    def _function(self, name: str) -> Callable[..., Tensor]:
        if name == TORCH:
            return official
        if name == COMPILED:
            return torch.compile(official)
        if name == COMPILED_REFERENCE:
            return torch.compile(ours("reference"), fullgraph=True)
        backend = name.removeprefix("trm_fast ")
        reason = OPS["token_mixer"].reason(backend, self.device, frozenset({DTYPES[self.dtype]}))
        if reason is not None:
            raise Unavailable(reason)
        return ours(backend)


def _case(device: str, batch: int, dtype: str, pass_: str) -> Case:
    names = [f"trm_fast {backend}" for backend in OPS["token_mixer"].order[device]]
    return Case(
        f"{device}-{batch}-{dtype}-{pass_}",
        f"Token mixer, batch {batch}, {dtype}, {pass_}, {device}",
        partial(TokenMixerTable, device, batch, dtype, pass_),
        (TORCH, COMPILED, *names), (COMPILED_REFERENCE,),
        # On a CPU the op is a part of latent_update, whose table shows what it gains.
        default=device == "cuda",
    )  # fmt: skip


test_token_mixer = rows_of(
    _case(device, batch, dtype, pass_)
    for device in DEVICES
    for batch in BATCHES[device]
    for dtype in DTYPES
    for pass_ in ("forward", "backward")
)
