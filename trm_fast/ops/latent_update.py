"""The recursion of a tiny recursive model: latent z, answer y and one network for both.

    T cycles of:   n times  z <- net(z + (y + x))      then   y <- net(y + z)

The network is a stack of post-norm layers over [batch, length, width], without biases or weights of
norms. One layer, for h [length, width] of one sample:

    mixer "mlp_t"       m <- rms_L(h + Dm (silu(Gm h) * (Um h)))     one scale for each channel
    mixer "attention"   m <- rms(h + Wo attention(Wqkv h))           rotary positions, no mask
    h <- rms(m + SwiGLU(m))                                          one scale for each token

with rms(v) = v / sqrt(mean(v^2) + eps). The first T - grad_cycles cycles carry no gradient.

Backward, through the calls from last to first: with d the gradient of a call's output,

    of y <- net(y + z):         d_h = d net,   d_y = d_h,    d_z += d_h
    of z <- net(z + (y + x)):   d_h = d net,   d_z = d_h,    d_y += d_h,   d_x += d_h

and each call adds to the gradients of all weights.

With ``recompute`` the forward pass keeps the inputs of the network's calls (reference), or those
of its layers and one scale per token (cpp), and the rest is computed once more. For width D, inner
width I, that is n + 3 or 2 + layers (n + 1) tensors of length x D per sample and cycle.

Work for L tokens and one layer, in multiply-adds: 3 L D I, plus 3 D L Im for mlp_t, or
4 L D^2 + 2 L^2 D for attention. A cycle has n + 1 calls; the backward pass of one costs twice a
forward, and three times with everything recomputed. Products decide: activations stay in caches
where one sample at a time goes through the whole recursion (cpp).

Source: Jolicoeur-Martineau 2025, arXiv:2510.04871; SamsungSAILMontreal/TinyRecursiveModels at
e7b6871.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trm_fast import _native
from trm_fast._dispatch import Example, Op, named_backend
from trm_fast.ops._attention_tables import rotary_tables
from trm_fast.ops._autocast import activation, without_autocast
from trm_fast.ops._recurse import recurse
from trm_fast.ops.rms_norm_residual import rms_norm_residual
from trm_fast.ops.rope_attention import rope_attention
from trm_fast.ops.swiglu import swiglu
from trm_fast.ops.token_mixer import token_mixer

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHTS_PER_LAYER = 4


@dataclass(frozen=True)
class Network:
    """What the weights do not say.

    Args:
        mixer: "mlp_t", whose weights per layer are gate_up [2 Im, length], down [length, Im], or
            "attention" with qkv [3 width, width], out [width, width]. Both are followed by gate_up
            [2 I, width], gate rows first, and down [width, I].
        heads: of attention; they divide width.
        theta: base of the rotary frequencies, or None for no positions.
        eps: added to the mean square in each norm.
    """

    mixer: Literal["mlp_t", "attention"]
    heads: int = 8
    theta: float | None = 10000.0
    eps: float = 1e-5


def latent_update(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    network: Network,
    *,
    n: int = 6,
    T: int = 3,
    grad_cycles: int = 1,
    recompute: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns y and z after T cycles; the formula is at the top.

    Args:
        x: embedded input [batch, length, width]; float32, bfloat16, float16 or float64. Under
            autocast it is cast first, except float64. Products are in its dtype.
        y, z: states of the same shape, cast to the dtype of x.
        weights: four for each layer, as ``network`` lists them, in any floating point dtype.
        network: the rest.
        n: updates of z in a cycle, >= 1.
        T: cycles, >= 1.
        grad_cycles: how many cycles, the last ones, carry gradients; 0 to T.
        recompute: whether to keep little and compute the rest once more in the backward pass.
        backend: the implementation that must run; None takes the first usable one.

    Returns:
        (y, z), of the shape and dtype of x.

    Raises:
        ValueError: a shape, device or number does not fit.
        TypeError: a dtype is not supported.
        BackendError: the named backend cannot run the call.
    """
    _check_states(x, y, z)
    _check_network(x, weights, network)
    _check_counts(n, T, grad_cycles)
    x = activation(x)
    y, z = y.to(x.dtype), z.to(x.dtype)
    obstacles = _obstacles(x, weights, network)
    if torch.compiler.is_compiling() and x.device.type != "cpu" and named_backend() is None:
        backend = backend or "reference"  # which the compiler fuses; on a CPU it cannot do as well
    choice = _op.choose(x.device.type, frozenset({x.dtype}), backend, obstacles)
    with without_autocast(x):
        out: tuple[Tensor, Tensor] = choice.run(
            x, y, z, list(weights), network, n, T, grad_cycles, recompute
        )
    return out


