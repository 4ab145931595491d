"""SwiGLU: the gated two-layer network of a transformer block.

    gate = x Wg^T,   up = x Wu^T,   act = silu(gate) * up,   silu(g) = g * sigmoid(g)
    out  = act Wd^T + bias

``gate_up`` holds the rows of Wg above those of Wu. Products are taken in the dtype of x, to which
weights are cast; sums of products in float32 or more.

Backward, with s = sigmoid(gate) and d_act = d_out Wd:

    d_up   = d_act * gate * s
    d_gate = d_act * up * s * (1 + gate * (1 - s))
    d_x    = d_gate Wg + d_up Wu
    d_Wg   = d_gate^T x,   d_Wu = d_up^T x,   d_Wd = d_out^T act,   d_bias = sum of d_out

A fast form keeps x alone and computes gate, up and act once more: one product of the size of the
first instead of the 4 I elements per token that plain torch keeps (gate, up, silu(gate) and act).
Work for N tokens, in multiply-adds: N I (2 D_in + D_out) forward; backward twice that, and the
2 N I D_in of the second computation. Least traffic where the products do not cover it, for elements
of s bytes: N (D_in + 2 I + D_out) s forward, as act is written and read; plain torch moves 6 N I s
more, for it writes and reads gate, up and silu(gate).

Source: Shazeer 2020, arXiv:2002.05202.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_fast._autograd import once_differentiable
from trm_fast._dispatch import Call, Example, Op, named_backend
from trm_fast.ops._autocast import activation, without_autocast

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def swiglu(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Returns ``(silu(x Wg^T) * (x Wu^T)) Wd^T + bias``.

    Args:
        x: [..., D_in], any strides; float32, bfloat16, float16 or float64. Under autocast it is
            cast first.
        gate_up: [2 I, D_in], the rows of Wg first; any of these dtypes, cast to that of x.
        down: [D_out, I], likewise.
        bias: [D_out], likewise, or None.
        backend: the implementation that must run; None takes the first usable one.

    Returns:
        A tensor [..., D_out] in the dtype of x.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype or layout is not supported.
        BackendError: the named backend cannot run the call.
    """
    _check(x, gate_up, down, bias)
    x = activation(x)
    gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if torch.compiler.is_compiling() and (backend or named_backend()) in (None, "reference"):
        run = _reference  # which the compiler fuses
    else:
        run = _op.choose(x.device.type, frozenset({x.dtype}), backend).run
    with without_autocast(x):
        return run(x, gate_up, down, bias)


def _check(x: Tensor, gate_up: Tensor, down: Tensor, bias: Tensor | None) -> None:
    tensors = {"x": x, "gate_up": gate_up, "down": down}
    for name, tensor in (tensors if bias is None else tensors | {"bias": bias}).items():
        _check_tensor(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"swiglu: {name} must be on {x.device} as x; got {tensor.device}")
    if x.dim() == 0:
        raise ValueError("swiglu: x must be [..., D_in]; got shape ()")
    if gate_up.dim() != 2 or gate_up.size(0) % 2 or gate_up.size(1) != x.size(-1):
        raise ValueError(
            f"swiglu: gate_up must be [2 I, {x.size(-1)}]; got shape {tuple(gate_up.shape)}"
        )
    if down.dim() != 2 or down.size(1) != gate_up.size(0) // 2:
        raise ValueError(
            f"swiglu: down must be [D_out, {gate_up.size(0) // 2}]; got shape {tuple(down.shape)}"
        )
    if bias is not None and bias.shape != down.shape[:1]:
        raise ValueError(f"swiglu: bias must be [{down.size(0)}]; got shape {tuple(bias.shape)}")


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"swiglu: {name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"swiglu: {name} must be a real floating point tensor; got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"swiglu: {name} must be a dense tensor; got {tensor.layout}")


def _reference(x: Tensor, gate_up: Tensor, down: Tensor, bias: Tensor | None) -> Tensor:
    gate, up = torch.nn.functional.linear(x, gate_up).chunk(2, -1)
    act = torch.nn.functional.silu(gate) * up
    return torch.nn.functional.linear(act, down, bias)


