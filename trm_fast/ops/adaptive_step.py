"""One optimizer step for many tensors: GrokFast filter, Adam-like update, weight average.

For each tensor, at its own step t = 1, 2, ...:

    g     <- grad / grad_scale * clip                       negated with maximize
    mu    <- g                                              at the first filtered step
             alpha * mu + (1 - alpha) * g                   later
    ghat  <- g + lamb * mu                                  filter "ema": GrokFast
             g + lamb * (g - mu)                            filter "highpass": its opposite
             g                                              no filter, or t <= after_step
    ghat  <- ghat + weight_decay * param                    rule "adam"
    param <- param * (1 - lr * weight_decay)                rules "adamw" and "atan2"
    m     <- m + (1 - beta1) * (ghat - m)
    v     <- beta2 * v + (1 - beta2) * ghat^2
    vhat  <- sqrt(v) / sqrt(1 - beta2^t)
    param <- param - lr / (1 - beta1^t) * m / (vhat + eps)  rules "adamw" and "adam"
             param - lr / (1 - beta1^t) * atan2(m, vhat)    rule "atan2"
    e     <- e + (1 - weight_ema) * (param - e)             where a weight average is kept; at t = 1
                                                            e is first param as it was before
    t     <- t + 1

m, v, mu and e are called exp_avg, exp_avg_sq, grok_exp_avg and weight_ema. If ``found_inf`` is not
zero, nothing changes at all. Gradients are only read. Arithmetic is float32, or float64 for float64
parameters, whatever the storage.

States in bfloat16 are rounded stochastically: 16 random bits are added below the kept ones, so that
a mean that moves by less than one unit per step still moves on average. The bits depend on nothing
but the step, the place of the element in memory and the state, so every backend draws the same:

    word_i = mix(mix(t + 0x9e3779b9 * (2 * (i >> 32) + lane)) ^ i)          32 bits, modulo 2^32
    lane 0: lower half for m, upper half for mu; lane 1: lower half for v, upper half for e

Bytes per float32 parameter and step: 28 without mu, as torch's fused AdamW; 36 with it; 8 more for
a weight average; 28 with mu and m in bfloat16. That is the floor, and the fused implementations
read and write each byte once.

Sources: GrokFast, Lee et al. 2024, arXiv:2405.20233, and ironjr/grokfast at 93b2248 (mu starts at
the first gradient); AdamW as in torch.optim; the atan2 rule, Everett et al. 2024, arXiv:2407.05872,
and imoneoi/adam-atan2 at 42a1aeb; ``mix`` is "lowbias32" of C. Wellons' hash-prospector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from trm_fast import _native
from trm_fast._dispatch import Example, Op
from trm_fast.ops._adaptive_tensors import AdaptiveStep
from trm_fast.ops._tensors import is_dense

RULES = ("adamw", "adam", "atan2")
FILTERS = ("none", "ema", "highpass")
Scalar = float | Tensor


@dataclass(slots=True)
class Settings:
    """The scalars of one call.

    Args:
        lr: learning rate, >= 0.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decay of the weights per unit of learning rate, >= 0.
        rule: "adamw", "adam" or "atan2".
        filter: "none", "ema" or "highpass".
        alpha: decay of the filter state mu, in [0, 1].
        lamb: weight of the filter state, >= 0.
        after_step: number of first steps without filter.
        maximize: whether gradients are negated.
        weight_ema: decay of the weight average, in [0, 1].
        grad_scale: what the gradients were multiplied by, a tensor of one element, or None.
        found_inf: not zero if the step must be skipped, a tensor of one element, or None.
        clip: factor of the gradients, a tensor of one element, or None.

    Raises:
        ValueError: a number is out of range or not finite, or a name is unknown. Tensors are not
            looked into, because the host would have to wait for them.
    """

    lr: Scalar
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: Scalar = 0.0
    rule: str = "adamw"
    filter: str = "none"
    alpha: float = 0.98
    lamb: Scalar = 0.0
    after_step: int = 0
    maximize: bool = False
    weight_ema: float = 0.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    clip: Tensor | None = None
    owner: str = "adaptive_step_"  # who speaks in an error
    # What ``arguments`` returned last, as long as no tensor is among it.
    _numbers: tuple[Any, ...] | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._require(self.rule in RULES, "rule", f"one of {', '.join(RULES)}")
        self._require(self.filter in FILTERS, "filter", f"one of {', '.join(FILTERS)}")
        for name in ("lr", "weight_decay", "lamb"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                self._require(value.numel() == 1, name, "a number or a tensor of one element")
                setattr(self, name, value.reshape(()))
            else:
                self._require(0 <= self._number(name) < inf, name, "finite and >= 0")
        for name in ("grad_scale", "found_inf", "clip"):
            self.scale(name, getattr(self, name))
        self._require(0 <= self._number("eps") < inf, "eps", "finite and >= 0")
        if not isinstance(self.after_step, int):
            raise TypeError(f"{self.owner}: after_step must be an int; got {self.after_step!r}")
        self._require(self.after_step >= 0, "after_step", ">= 0")
        for name in ("beta1", "beta2"):
            self._require(0 <= self._number(name) < 1, name, "in [0, 1)")
        for name in ("alpha", "weight_ema"):
            self._require(0 <= self._number(name) <= 1, name, "in [0, 1]")

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if name != "_numbers":
            object.__setattr__(self, "_numbers", None)

    def scale(self, name: str, value: Tensor | None) -> None:
        """Sets "grad_scale", "found_inf" or "clip", checked."""
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{self.owner}: {name} must be a tensor or None; got {value!r}")
        if value is not None or getattr(self, name) is not None:
            setattr(self, name, value)
        if value is not None:
            self._require(value.numel() == 1, name, "a tensor of one element")
            setattr(self, name, value.reshape(()))

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) and not isinstance(value, Real):
            raise TypeError(f"{self.owner}: {name} must be a number; got {value!r}")
        return value  # type: ignore[return-value]

    def _require(self, holds: bool, name: str, required: str) -> None:
        if not holds:
            came = getattr(self, name)
            raise ValueError(f"{self.owner}: {name} must be {required}; got {came!r}")

    def arguments(self, device: torch.device) -> tuple[Any, ...]:
        """Returns the scalars in the order of the schema, for tensors on ``device``."""
        if self._numbers is not None:
            return self._numbers
        lr, lr_at = _split(self.lr, device)
        weight_decay, weight_decay_at = _split(self.weight_decay, device)
        lamb, lamb_at = _split(self.lamb, device)
        optional = (self.grad_scale, self.found_inf, self.clip)
        arguments = (
            RULES.index(self.rule), FILTERS.index(self.filter),
            lr, self.beta1, self.beta2, self.eps, weight_decay, self.alpha, lamb,
            self.after_step, self.maximize, self.weight_ema, lr_at, weight_decay_at, lamb_at,
            *(None if tensor is None else tensor.to(device, torch.float32) for tensor in optional),
        )  # fmt: skip
        tensors = (self.lr, self.weight_decay, self.lamb, *optional)
        if not any(isinstance(value, Tensor) for value in tensors):
            self._numbers = arguments if not torch.compiler.is_compiling() else None
        return arguments

    @classmethod
    def from_arguments(cls, *arguments: Any) -> "Settings":
        """Reverses ``arguments``."""
        rule, filter, lr, beta1, beta2, eps, weight_decay, alpha, lamb, *rest = arguments
        after_step, maximize, weight_ema, lr_at, weight_decay_at, lamb_at, *optional = rest
        return cls(
            lr if lr_at is None else lr_at, beta1, beta2, eps,
            weight_decay if weight_decay_at is None else weight_decay_at,
            RULES[rule], FILTERS[filter], alpha, lamb if lamb_at is None else lamb_at,
            after_step, maximize, weight_ema, *optional,
        )  # fmt: skip


def _split(value: Scalar, device: torch.device) -> tuple[float, Tensor | None]:
    """Returns a number, or a tensor for the device to read, because the host must not wait."""
    if torch.compiler.is_compiling():
        # A number would be burnt into the graph, and each new learning rate would compile again.
        if not isinstance(value, Tensor):
            return 0.0, torch.full((), value, dtype=torch.float32, device=device)
    elif not isinstance(value, Tensor):
        return value, None
    elif value.device.type == "cpu":
        return float(value), None
    return 0.0, value.to(device, torch.float32)


def adaptive_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    grok_exp_avgs: Sequence[Tensor] = (),
    grok_steps: Sequence[Tensor] = (),
    weight_emas: Sequence[Tensor] = (),
    *,
    settings: Settings,
    backend: str | None = None,
) -> None:
    """Takes one optimizer step in place; the formula is at the top of this page.

    Args:
        params: parameters of any shape, stride and of any mix of float32, bfloat16 and float16, all
            on one device; overwritten. float64 runs on the reference.
        grads: their gradients, same shapes, any of these dtypes and strides; only read.
        exp_avgs: first moments m, same shapes and memory order, float32 or bfloat16; overwritten.
        exp_avg_sqs: second moments v, likewise.
        steps: finished steps t of each parameter, 0-d float32 on the device of the parameters;
            overwritten.
        grok_exp_avgs: filter states mu, as ``exp_avgs``; empty without a filter.
        grok_steps: finished steps of each mu, as ``steps``; 0 seeds mu with the gradient.
        weight_emas: averaged weights e, as ``exp_avgs``; empty without an average.
        settings: the scalars. ``lr``, ``weight_decay`` and ``lamb`` may be tensors of one element,
            which a GPU reads without the host; ``grad_scale``, ``found_inf`` and ``clip`` are such
            tensors, or None.
        backend: the implementation that must run; None takes the first usable one.

    Raises:
        ValueError: lists differ in length, tensors in shape, device or memory order, or two of them
            overlap.
        TypeError: a dtype or layout is not supported.
        BackendError: the named backend cannot run the call.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, grok_exp_avgs, grok_steps, weight_emas)
    if not params and not grads:
        return
    if torch.compiler.is_compiling():
        device = params[0].device
        torch.ops.trm_fast.adaptive_step_(*map(list, lists), *settings.arguments(device), backend)
        return
    with torch.no_grad():
        AdaptiveStep(*lists, backend=backend)(grads, settings)
    torch.autograd.graph.increment_version([t for tensors in lists[2:] for t in tensors])


