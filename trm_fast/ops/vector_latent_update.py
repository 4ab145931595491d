"""The recursion of a recursive model on vectors: states y and z, one small network for each.

    level l = 0 .. T-1, n steps each:   z <- z + s_l LN_z(A2 gelu(A1 [x; y; z] + a1) + a2)
    once per level, or every step:      y <- y + s_l LN_y(C2 gelu(C1 [y; z] + c1) + c2)

for each row of x, y and z [B, h]; A1 [h, 3h], C1 [h, 2h], A2 and C2 [h, h], gelu(v) = v Phi(v), LN
with weight and bias and eps 1e-5. The first T - grad_cycles levels carry no gradient.

Backward, through the updates from last to first: with d the gradient of a new state,
p = A2 u + a2, u = gelu(v), r = (p - mean p) / deviation, g = s_l w_LN d,

    d_p = (g - mean g - r mean(g r)) / deviation        d_v = gelu'(v) (A2^T d_p)
    d_z = d + A1_z^T d_v    d_y += A1_y^T d_v    d_x += A1_x^T d_v       (A1 = [A1_x, A1_y, A1_z])
    dA2 += d_p u^T   dA1 += d_v [x; y; z]^T   da2 += d_p   da1 += d_v
    dw_LN += s_l d r   db_LN += s_l d

and for y alike. A1_x x + a1 is the same in all steps, A1_y y in all steps with the same y: each is
computed once, and its gradients come from the sum of d_v over these steps (cpp, triton). Gradients
of weights are then one product each, over the rows of all steps.

Work in multiply-adds per row, for M updates of z with G of y among them: (1 + 2 M + 4 G) h^2, where
the formula read literally takes (4 M + 3 G) h^2; the backward pass takes twice the part with
gradient. 7 h^2 weights are read once per block of rows: a block stays in the caches of one core
(cpp) or on one multiprocessor (triton). Least memory traffic: x, y, z and the weights once.

With ``recompute`` the backward pass keeps the states before each update, M + G + 1 tensors of
[B, h], and computes the rest once more; without, u, gelu'(v) and r too, 3 (M + G) more.

Source: Jolicoeur-Martineau 2025, arXiv:2510.04871, for the recursion; Hendrycks and Gimpel 2016,
arXiv:1606.08415, for gelu.
"""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from trm_fast import _native
from trm_fast._autograd import once_differentiable
from trm_fast._dispatch import Call, Example, Op, named_backend
from trm_fast.ops._autocast import activation, without_autocast
from trm_fast.ops._flops import register_flops
from trm_fast.ops._recurse import recurse
from trm_fast.ops._recursion_inputs import draw

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = 1e-5
LARGEST_CPP, LARGEST_TRITON = 512, 128


class NetWeights(NamedTuple):
    """The weights of one network: LN(outer gelu(inner v + inner_bias) + outer_bias)."""

    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_bias: Tensor
    gain: Tensor
    shift: Tensor


class Weights(NamedTuple):
    """The weights of both networks, which the op takes one after the other."""

    z: NetWeights
    y: NetWeights


def nets_of(weights: Sequence[Tensor]) -> Weights:
    """Returns the weights by network and name."""
    count = len(NetWeights._fields)
    return Weights(NetWeights(*weights[:count]), NetWeights(*weights[count:]))


