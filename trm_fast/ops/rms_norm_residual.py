"""RMS normalisation of a sum: what stands between two sublayers of a transformer block.

    h   = x + residual
    out = h * r * weight,   r = 1 / sqrt(mean(h^2) + eps)

The mean runs over ``dim``: over the features of each token (-1), or over the sequence (-2), which
gives one scale to each channel of a sample, as in the token mixer of tiny recursive models. Sums
are taken in float32, in float64 for float64, and each result is rounded once.

Post-norm blocks use ``out``, pre-norm blocks also ``h``. There ``h`` is rounded to the dtype of x
before it is normalised, so that ``out`` is the norm of the ``h`` that is returned.

Backward, with n the size of ``dim``, g = weight * d_out and u = h * r:

    d_h      = r * (g - u * mean(g * u)) + d_sum         which is both d_x and d_residual
    d_weight = sum of d_out * u over everything but dim

Without a weight u is ``out`` itself, which the next layer keeps anyway: a fast form then keeps
nothing of its own but r. With one it keeps h if that is returned, else x and residual.

Least traffic, for E elements of s bytes: 3 E s forward (one less without residual, one more with
the sum), 3 E s backward (one more for d_sum, and one where x and residual are read for h). About
5 operations for each element forward and 8 backward are less than memory leaves time for.

Sources: Zhang and Sennrich 2019, arXiv:1910.07467; post-norm and the norm over the sequence,
SamsungSAILMontreal/TinyRecursiveModels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_fast import _native
from trm_fast._autograd import once_differentiable
from trm_fast._dispatch import Call, Example, Op, named_backend
from trm_fast.ops._autocast import activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rms_norm_residual(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    dim: int = -1,
    eps: float = 1e-5,
    return_sum: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the RMS norm of ``x + residual``; the formula is at the top.

    Args:
        x: [..., length, features], or any shape with features last for dim -1; any strides;
            float32, bfloat16, float16 or float64. Under autocast it is cast first.
        residual: of the shape of x, cast to its dtype; None adds nothing.
        weight: [features] for dim -1, [length] for dim -2; any of these dtypes; None means 1.
        dim: -1 or -2, the dimension of the mean.
        eps: added to the mean, finite and > 0.
        return_sum: whether to return h too.
        backend: the implementation that must run; None takes the first usable one.

    Returns:
        ``out``, of the shape and dtype of x; with ``return_sum`` the pair ``(out, h)``.

    Raises:
        ValueError: a shape, device or number does not fit.
        TypeError: a dtype or layout is not supported.
        BackendError: the named backend cannot run the call.
    """
    _check(x, residual, weight, dim, eps)
    x = activation(x)
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    residual = None if residual is None else residual.to(x.dtype)
    weight = None if weight is None else weight.to(real)
    keep = return_sum and residual is not None
    if torch.compiler.is_compiling() and (backend or named_backend()) in (None, "reference"):
        run = _reference  # which the compiler fuses
    else:
        run = _op.choose(x.device.type, frozenset({x.dtype}), backend).run
    out, h = run(x, residual, weight, dim, eps, keep)
    if not return_sum:
        return out
    return out, x if h is None else h


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, dim: int, eps: float) -> None:
    _check_tensor("x", x)
    for name, tensor in (("residual", residual), ("weight", weight)):
        if tensor is None:
            continue
        _check_tensor(name, tensor)
        if tensor.device != x.device:
            raise ValueError(
                f"rms_norm_residual: {name} must be on {x.device} as x; got {tensor.device}"
            )
    if isinstance(dim, bool) or dim not in (-1, -2):
        raise ValueError(f"rms_norm_residual: dim must be -1 or -2; got {dim!r}")
    if x.dim() < -dim:
        raise ValueError(
            f"rms_norm_residual: x must have {-dim} dimensions or more for dim {dim}; got shape "
            f"{tuple(x.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"rms_norm_residual: residual must be {tuple(x.shape)} as x; got "
            f"{tuple(residual.shape)}"
        )
    if weight is not None and weight.shape != (x.size(dim),):
        raise ValueError(
            f"rms_norm_residual: weight must be ({x.size(dim)},), the size of dim {dim}; got "
            f"{tuple(weight.shape)}"
        )
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"rms_norm_residual: eps must be a number; got {eps!r}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"rms_norm_residual: eps must be finite and > 0; got {eps!r}")


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"rms_norm_residual: {name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"rms_norm_residual: {name} must be a real floating point tensor; got {tensor.dtype}"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"rms_norm_residual: {name} must be a dense tensor; got {tensor.layout}")


def _reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, dim: int, eps: float, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns out, and h if it is to be kept; weight is in the dtype of the arithmetic."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    h, rounded = x.to(real), None
    if residual is not None:
        h = h + residual.to(real)
    if keep:
        rounded = h.to(x.dtype)
        h = rounded.to(real)
    out = h * torch.rsqrt(h.square().mean(dim, keepdim=True) + eps)
    if weight is not None:
        out = out * (weight if dim == -1 else weight[:, None])
    return out.to(x.dtype), rounded