_SETTINGS_SCHEMA = (
    "int rule, int filter, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, float alpha, float lamb, "
    "int after_step, bool maximize, float weight_ema, "
    "Tensor? lr_at, Tensor? weight_decay_at, Tensor? lamb_at, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor? clip"
)
# What torch.compile and other users of the dispatcher see.
_native.LIBRARY.define(
    "adaptive_step_(Tensor(a!)[] params, Tensor[] grads, "
    "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[] grok_exp_avgs, Tensor(f!)[] grok_steps, Tensor(g!)[] weight_emas, "
    f"{_SETTINGS_SCHEMA}, str? backend=None) -> ()"
)
# What native code implements: passing addresses costs a tenth of passing lists of tensors.
_native.LIBRARY.define(
    f"adaptive_step_rows_(Tensor table, Tensor? ticket, {_SETTINGS_SCHEMA}) -> ()"
)


def _from_dispatcher(*arguments: Any) -> None:
    *lists, settings, backend = (
        *arguments[:8],
        Settings.from_arguments(*arguments[8:-1]),
        arguments[-1],
    )
    adaptive_step_(*lists, settings=settings, backend=backend)


_native.LIBRARY.impl("adaptive_step_", _from_dispatcher, "CompositeExplicitAutograd")
torch.library.register_fake("trm_fast::adaptive_step_", lambda *_: None, lib=_native.LIBRARY)