def shapes_of(hidden: int) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of the weights: A1 sees three states, C1 two."""
    vector, square = (hidden,), (hidden, hidden)
    behind = (vector, square, vector, vector, vector)
    return ((hidden, 3 * hidden), *behind, (hidden, 2 * hidden), *behind)


class Levels(NamedTuple):
    """The recursion as levels.

    Args:
        scales: step scale of each level, T in all.
        n: updates of z in a level.
        grad_cycles: the last levels, which carry gradients.
        y_every_step: whether y follows each update of z, instead of the last of a level.
    """

    scales: tuple[float, ...]
    n: int
    grad_cycles: int
    y_every_step: bool

    def schedule(self) -> "Schedule":
        """Returns the levels as rounds."""
        if not self.y_every_step:
            return Schedule(self.scales, self.n, self.grad_cycles)
        scales = tuple(scale for scale in self.scales for _ in range(self.n))
        return Schedule(scales, 1, self.grad_cycles * self.n)


class Schedule(NamedTuple):
    """The recursion as rounds, each of some updates of z and one of y.

    Args:
        scales: step scale of each round.
        steps: updates of z in a round.
        grad_rounds: the last rounds, which carry gradients.
    """

    scales: tuple[float, ...]
    steps: int
    grad_rounds: int

    @property
    def updates(self) -> int:
        """How many updates carry gradients."""
        return self.grad_rounds * (self.steps + 1)


def vector_latent_update(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    *,
    step_scales: Sequence[float] | None = None,
    n: int = 6,
    T: int = 3,
    grad_cycles: int = 1,
    y_every_step: bool = False,
    recompute: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns y and z after T levels; the formula is at the top.

    Args:
        x: input [batch, hidden]; float32, bfloat16, float16 or float64. Under autocast it is cast
            first, except float64. Products are in its dtype.
        y, z: states of the same shape, cast to the dtype of x.
        weights: A1 [h, 3h], a1 [h], A2 [h, h], a2, weight and bias of LN_z [h], then C1 [h, 2h],
            c1, C2 [h, h], c2, weight and bias of LN_y; any floating point dtypes.
        step_scales: s_l of each level, T numbers; None is 1 for all.
        n: updates of z in a level, >= 1.
        T: levels, >= 1.
        grad_cycles: how many levels, the last ones, carry gradients; 0 to T.
        y_every_step: whether y follows each update of z, instead of the last of a level.
        recompute: whether to keep the states only and compute the rest once more in the backward
            pass.
        backend: the implementation that must run; None takes the first usable one, and inside
            torch.compile the reference, which the compiler fuses. "cpp" runs
            float32 and bfloat16 with h in multiples of 32 up to 512, "triton" float32, bfloat16 and
            float16 with h of 16, 32, 64 or 128.

    Returns:
        (y, z), of the shape and dtype of x.

    Raises:
        ValueError: a shape, device or number does not fit.
        TypeError: a dtype is not supported.
        BackendError: the named backend cannot run the call.
    """
    _check_states(x, y, z)
    _check_weights(x, weights)
    _check_counts(n, T, grad_cycles)
    levels = Levels(_checked_scales(step_scales, T), n, grad_cycles, y_every_step)
    x = activation(x)
    y, z = y.to(x.dtype), z.to(x.dtype)
    run = _choose(x.device.type, x.dtype, backend, x.shape[1])
    with without_autocast(x):
        out: tuple[Tensor, Tensor] = run(x, y, z, list(weights), levels, recompute)
    return out


def _choose(
    device_type: str, dtype: torch.dtype, backend: str | None, hidden: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    if torch.compiler.is_compiling() and device_type != "cpu" and named_backend() is None:
        backend = backend or "reference"  # which the compiler fuses; on a CPU it cannot do as well
    return _op.choose(device_type, frozenset({dtype}), backend, hidden).run


def _check_states(x: Tensor, y: Tensor, z: Tensor) -> None:
    for name, tensor in (("x", x), ("y", y), ("z", z)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"vector_latent_update: {name} must be a tensor; got {type(tensor).__name__}"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"vector_latent_update: {name} must be a real floating point tensor; got "
                f"{tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"vector_latent_update: {name} must be on {x.device} as x; got {tensor.device}"
            )
        if tensor.dim() != 2 or tensor.shape != x.shape or not x.shape[1]:
            raise ValueError(
                "vector_latent_update: x, y and z must be [batch, hidden] alike, hidden >= 1; got "
                f"{name} {tuple(tensor.shape)} and x {tuple(x.shape)}"
            )


def _check_weights(x: Tensor, weights: Sequence[Tensor]) -> None:
    shapes, device = shapes_of(x.shape[1]), x.device
    if len(weights) != len(shapes):
        raise ValueError(
            f"vector_latent_update: weights must be {len(shapes)} tensors; got {len(weights)}"
        )
    for index, (weight, wanted) in enumerate(zip(weights, shapes, strict=True)):
        name = f"weights[{index}]"
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"vector_latent_update: {name} must be a tensor; got {type(weight).__name__}"
            )
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"vector_latent_update: {name} must be a real floating point tensor; got "
                f"{weight.dtype}"
            )
        if weight.device != device:
            raise ValueError(
                f"vector_latent_update: {name} must be on {device} as x; got {weight.device}"
            )
        if weight.shape != wanted:
            raise ValueError(
                f"vector_latent_update: {name} must be {wanted}; got {tuple(weight.shape)}"
            )


def _check_counts(n: int, T: int, grad_cycles: int) -> None:
    for name, value in (("n", n), ("T", T), ("grad_cycles", grad_cycles)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"vector_latent_update: {name} must be a whole number; got {value!r}")
    if n < 1 or T < 1:
        raise ValueError(f"vector_latent_update: n and T must be >= 1; got n={n}, T={T}")
    if not 0 <= grad_cycles <= T:
        raise ValueError(f"vector_latent_update: grad_cycles must be 0 to T={T}; got {grad_cycles}")