def _check_states(x: Tensor, y: Tensor, z: Tensor) -> None:
    for name, tensor in {"x": x, "y": y, "z": z}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"latent_update: {name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"latent_update: {name} must be a real floating point tensor; got {tensor.dtype}"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"latent_update: {name} must be a dense tensor; got {tensor.layout}")
        if tensor.device != x.device:
            raise ValueError(
                f"latent_update: {name} must be on {x.device} as x; got {tensor.device}"
            )
        if tensor.dim() != 3 or tensor.shape != x.shape:
            raise ValueError(
                "latent_update: x, y and z must be [batch, length, width] alike; got "
                f"{name} {tuple(tensor.shape)} and x {tuple(x.shape)}"
            )


def _check_network(x: Tensor, weights: Sequence[Tensor], network: Network) -> None:
    if not isinstance(network, Network):
        raise TypeError(f"latent_update: network must be a Network; got {type(network).__name__}")
    if network.mixer not in ("mlp_t", "attention"):
        raise ValueError(
            f"latent_update: mixer must be 'mlp_t' or 'attention'; got {network.mixer!r}"
        )
    if not weights or len(weights) % WEIGHTS_PER_LAYER:
        raise ValueError(
            f"latent_update: weights must be 4 for each layer, one layer or more; got "
            f"{len(weights)}"
        )
    _check_numbers(network)
    heads = network.heads
    if network.mixer == "attention" and (heads < 1 or x.shape[2] % (2 * heads)):
        raise ValueError(
            f"latent_update: heads must divide width {x.shape[2]} into even parts; got {heads}"
        )
    for index, weight in enumerate(weights):
        _check_weight(x, weights, network, index, weight)


def _check_numbers(network: Network) -> None:
    heads, theta, eps = network.heads, network.theta, network.eps
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"latent_update: heads must be a whole number; got {heads!r}")
    for name, value in {"theta": 1.0 if theta is None else theta, "eps": eps}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"latent_update: {name} must be a number; got {value!r}")
        if not 0 < value < float("inf"):
            raise ValueError(f"latent_update: {name} must be finite and > 0; got {value!r}")


def _check_weight(
    x: Tensor, weights: Sequence[Tensor], network: Network, index: int, weight: Tensor
) -> None:
    name = f"weights[{index}]"
    if not isinstance(weight, Tensor):
        raise TypeError(f"latent_update: {name} must be a tensor; got {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"latent_update: {name} must be a real floating point tensor; got {weight.dtype}"
        )
    if weight.layout != torch.strided:
        raise TypeError(f"latent_update: {name} must be a dense tensor; got {weight.layout}")
    if weight.device != x.device:
        raise ValueError(f"latent_update: {name} must be on {x.device} as x; got {weight.device}")
    length, width = x.shape[1:]
    first = index - index % 2
    inner = weights[first + 1].shape[-1] if weights[first + 1].dim() else 0
    tokens = network.mixer == "mlp_t"
    wanted = (
        ((2 * inner, length), (length, inner)) if tokens else ((3 * width, width), (width, width)),
        ((2 * inner, width), (width, inner)),
    )[index % WEIGHTS_PER_LAYER // 2][index % 2]
    if tuple(weight.shape) != wanted:
        raise ValueError(f"latent_update: {name} must be {wanted}; got {tuple(weight.shape)}")


def _check_counts(n: int, T: int, grad_cycles: int) -> None:
    for name, value in {"n": n, "T": T, "grad_cycles": grad_cycles}.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"latent_update: {name} must be a whole number; got {value!r}")
    if n < 1 or T < 1:
        raise ValueError(f"latent_update: n and T must be >= 1; got n={n}, T={T}")
    if not 0 <= grad_cycles <= T:
        raise ValueError(f"latent_update: grad_cycles must be 0 to T={T}; got {grad_cycles}")