def _reference(step: AdaptiveStep, grads: Sequence[Tensor], settings: Settings) -> None:
    absent: list[Any] = [None] * len(grads)
    lists = [tensors or absent for tensors in (step.states | step.counters).values()]
    for tensors in zip(step.params, grads, *lists, strict=True):
        _step_one(settings, *tensors)


def _step_one(
    s: Settings,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grok_exp_avg: Tensor | None,
    weight_ema: Tensor | None,
    step: Tensor,
    grok_step: Tensor | None,
) -> None:
    real = torch.float64 if param.dtype == torch.float64 else torch.float32
    keep = None if s.found_inf is None else s.found_inf.to(param.device) == 0
    # Scalars are as exact as the device allows; MPS has no float64.
    exact = torch.float32 if param.device.type == "mps" else torch.float64
    t = step.to(exact) + 1
    lr, weight_decay, lamb = (
        value.to(param.device, exact) if isinstance(value, Tensor) else value
        for value in (s.lr, s.weight_decay, s.lamb)
    )
    p, m, v = param.to(real, copy=torch.is_grad_enabled()), exp_avg.to(real), exp_avg_sq.to(real)

    g = grad.to(real)
    if s.grad_scale is not None:
        g = g / s.grad_scale.to(param.device)
    if s.clip is not None:
        g = g * s.clip.to(param.device)
    if s.maximize:
        g = -g
    if s.filter != "none" and grok_exp_avg is not None and grok_step is not None:
        active = t > s.after_step
        mu = torch.where(grok_step == 0, g, s.alpha * grok_exp_avg.to(real) + (1 - s.alpha) * g)
        slow = mu if s.filter == "ema" else g - mu
        g = torch.where(active, g + lamb * slow, g)
        mu = torch.where(active, mu, grok_exp_avg.to(real))
        _write(grok_exp_avg, mu, keep, bits=(t, 0, 16))
        _write(grok_step, torch.where(active, grok_step + 1, grok_step), keep)
    if s.rule == "adam":
        g = g + weight_decay * p
    else:
        p = p * (1 - lr * weight_decay)
    m = m + (1 - s.beta1) * (g - m)
    v = s.beta2 * v + (1 - s.beta2) * g * g
    vhat = v.sqrt() * (1 / (1 - s.beta2**t).sqrt())
    pace = lr / (1 - s.beta1**t)
    p = p - (pace * torch.atan2(m, vhat) if s.rule == "atan2" else pace * m / (vhat + s.eps))

    if weight_ema is not None:
        e = torch.where(t == 1, param.to(real), weight_ema.to(real))
        _write(weight_ema, e + (1 - s.weight_ema) * (p - e), keep, bits=(t, 1, 16))
    _write(exp_avg, m, keep, bits=(t, 0, 0))
    _write(exp_avg_sq, v, keep, bits=(t, 1, 0))
    _write(param, p, keep)
    _write(step, t, keep)