def _checked_scales(step_scales: Sequence[float] | None, T: int) -> tuple[float, ...]:
    if step_scales is None:
        return (1.0,) * T
    if len(step_scales) != T:
        raise ValueError(
            f"vector_latent_update: step_scales must be T={T} numbers; got {len(step_scales)}"
        )
    for scale in step_scales:
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"vector_latent_update: step_scales must be numbers; got {scale!r}")
    return tuple(map(float, step_scales))


class _Networks:
    """Both networks as a cell, in plain torch."""

    def __init__(
        self, weights: Sequence[Tensor], dtype: torch.dtype, scales: tuple[float, ...]
    ) -> None:
        # Cast once for all calls, so that their gradients meet before they are cast back.
        self.weights = nets_of([weight.to(dtype) for weight in weights])
        self.scales = scales

    def inject(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat((x, y), 1)

    def update_z(self, z: Tensor, injection: Tensor, level: int) -> Tensor:
        return z + self.scales[level] * _network(torch.cat((injection, z), 1), self.weights.z)

    def update_y(self, y: Tensor, z: Tensor, level: int) -> Tensor:
        return y + self.scales[level] * _network(torch.cat((y, z), 1), self.weights.y)


def _network(x: Tensor, w: NetWeights) -> Tensor:
    out = linear(gelu(linear(x, w.inner, w.inner_bias)), w.outer, w.outer_bias)
    return layer_norm(out, w.gain.shape, w.gain, w.shift, EPS)


def _reference(
    x: Tensor, y: Tensor, z: Tensor, weights: list[Tensor], levels: Levels, recompute: bool
) -> tuple[Tensor, Tensor]:
    return recurse(
        _Networks(weights, x.dtype, levels.scales),
        x,
        y,
        z,
        n=levels.n,
        T=len(levels.scales),
        grad_cycles=levels.grad_cycles,
        y_every_step=levels.y_every_step,
        recompute=recompute,
        preserve_rng_state=False,  # nothing is drawn
    )


def _cpp(
    x: Tensor, y: Tensor, z: Tensor, weights: list[Tensor], levels: Levels, recompute: bool
) -> tuple[Tensor, Tensor]:
    register_flops()
    plain = [_plain(weight.float()) for weight in weights]
    schedule = levels.schedule()
    x = _plain(x)
    if torch.is_grad_enabled() and levels.grad_cycles:
        starts = (y, z) if levels.grad_cycles == len(levels.scales) else ()
        if any(t.requires_grad for t in (x, *starts, *plain)):
            if torch.compiler.is_compiling():
                # Takes no tensor twice, such as two zero states.
                x, y, z, *plain = (tensor.view_as(tensor) for tensor in (x, y, z, *plain))
            out: tuple[Tensor, Tensor] = _VectorLatentUpdate.apply(
                x, y, z, schedule, recompute, *plain
            )
            return out
    y, z = _own(y), _own(z)
    none = x.new_empty(0)
    torch.ops.trm_fast.vector_latent_update_forward_(
        x, y, z, plain, schedule.scales, schedule.steps, 0, none, none, none
    )
    return y, z


def _plain(tensor: Tensor) -> Tensor:
    return tensor.contiguous().resolve_neg()


def _own(tensor: Tensor) -> Tensor:
    """Returns a contiguous copy that may be overwritten, outside of autograd."""
    # The copy comes last: in torch 2.11 a compiled function whose result is also an intermediate
    # value, as that of resolve_neg is, gives gradients of zero.
    return tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


class _VectorLatentUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        schedule: Schedule,
        recompute: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, z = _own(y), _own(z)
        batch, hidden = x.shape
        rows, updates = batch + batch % 2, schedule.updates
        states = x.new_empty((updates + 1, rows, hidden))
        kept = x.new_empty((0 if recompute else 3 * updates, rows, hidden))
        norms = x.new_empty((0 if recompute else updates, rows), dtype=torch.float32)
        torch.ops.trm_fast.vector_latent_update_forward_(
            x, y, z, weights, schedule.scales, schedule.steps, schedule.grad_rounds,
            states, kept, norms,
        )  # fmt: skip
        ctx.schedule = schedule
        ctx.save_for_backward(x, states, kept, norms, *weights)
        return y, z

    @staticmethod
    @once_differentiable("vector_latent_update")
    def backward(ctx: Any, dy: Tensor, dz: Tensor) -> tuple[Any, ...]:
        x, states, kept, norms, *weights = ctx.saved_tensors
        schedule = ctx.schedule
        dx, dy, dz = torch.empty_like(x), _own(dy), _own(dz)
        gradients = [torch.empty_like(weight) for weight in weights]
        torch.ops.trm_fast.vector_latent_update_backward_(
            x, weights, schedule.scales, schedule.steps, schedule.grad_rounds, states, kept, norms,
            dx, dy, dz, gradients,
        )  # fmt: skip
        starts = (dy, dz) if schedule.grad_rounds == len(schedule.scales) else (None, None)
        return dx, *starts, None, None, *gradients


def _refuses(backend: str, call: Call) -> str | None:
    (dtype,), hidden = call.dtypes, call.details
    if backend == "triton":
        if dtype == torch.float64:
            return "computes in float32; got float64, which runs on the reference"
        if hidden is not None and (hidden < 16 or hidden & (hidden - 1) or hidden > LARGEST_TRITON):
            powers = f"a power of two from 16 to {LARGEST_TRITON}"
            return f"needs hidden to be {powers}; got {hidden}"
    if backend != "cpp":
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        return f"runs float32 and bfloat16; got {dtype}"
    if not torch.ops.trm_fast.vector_latent_update_cpu_ready(dtype == torch.bfloat16):
        wanted = "AVX512-BF16" if dtype == torch.bfloat16 else "AVX-512"
        return f"needs a CPU with {wanted}"
    if hidden is not None and (hidden % 32 or hidden > LARGEST_CPP):
        return f"needs hidden in multiples of 32 up to {LARGEST_CPP}; got {hidden}"
    return None


_native.LIBRARY.define(
    "vector_latent_update_forward_(Tensor x, Tensor(a!) y, Tensor(b!) z, Tensor[] weights, "
    "float[] scales, int steps, int grad_rounds, Tensor(c!) states, Tensor(d!) kept, "
    "Tensor(e!) norms) -> ()"
)
_native.LIBRARY.define(
    "vector_latent_update_backward_(Tensor x, Tensor[] weights, float[] scales, int steps, "
    "int grad_rounds, Tensor states, Tensor kept, Tensor norms, Tensor(a!) dx, Tensor(b!) dy, "
    "Tensor(c!) dz, Tensor(d!)[] gradients) -> ()"
)
_native.LIBRARY.define("vector_latent_update_cpu_ready(bool bfloat16) -> bool")
for _name in ("vector_latent_update_forward_", "vector_latent_update_backward_"):
    _native.register_fake(_name)


def _examples(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Example]:
    """``shape`` is [batch, hidden], or its end; hidden is filled up to a power of two from 32."""
    batch, hidden = (3, 32, *shape)[-2:]
    # What is too large for one of the backends is also slow in Triton's interpreter.
    hidden = 32 if hidden > LARGEST_TRITON else max(32, 1 << max(0, hidden - 1).bit_length())
    return {
        "once per level": _example((batch, hidden), False, dtype, device),
        "every step": _example((batch, hidden), True, dtype, device),
    }


def _example(
    shape: tuple[int, int], y_every_step: bool, dtype: torch.dtype, device: torch.device
) -> Example:
    inputs = draw(shape, shapes_of(shape[1])).copy(dtype, device)

    def prepare(
        backend: str, real: torch.dtype | None
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        given = inputs.copy(real or dtype)
        leaves = (*given.states, *given.weights)
        written: dict[str, Tensor] = {}

        def call() -> None:
            x, y, z, *weights = [tensor.requires_grad_() for tensor in leaves]
            with torch.enable_grad():
                out = vector_latent_update(
                    x, y, z, weights, step_scales=(1.0, 0.5), n=1, T=2,
                    y_every_step=y_every_step, backend=backend,
                )  # fmt: skip
                dx, *found = torch.autograd.grad(out, [x, *weights], given.grads)
            dweights = nets_of(found)
            written["y"], written["z"] = (state.detach() for state in out)
            written["x.grad"] = dx
            written["A1.grad"], written["C2.grad"] = dweights.z.inner, dweights.y.outer

        return call, written

    # At most four updates, each with about six roundings, which the norms keep from growing much.
    tolerance = 8 * 6 * torch.finfo(dtype).eps
    names = ("y", "z", "x.grad", "A1.grad", "C2.grad")
    return Example(prepare, dict.fromkeys(names, tolerance))


_op = Op(
    name="vector_latent_update",
    implementations={
        "reference": _reference,
        "cpp": _cpp,
        "triton": "trm_fast.kernels.vector_latent_update:vector_latent_update",
    },
    refuses=_refuses,
    examples=_examples,
    # By docs/performance.md.
    slower="eager torch took 3.6 to 4.6 times as long where measured",
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