class _Kernels(NamedTuple):
    """What a fast form consists of, for contiguous x [N, D_in] and gate_up of one dtype.

    forward: (x, gate_up) to act [N, I].
    backward: (x, gate_up, d_act) to d_gate and d_up side by side, [N, 2 I], and act [N, I].
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _triton(x: Tensor, gate_up: Tensor, down: Tensor, bias: Tensor | None) -> Tensor:
    from trm_fast.kernels.swiglu import backward, forward

    if not x.numel() or not gate_up.numel():
        return _reference(x, gate_up, down, bias)  # empty products, which are zeros
    kernels, rows = _Kernels(forward, backward), x.reshape(-1, x.size(-1))
    needs_grad = any(t is not None and t.requires_grad for t in (x, gate_up, down, bias))
    if torch.is_grad_enabled() and needs_grad:
        out: Tensor = _SwiGLU.apply(kernels, rows, gate_up, down, bias)
    else:
        act = kernels.forward(_plain(rows), _plain(gate_up))
        out = torch.nn.functional.linear(act, down, bias)
    return out.view(*x.shape[:-1], down.size(0))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.contiguous().resolve_neg()


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: _Kernels, x: Tensor, gate_up: Tensor, down: Tensor, bias: Tensor | None
    ) -> Tensor:
        x, gate_up = _plain(x), _plain(gate_up)
        ctx.kernels = kernels
        ctx.save_for_backward(x, gate_up, down)
        return torch.nn.functional.linear(kernels.forward(x, gate_up), down, bias)

    @staticmethod
    @once_differentiable("swiglu")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down = ctx.saved_tensors
        _, needs_x, needs_gate_up, needs_down, needs_bias = ctx.needs_input_grad
        with without_autocast(x):
            grads, act = ctx.kernels.backward(x, gate_up, _plain(dout @ down))
            return (
                None,
                grads @ gate_up if needs_x else None,
                grads.mT @ x if needs_gate_up else None,
                dout.mT @ act if needs_down else None,
                dout.sum(0) if needs_bias else None,
            )


def _refuses(backend: str, call: Call) -> str | None:
    if backend != "reference" and torch.float64 in call.dtypes:
        return "adds up in float32; got float64, which runs on the reference"
    return None


def _examples(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Example]:
    shape = shape or (1,)
    width, inner = shape[-1], min(3 * max(1, shape[-1]), 200)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    scale = max(1, width) ** -0.5
    weights = [draw(2 * inner, width) * scale, draw(width, inner) * inner**-0.5, draw(width)]
    drawn = [draw(*shape), *weights, draw(*shape)]
    return {"network": _example([tensor.to(device, dtype) for tensor in drawn])}


def _example(tensors: list[Tensor]) -> Example:
    dtype = tensors[0].dtype
    names = ("x.grad", "gate_up.grad", "down.grad", "bias.grad")

    def prepare(
        backend: str, real: torch.dtype | None
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        copies = [tensor.to(real or dtype, copy=True) for tensor in tensors]
        inputs, dout = [tensor.requires_grad_() for tensor in copies[:4]], copies[4]
        written: dict[str, Tensor] = {}

        def call() -> None:
            x, gate_up, down, bias = inputs
            with torch.enable_grad():
                out = swiglu(x, gate_up, down, bias, backend=backend)
                written.update(zip(names, torch.autograd.grad(out, inputs, dout), strict=True))
            written["out"] = out.detach()

        return call, written

    # Up to five roundings stand between an input and a result, each of random sign in many terms;
    # sums of up to thousands of products in float32 add a little.
    eps = 5 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
    return Example(prepare, dict.fromkeys(("out", *names), eps))


_op = Op(
    name="swiglu",
    implementations={"reference": _reference, "triton": _triton},
    refuses=_refuses,
    examples=_examples,
    # By the bytes moved and kept, not measured.
    order={"cpu": ("reference",), "cuda": ("triton", "reference")},
)
