"""SwiGLU over the sequence axis: every channel of a sample is a vector of its tokens.

For each sample x [L, D], with W_gate, W_up [I, L] and W_down [L, I]:

    gate = W_gate x ;  up = W_up x                                                    [I, D]
    act  = silu(gate) * up                           silu(a) = a * sigmoid(a)
    out  = W_down act                                                                 [L, D]

which is SwiGLU of the transposed x, without a transpose: the samples are a batch of products.

Backward, from d_out [L, D], with gate and up computed again from x, the only tensor that is saved,
and s = sigmoid(gate):

    d_act  = W_down^T d_out
    d_up   = d_act * gate * s ;  d_gate = d_act * up * s * (1 + gate * (1 - s))
    d_x    = W_gate^T d_gate + W_up^T d_up
    d_W_gate = sum d_gate x^T ;  d_W_up = sum d_up x^T            sums over samples
    d_W_down = sum d_out act^T

(autograd saves gate, up and act besides, where the reference runs). Floor: 6 L I D FLOP per sample
forward, 12 more backward and 4 to compute gate and up again; x read and out written, 4 L D bytes in
16 bits, and 4 I D for act, which is written and read where the two products are two kernels.

The weights are cast to the dtype of x at each use; their gradients come back in their own dtype.

Sources: SwiGLU, Shazeer 2020, arXiv:2002.05202; mixing over tokens, MLP-Mixer, Tolstikhin et al.
2021, arXiv:2105.01601. In official TRM (SamsungSAILMontreal/TinyRecursiveModels at e7b6871,
``mlp_t``) L is 97, I 512 and D 512.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from trm_fast._dispatch import Call, Example, Op, named_backend
from trm_fast.ops._autocast import activation, without_autocast

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def token_mixer(x: Tensor, gate_up: Tensor, down: Tensor, *, backend: str | None = None) -> Tensor:
    """Returns SwiGLU over the sequence axis, differentiable; the formula is at the top.

    Under ``torch.autocast`` x is cast to its dtype first, except float64.

    Args:
        x: [batch, length, width], floating point; its dtype is that of the products.
        gate_up: [2 * inner, length], the rows of W_gate first, floating point, on the device of x.
        down: [length, inner], likewise.
        backend: the implementation that must run; None takes the first usable one.

    Returns:
        [batch, length, width] in the dtype of the products.

    Raises:
        TypeError: an argument is not a real floating point tensor.
        ValueError: shapes or devices do not fit together.
        BackendError: the named backend cannot run the call.
    """
    _check(x, gate_up, down)
    x = activation(x)
    run = _implementation(x, backend)
    with without_autocast(x):
        out: Tensor = run(x, gate_up, down)
    return out


def _implementation(x: Tensor, backend: str | None) -> Callable[..., Any]:
    # The compiler fuses the reference by itself.
    if torch.compiler.is_compiling() and (backend or named_backend()) in (None, "reference"):
        return _reference
    return _op.choose(x.device.type, frozenset({x.dtype}), backend).run


def _check(x: Tensor, gate_up: Tensor, down: Tensor) -> None:
    for name, tensor in {"x": x, "gate_up": gate_up, "down": down}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"token_mixer: {name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"token_mixer: {name} must be a real floating point tensor; got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(f"token_mixer: {name} must be on {x.device} as x; got {tensor.device}")
    fits = x.dim() == 3 and gate_up.dim() == down.dim() == 2
    if not fits or not gate_up.shape[1] == down.shape[0] == x.shape[1]:
        fits = False
    elif gate_up.shape[0] != 2 * down.shape[1]:
        fits = False
    if not fits:
        raise ValueError(
            "token_mixer: x must be [batch, length, width], gate_up [2 * inner, length] and down "
            f"[length, inner]; got {tuple(x.shape)}, {tuple(gate_up.shape)} and "
            f"{tuple(down.shape)}"
        )


def _reference(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    # Not matmul, which transposes x to make one product of many where the weights need gradients.
    gate, up = torch.bmm(_for_each(gate_up, x), x).chunk(2, 1)
    return torch.bmm(_for_each(down, x), silu(gate) * up)


def _for_each(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(x.dtype).expand(x.shape[0], -1, -1)


def _refuses(backend: str, call: Call) -> str | None:
    if backend == "triton" and torch.float64 in call.dtypes:
        return "runs float32, bfloat16 and float16; got float64, which runs on the reference"
    return None


def _examples(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Example]:
    """``shape`` is [batch, length, width], or its end."""
    batch, length, width = (2, 1, 1, *shape)[-3:] if len(shape) < 3 else shape[-3:]
    inner = 5 * length + 4  # about as in official TRM
    generator = torch.Generator().manual_seed(0)
    x, d_out = torch.randn(2, batch, length, width, generator=generator).to(device, dtype)
    gate_up = torch.randn(2 * inner, length, generator=generator) / max(length, 1) ** 0.5
    down = torch.randn(length, inner, generator=generator) / inner**0.5
    given = (x, gate_up.to(device), down.to(device))
    return {"float32 weights": _example(given, d_out)}


def _example(given: tuple[Tensor, ...], d_out: Tensor) -> Example:
    def prepare(
        backend: str, real: torch.dtype | None
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        written: dict[str, Tensor] = {}

        def call() -> None:
            leaves = [t.detach().to(real or t.dtype).requires_grad_() for t in given]
            out = token_mixer(leaves[0], leaves[1], leaves[2], backend=backend)
            grads = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
            written.update(zip(("d_x", "d_gate_up", "d_down"), grads, strict=True))
            written["out"] = out.detach()

        return call, written

    # Weights, gate, up, silu, act and d_act are each rounded once, and so is the result; sums of up
    # to 1000 products in float32 add to it.
    eps = 8 * torch.finfo(given[0].dtype).eps + 32 * torch.finfo(torch.float32).eps
    return Example(prepare, dict.fromkeys(("out", "d_x", "d_gate_up", "d_down"), eps))


_op = Op(
    name="token_mixer",
    implementations={
        "reference": _reference,
        "triton": "trm_fast.kernels.token_mixer:token_mixer",
    },
    refuses=_refuses,
    examples=_examples,
    order={"cpu": ("reference",), "cuda": ("triton", "reference")},
)