def _write(
    target: Tensor, value: Tensor, keep: Tensor | None, bits: tuple[Tensor, int, int] | None = None
) -> None:
    """Stores ``value`` where ``keep`` holds; ``bits`` is (t, lane, shift) of its random bits."""
    if bits is not None and target.dtype == torch.bfloat16:
        value = _round_stochastically(
            value.float(), _random_words(target, bits[0], bits[1]) >> bits[2]
        )
    value = value.to(target.dtype)
    target.copy_(value if keep is None else torch.where(keep, value, target))


_MASK = 0xFFFFFFFF


def _random_words(target: Tensor, t: Tensor, lane: int) -> Tensor:
    """Returns 32 random bits, as int64, for each element of ``target`` in its memory order."""
    index = torch.arange(target.numel(), device=target.device)
    dense = is_dense(target) and target.numel() > 0
    index = index.as_strided(target.shape, target.stride()) if dense else index.view(target.shape)
    key = _mix((t.long() + 0x9E3779B9 * (2 * (index >> 32) + lane)) & _MASK)
    return _mix(key ^ (index & _MASK))


def _mix(h: Tensor) -> Tensor:
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def _round_stochastically(value: Tensor, words: Tensor) -> Tensor:
    rounded = ((value.view(torch.int32) & _MASK) + (words & 0xFFFF)) >> 16
    signed = ((rounded & 0xFFFF) ^ 0x8000) - 0x8000
    return torch.where(value.isnan(), value.bfloat16(), signed.to(torch.int16).view(torch.bfloat16))


def _on_rows(step: AdaptiveStep, grads: Sequence[Tensor], settings: Settings) -> None:
    step.run_on_rows(torch.ops.trm_fast.adaptive_step_rows_.default, grads, settings)


def _on_triton_rows(step: AdaptiveStep, grads: Sequence[Tensor], settings: Settings) -> None:
    from trm_fast.kernels.adaptive_step import adaptive_step_rows_

    step.run_on_rows(adaptive_step_rows_, grads, settings)


def _refuses(backend: str, dtypes: frozenset[torch.dtype]) -> str | None:
    if backend != "reference" and torch.float64 in dtypes:
        return "runs float32, bfloat16 and float16; got float64, which runs on the reference"
    return None


def _examples(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Example]:
    cases = {
        "adamw, ema": Settings(1e-3, weight_decay=0.1, filter="ema", lamb=2.0, weight_ema=0.9),
        "adam, highpass": Settings(
            1e-3, weight_decay=0.1, rule="adam", filter="highpass", lamb=0.1
        ),
        "atan2, ema, maximize": Settings(1e-3, rule="atan2", filter="ema", lamb=2.0, maximize=True),
    }
    return {name: _example(settings, shape, dtype, device) for name, settings in cases.items()}


def _example(
    settings: Settings, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Example:
    generator = torch.Generator().manual_seed(0)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = {name: torch.randn(shape, generator=generator) for name in ("param", "grad", *_STATES)}
    drawn["exp_avg_sq"].square_()
    inputs = {
        name: value.to(device, state if name in _STATES else dtype) for name, value in drawn.items()
    }

    def prepare(
        backend: str, real: torch.dtype | None
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        own = {name: value.to(real or value.dtype, copy=True) for name, value in inputs.items()}
        counters = [torch.full((), 9.0, device=device) for _ in range(2)]
        step = AdaptiveStep(
            [own["param"]], [own["grad"]], [own["exp_avg"]], [own["exp_avg_sq"]], [counters[0]],
            [own["grok_exp_avg"]], [counters[1]], [own["weight_ema"]], backend=backend,
        )  # fmt: skip
        written = {name: own[name] for name in ("param", *_STATES)}
        return lambda: step([own["grad"]], settings), written

    # At most 8 roundings on the way to a state, relative to its terms, which are at most 4 times
    # its largest value; a parameter is stored once more in its own dtype.
    eps = torch.finfo(state).eps
    tolerance = {name: 32 * eps for name in _STATES} | {"param": 32 * eps + torch.finfo(dtype).eps}
    return Example(prepare, tolerance)


_STATES = ("exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema")

_op = Op(
    name="adaptive_step",
    implementations={
        "reference": _reference,
        "cpp": _on_rows,
        "cuda": _on_rows,
        "triton": _on_triton_rows,
    },
    refuses=_refuses,
    examples=_examples,
)