class _Kernels(NamedTuple):
    """What a fast form consists of. Tensors are contiguous, weight and r are float32.

    forward: (x, residual, weight, dim, eps, out, sum, r) writes the last three; sum may be None.
    backward: (d_out, d_sum, h or x or u, residual, weight, r, dim, normalised, d_x, d_weight)
        writes the last two; ``normalised`` says that the third is u; d_weight may be None.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]


def _cpp(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, dim: int, eps: float, keep: bool
) -> tuple[Tensor, Tensor | None]:
    return _run(_NATIVE, x, residual, weight, dim, eps, keep)


def _triton(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, dim: int, eps: float, keep: bool
) -> tuple[Tensor, Tensor | None]:
    from trm_fast.kernels.rms_norm_residual import backward, forward

    return _run(_Kernels(forward, backward), x, residual, weight, dim, eps, keep)


def _run(
    kernels: _Kernels,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    dim: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    given = [tensor for tensor in (x, residual, weight) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        out, h = _RMSNormResidual.apply(kernels, x, residual, weight, dim, eps, keep)
        return out, h
    out, h, _ = _forward(kernels, _plain(x), _plain(residual), _plain(weight), dim, eps, keep)
    return out, h


def _plain(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.contiguous().resolve_neg()


def _forward(
    kernels: _Kernels,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    dim: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    out, h = torch.empty_like(x), torch.empty_like(x) if keep else None
    shape = x.shape[:-1] if dim == -1 else (*x.shape[:-2], x.size(-1))
    r = torch.empty(shape, dtype=torch.float32, device=x.device)
    kernels.forward(x, residual, weight, dim, eps, out, h, r)
    return out, h, r


class _RMSNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: _Kernels,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        dim: int,
        eps: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        x, residual, weight = _plain(x), _plain(residual), _plain(weight)
        out, h, r = _forward(kernels, x, residual, weight, dim, eps, keep)
        ctx.kernels, ctx.dim, ctx.normalised = kernels, dim, weight is None
        ctx.set_materialize_grads(False)
        if weight is None:
            ctx.save_for_backward(out, None, None, r)
        elif h is not None:
            ctx.save_for_backward(h, None, weight, r)
        else:
            ctx.save_for_backward(x, residual, weight, r)
        return out, h

    @staticmethod
    @once_differentiable("rms_norm_residual")
    def backward(ctx: Any, dout: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        x, residual, weight, r = ctx.saved_tensors
        _, needs_x, needs_residual, needs_weight, *_ = ctx.needs_input_grad
        dout = torch.zeros_like(x) if dout is None else _plain(dout)
        dx = torch.empty_like(x)
        dweight = torch.empty_like(weight) if needs_weight else None
        last = (r, ctx.dim, ctx.normalised, dx, dweight)
        ctx.kernels.backward(dout, _plain(dsum), x, residual, weight, *last)
        given = (dx if needs_x else None, dx if needs_residual else None, dweight)
        return None, *given, None, None, None


_native.LIBRARY.define(
    "rms_norm_residual_(Tensor x, Tensor? residual, Tensor? weight, int dim, float eps, "
    "Tensor(a!) out, Tensor(b!)? sum, Tensor(c!) r) -> ()"
)
_native.LIBRARY.define(
    "rms_norm_residual_backward_(Tensor dout, Tensor? dsum, Tensor x, Tensor? residual, "
    "Tensor? weight, Tensor r, int dim, bool normalised, Tensor(a!) dx, Tensor(b!)? dweight) -> ()"
)
for _name in ("rms_norm_residual_", "rms_norm_residual_backward_"):
    _native.register_fake(_name)
_NATIVE = _Kernels(
    torch.ops.trm_fast.rms_norm_residual_.default,
    torch.ops.trm_fast.rms_norm_residual_backward_.default,
)


def _refuses(backend: str, call: Call) -> str | None:
    if backend != "reference" and torch.float64 in call.dtypes:
        return "computes in float32; got float64, which runs on the reference"
    if backend == "cpp" and torch.float16 in call.dtypes:
        return "runs float32 and bfloat16; got float16, which runs on the reference"
    return None


def _examples(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Example]:
    shape = (1, 1, *shape)[-max(2, len(shape)) :]
    # The gradient of a mean of one square is but that of eps, which rounding covers.
    shape = tuple(2 if size == 1 else size for size in shape)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    x, residual, dout, dsum = (draw(*shape) for _ in range(4))
    features = [x, residual, draw(shape[-1]), dout, dsum]
    sequence = [x, residual, draw(shape[-2]), dout, dsum]
    return {
        "features": _example(features, -1, False),
        "sequence": _example(sequence, -2, False),
        "features, with the sum": _example(features, -1, True),
    }


def _example(tensors: list[Tensor], dim: int, return_sum: bool) -> Example:
    dtype = tensors[0].dtype

    def prepare(
        backend: str, real: torch.dtype | None
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        copies = [tensor.to(real or dtype, copy=True) for tensor in tensors]
        inputs, grads = [tensor.requires_grad_() for tensor in copies[:3]], copies[3:]
        written: dict[str, Tensor] = {}

        def call() -> None:
            options: dict[str, Any] = {"dim": dim, "return_sum": return_sum, "backend": backend}
            found = rms_norm_residual(*inputs, **options)
            outputs = found if isinstance(found, tuple) else (found,)
            written["out"] = outputs[0].detach()
            with torch.enable_grad():
                dx, _, dweight = torch.autograd.grad(outputs, inputs, grads[: len(outputs)])
            written["x.grad"], written["weight.grad"] = dx, dweight

        return call, written

    # One rounding of each; the rounded sum moves out and gradients by as much again, and sums of
    # up to thousands of products in float32 add a little.
    eps = 2 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
    return Example(prepare, dict.fromkeys(("out", "x.grad", "weight.grad"), eps))


_op = Op(
    name="rms_norm_residual",
    implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
    refuses=_refuses,
    examples=_examples,
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