class _Layers:
    """The network as a cell, each operator on the backend that is named."""

    def __init__(
        self, weights: Sequence[Tensor], network: Network, dtype: torch.dtype, backend: str
    ) -> None:
        # Cast once for all calls.
        self.cast = [weight.detach().to(dtype) for weight in weights]
        self.weights = weights
        self.network, self.backend = network, backend

    def inject(self, x: Tensor, y: Tensor) -> Tensor:
        return y + x

    def update_z(self, z: Tensor, injection: Tensor, level: int) -> Tensor:
        return self._net(z + injection)

    def update_y(self, y: Tensor, z: Tensor, level: int) -> Tensor:
        return self._net(y + z)

    def _net(self, h: Tensor) -> Tensor:
        weights = [_cast(*pair) for pair in zip(self.weights, self.cast, strict=True)]
        for first in range(0, len(weights), WEIGHTS_PER_LAYER):
            h = self._layer(h, *weights[first : first + WEIGHTS_PER_LAYER])
        return h

    def _layer(
        self, h: Tensor, mix_in: Tensor, mix_out: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        backend = self.backend
        if self.network.mixer == "mlp_t":
            mixed, dim = token_mixer(h, mix_in, mix_out, backend=backend), -2
        else:
            mixed, dim = self._attention(h, mix_in, mix_out), -1
        h = self._norm(mixed, h, dim)
        return self._norm(swiglu(h, gate_up, down, backend=backend), h, -1)

    def _norm(self, out: Tensor, residual: Tensor, dim: int) -> Tensor:
        eps = self.network.eps
        normed: Any = rms_norm_residual(out, residual, dim=dim, eps=eps, backend=self.backend)
        return normed  # type: ignore[no-any-return]

    def _attention(self, h: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
        heads = self.network.heads
        split = torch.nn.functional.linear(h, qkv).unflatten(-1, (3, heads, -1))
        q, k, v = split.unbind(2)
        mixed = rope_attention(q, k, v, theta=self.network.theta, backend=self.backend)
        return torch.nn.functional.linear(mixed, out)


def _cast(weight: Tensor, cast: Tensor) -> Tensor:
    """Returns ``cast``, a copy of the weight in another dtype, with the gradient of the weight."""
    if weight.dtype == cast.dtype or torch.compiler.is_compiling():
        return weight.to(cast.dtype)
    out: Tensor = _Cast.apply(weight, cast)
    return out


class _Cast(torch.autograd.Function):
    """One for each use, so that the gradients of all uses are added in the weight's own dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def _composed(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(
        x: Tensor,
        y: Tensor,
        z: Tensor,
        weights: Sequence[Tensor],
        network: Network,
        n: int,
        T: int,
        grad_cycles: int,
        recompute: bool,
    ) -> tuple[Tensor, Tensor]:
        cell = _Layers(weights, network, x.dtype, backend)
        # The compiler cannot trace a recomputation that nothing asks for.
        needed = any(tensor.requires_grad for tensor in (x, y, z, *weights))
        return recurse(
            cell,
            x,
            y,
            z,
            n=n,
            T=T,
            grad_cycles=grad_cycles,
            recompute=recompute and needed,
            preserve_rng_state=False,  # nothing is drawn
        )

    return run


def _cpp(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    network: Network,
    n: int,
    T: int,
    grad_cycles: int,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    x, y, z = (tensor.contiguous().resolve_neg() for tensor in (x, y, z))
    plain = [weight.float().contiguous().resolve_neg() for weight in weights]
    given = (x, y, z, *plain) if grad_cycles == T else (x, *plain)
    if torch.is_grad_enabled() and grad_cycles and any(t.requires_grad for t in given):
        counts = (n, T, grad_cycles)
        if torch.compiler.is_compiling():
            # Takes no tensor twice, such as two zero states or the weights of tied layers.
            x, y, z, *plain = (tensor.view_as(tensor) for tensor in (x, y, z, *plain))
        out: tuple[Tensor, Tensor] = _Fused.apply(x, y, z, network, counts, recompute, *plain)
        return out
    y, z, _ = _forward(x, y, z, plain, network, (n, T, 0), False)
    return y, z


def _forward(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: list[Tensor],
    network: Network,
    counts: tuple[int, int, int],
    keep: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Returns y, z, and the states, scales and layers' insides that the backward pass needs."""
    n, T, grad_cycles = counts
    heads = network.heads if network.mixer == "attention" else 0
    batch, length, width = x.shape
    layers = grad_cycles * (n + 1) * (len(weights) // WEIGHTS_PER_LAYER)
    kept_bytes = _kept_bytes(x, weights, heads) if keep else 0
    states = x.new_empty((2 + layers if layers else 0, batch, length, width))
    scales = x.new_empty((layers, batch, length), dtype=torch.float32)
    kept = x.new_empty((layers, batch, kept_bytes), dtype=torch.uint8)
    y, z = y.detach().clone(), z.detach().clone()
    torch.ops.trm_fast.latent_update_forward_(
        x, y, z, weights, _rope(x, network), states, scales, kept, heads, network.eps, n, T,
        grad_cycles,
    )  # fmt: skip
    return y, z, (states, scales, kept)


def _kept_bytes(x: Tensor, weights: list[Tensor], heads: int) -> int:
    """Returns the bytes of the struct Kept in csrc/latent_update/mlp.h: each part fills whole cache
    lines."""
    length, width = x.shape[1:]
    padded = length + length % 2
    mixer = 3 * padded * width if heads else 2 * weights[1].shape[1] * width
    values = (padded * width, 2 * padded * weights[3].shape[1], mixer)
    parts = (*(x.element_size() * size for size in values), 4 * max(width, padded))
    return sum((part + 63) // 64 * 64 for part in parts)


def _rope(x: Tensor, network: Network) -> Tensor:
    """Returns cosines and sines, [2, length, 1, head dim]; nothing where there are no positions."""
    if network.mixer == "mlp_t" or network.theta is None:
        return torch.empty(0)
    dim = x.shape[2] // network.heads
    tables: Tensor = rotary_tables(x.shape[1], dim, network.theta, torch.float32, x.device)
    return tables


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        network: Network,
        counts: tuple[int, int, int],
        recompute: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, z, saved = _forward(x, y, z, list(weights), network, counts, not recompute)
        ctx.network, ctx.counts = network, counts
        ctx.save_for_backward(x, *saved, *weights)
        return y, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dz: Tensor) -> tuple[Any, ...]:
        x, states, scales, kept, *weights = ctx.saved_tensors
        network, (n, T, grad_cycles) = ctx.network, ctx.counts
        heads = network.heads if network.mixer == "attention" else 0
        # Both are overwritten, and nothing says that the caller's are contiguous or its own.
        dx = torch.empty_like(x)
        dy, dz = (d.clone(memory_format=torch.contiguous_format) for d in (dy, dz))
        dweights = [torch.zeros_like(weight) for weight in weights]
        torch.ops.trm_fast.latent_update_backward_(
            x, weights, _rope(x, network), states, scales, kept, dx, dy, dz, dweights, heads,
            network.eps, n, grad_cycles,
        )  # fmt: skip
        starts = (dy, dz) if grad_cycles == T else (None, None)
        return dx, *starts, None, None, None, *dweights


def _obstacles(
    x: Tensor, weights: Sequence[Tensor], network: Network
) -> tuple[tuple[str, str], ...]:
    """What the C++ form cannot do, for the sizes of a call."""
    width, inner = x.shape[2], weights[3].shape[1]
    if width % 32 or inner % 32:
        return (("cpp", f"needs width and inner in multiples of 32; got {width} and {inner}"),)
    shapes = [weight.shape for weight in weights]
    if shapes != shapes[:WEIGHTS_PER_LAYER] * (len(shapes) // WEIGHTS_PER_LAYER):
        return (("cpp", "needs weights of the same shapes in all layers"),)
    if network.mixer == "mlp_t":
        mix_inner = weights[1].shape[1]
        if mix_inner % 2 == 0 and mix_inner:
            return ()
        return (("cpp", f"needs an even inner width of the token mixer; got {mix_inner}"),)
    dim = width // network.heads
    return (("cpp", f"needs a head dim in multiples of 16; got {dim}"),) if dim % 16 else ()


def _refuses(backend: str, dtypes: frozenset[torch.dtype]) -> str | None:
    (dtype,) = dtypes
    if backend == "triton" and dtype == torch.float64:
        return "computes in float32; got float64, which runs on the reference"
    if backend != "cpp":
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        return f"runs float32 and bfloat16; got {name}, which runs on the reference"
    if not torch.ops.trm_fast.latent_update_cpu_ready(dtype == torch.bfloat16):
        wanted = "AVX512-BF16" if dtype == torch.bfloat16 else "AVX-512"
        return f"needs a CPU with {wanted}"
    return None


_native.LIBRARY.define(
    "latent_update_forward_(Tensor x, Tensor(a!) y, Tensor(b!) z, Tensor[] weights, Tensor rope, "
    "Tensor(c!) states, Tensor(d!) scales, Tensor(e!) kept, int heads, float eps, int n, int T, "
    "int grad_cycles) -> ()"
)
_native.LIBRARY.define(
    "latent_update_backward_(Tensor x, Tensor[] weights, Tensor rope, Tensor states, Tensor scales,"
    " Tensor kept, Tensor(a!) dx, Tensor(b!) dy, Tensor(c!) dz, Tensor(d!)[] dweights, int heads, "
    "float eps, int n, int grad_cycles) -> ()"
)
_native.LIBRARY.define("latent_update_cpu_ready(bool bfloat16) -> bool")
for _name in ("latent_update_forward_", "latent_update_backward_"):
    torch.library.register_fake(f"trm_fast::{_name}", lambda *_: None, lib=_native.LIBRARY)


def _examples(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Example]:
    """``shape`` is [batch, length, width], or its end, of which little is taken: the operators have
    examples of their own.

    Width is filled up to a multiple of 32. The norm over one token or two leaves hardly more than a
    sign, so there are three at least.
    """
    batch, length, width = shape[-3:] if len(shape) >= 3 else (2, 7, 32)
    if 0 < len(shape) < 3:
        length, width = min(shape[0], 9), min(shape[-1], 64)
    width = max(32, (width + 31) // 32 * 32)
    layers = 2 if len(shape) >= 3 else 1
    return {
        mixer: _example((batch, max(3, length), width), mixer, layers, dtype, device)
        for mixer in ("mlp_t", "attention")
    }


def _draw_weights(
    mixer: str, length: int, width: int, layers: int, generator: torch.Generator
) -> list[Tensor]:
    inner, mix_inner = 64, 32
    mix = [(2 * mix_inner, length), (length, mix_inner)]
    if mixer == "attention":
        mix = [(3 * width, width), (width, width)]
    shapes = [*mix, (2 * inner, width), (width, inner)] * layers
    return [torch.randn(s, generator=generator) / max(1, s[1]) ** 0.5 for s in shapes]


def _example(
    shape: tuple[int, int, int],
    mixer: Literal["mlp_t", "attention"],
    layers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Example:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(shape, generator=generator) for _ in range(5)]
    drawn = [*states, *_draw_weights(mixer, shape[1], shape[2], layers, generator)]
    tensors = [tensor.to(device, dtype) for tensor in drawn]
    network = Network(mixer, heads=1 if shape[2] % 64 else 2)

    def prepare(
        backend: str, real: torch.dtype | None
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        copies = [tensor.to(real or dtype, copy=True) for tensor in tensors]
        inputs, grads = [*copies[:3], *copies[5:]], copies[3:5]
        written: dict[str, Tensor] = {}

        def call() -> None:
            x, y, z, *weights = [tensor.requires_grad_() for tensor in inputs]
            with torch.enable_grad():
                out = latent_update(x, y, z, weights, network, n=1, T=1, backend=backend)
                found = torch.autograd.grad(out, [x, *weights], grads)
            written["y"], written["z"] = (state.detach() for state in out)
            written["x.grad"], written["down.grad"] = found[0], found[4]

        return call, written

    # Up to four layers, each with about six roundings and sums of thousands of terms in float32. A
    # layer may enlarge what comes in: h + F(h), divided by a root mean square of about 1, by 2.
    eps = 6 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
    tolerance = sum(2.0**later for later in range(4)) * eps
    return Example(prepare, dict.fromkeys(("y", "z", "x.grad", "down.grad"), tolerance))


_op = Op(
    name="latent_update",
    implementations={
        "reference": _composed("reference"),
        "cpp": _cpp,
        "triton": _composed("triton"),
    },
    refuses=_refuses,
    examples=_examples,
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    composed=("triton",),
)
