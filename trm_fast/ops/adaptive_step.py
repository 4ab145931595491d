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
    e     <- e + (1 - weight_ema) * (param - e)             where a weight average is kept
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
from dataclasses import dataclass
from math import isfinite
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trm_fast import _native
from trm_fast._dispatch import Example, Op
from trm_fast.ops._tensors import in_order_of, is_dense, overlap, same_order

RULES = ("adamw", "adam", "atan2")
FILTERS = ("none", "ema", "highpass")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
STATE_STORAGE = (torch.float32, torch.bfloat16)

# One row of the table per tensor; csrc/adaptive_step/table.h reads the same columns. Addresses are
# 0 where absent.
COLUMNS = (
    "param", "grad", "exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema", "step", "grok_step",
    "size", "param_dtype", "grad_dtype",
    "exp_avg_dtype", "exp_avg_sq_dtype", "grok_exp_avg_dtype", "weight_ema_dtype",
)  # fmt: skip

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

    def __post_init__(self) -> None:
        self._one_of("rule", RULES)
        self._one_of("filter", FILTERS)
        for name in ("lr", "weight_decay", "lamb"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                self._require(value.numel() == 1, name, "a number or a tensor of one element")
                setattr(self, name, value.reshape(()))
            else:
                self._require(isfinite(value) and value >= 0, name, "finite and >= 0")
        self._require(isfinite(self.eps) and self.eps >= 0, "eps", "finite and >= 0")
        self._require(0 <= self.beta1 < 1, "beta1", "in [0, 1)")
        self._require(0 <= self.beta2 < 1, "beta2", "in [0, 1)")
        self._require(0 <= self.alpha <= 1, "alpha", "in [0, 1]")
        self._require(0 <= self.weight_ema <= 1, "weight_ema", "in [0, 1]")
        self._require(self.after_step >= 0, "after_step", ">= 0")

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        self._require(getattr(self, name) in known, name, f"one of {', '.join(known)}")

    def _require(self, holds: bool, name: str, required: str) -> None:
        if not holds:
            raise ValueError(
                f"{self.owner}: {name} must be {required}; got {getattr(self, name)!r}"
            )

    def arguments(self, device: torch.device) -> tuple[Any, ...]:
        """Returns the scalars in the order of the schema, for tensors on ``device``."""
        lr, lr_at = _split(self.lr, device)
        weight_decay, weight_decay_at = _split(self.weight_decay, device)
        lamb, lamb_at = _split(self.lamb, device)
        optional = (self.grad_scale, self.found_inf, self.clip)
        return (
            RULES.index(self.rule), FILTERS.index(self.filter),
            lr, self.beta1, self.beta2, self.eps, weight_decay, self.alpha, lamb,
            self.after_step, self.maximize, self.weight_ema, lr_at, weight_decay_at, lamb_at,
            *(None if tensor is None else tensor.to(device, torch.float32) for tensor in optional),
        )  # fmt: skip

    @classmethod
    def from_arguments(cls, *arguments: Any) -> "Settings":
        """Reverses ``arguments``."""
        rule, filter_, *numbers = arguments[:12]
        values = [at if at is not None else value for value, at in zip(
            (numbers[0], numbers[4], numbers[6]), arguments[12:15], strict=True)]  # fmt: skip
        numbers[0], numbers[4], numbers[6] = values
        lr, beta1, beta2, eps, weight_decay, alpha, lamb, after_step, maximize, weight_ema = numbers
        return cls(
            lr, beta1, beta2, eps, weight_decay, RULES[rule], FILTERS[filter_], alpha, lamb,
            after_step, maximize, weight_ema, *arguments[15:],
        )  # fmt: skip


def _split(value: Scalar, device: torch.device) -> tuple[float, Tensor | None]:
    """Returns a number, or a tensor for the device to read, because the host must not wait."""
    if not isinstance(value, Tensor):
        return value, None
    waits = value.device.type != "cpu" or torch.compiler.is_compiling()
    return (0.0, value.to(device, torch.float32)) if waits else (float(value), None)


def _require(holds: bool, argument: str, required: str, came: object) -> None:
    if not holds:
        raise ValueError(f"adaptive_step_: {argument} must be {required}; got {came!r}")


class AdaptiveStep:
    """The tensors of a step, checked once and kept; called with the gradients of each step.

    Args and errors: as ``adaptive_step_``. ``grads`` stands for the gradients of all later calls,
        whose dtypes must be the
    same; ``fits`` tells whether they are, and whether the parameters still lie where they lay.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        grok_exp_avgs: Sequence[Tensor] = (),
        grok_steps: Sequence[Tensor] = (),
        weight_emas: Sequence[Tensor] = (),
        *,
        backend: str | None = None,
    ) -> None:
        self.params = params
        self.states = {
            "exp_avg": exp_avgs,
            "exp_avg_sq": exp_avg_sqs,
            "grok_exp_avg": grok_exp_avgs,
            "weight_ema": weight_emas,
        }
        self.counters = {"step": steps, "grok_step": grok_steps}
        _check_tensors(params, grads, self.states, self.counters)
        self.device = params[0].device if params else torch.device("cpu")
        self.written = [*params, *(t for tensors in self.states.values() for t in tensors)]
        dtypes = frozenset(t.dtype for t in (*self.written, *grads))
        self.choice = _op.choose(self.device.type, dtypes, backend)
        self._kinds = list(map(_kind, grads))
        self._addresses = list(map(Tensor.data_ptr, params))
        self._contiguous = all(map(Tensor.is_contiguous, params))
        self._scattered = [i for i, param in enumerate(params) if not is_dense(param)]
        self._table: Tensor | None = None

    def fits(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Returns whether ``grads`` have the expected dtypes and ``params`` lie where they lay."""
        return (
            list(map(_kind, grads)) == self._kinds
            and list(map(Tensor.data_ptr, params)) == self._addresses
        )

    def __call__(self, grads: Sequence[Tensor], settings: Settings) -> None:
        """Takes one step; ``grads`` must fit."""
        if self.params:
            self.choice.run(self, grads, settings)

    def run_on_rows(
        self, kernel: Callable[..., None], grads: Sequence[Tensor], settings: Settings
    ) -> None:
        """Calls a kernel that walks memory by address; other orders of memory go through copies."""
        table = self._rows()
        columns = table.numpy()
        if not (self._contiguous and all(map(Tensor.is_contiguous, grads))):
            grads = [
                in_order_of(grad, param) for grad, param in zip(grads, self.params, strict=True)
            ]
        columns[:, COLUMNS.index("grad")] = list(map(Tensor.data_ptr, grads))
        copies = {i: self.params[i].contiguous() for i in self._scattered}
        for i, copy in copies.items():
            columns[i, COLUMNS.index("param")] = copy.data_ptr()
        kernel(table, self._ticket, *settings.arguments(self.device))
        for i, copy in copies.items():
            self.params[i].copy_(copy)
        torch.autograd.graph.increment_version(self.written)

    def _rows(self) -> Tensor:
        if self._table is None:
            filled: dict[str, list[int]] = {"size": [param.numel() for param in self.params]}
            filled["grad_dtype"] = [STORAGE.index(dtype) for dtype, _ in self._kinds]
            for name, tensors in ({"param": self.params} | self.states | self.counters).items():
                filled[name] = [tensor.data_ptr() for tensor in tensors]
                if name not in self.counters:
                    filled[f"{name}_dtype"] = [STORAGE.index(tensor.dtype) for tensor in tensors]
            absent = [0] * len(self.params)
            columns = [filled.get(name) or absent for name in COLUMNS]
            self._table = torch.from_numpy(np.array(columns, dtype=np.int64).T.copy())
            on_gpu = self.device.type == "cuda"
            # Counts the thread blocks that are done, so that the last one may advance the step
            # counters.
            self._ticket = torch.zeros(1, dtype=torch.int32, device=self.device) if on_gpu else None
        return self._table


_kind = attrgetter("dtype", "layout")


def _check_tensors(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    counters: dict[str, Sequence[Tensor]],
) -> None:
    for name, tensors in {"grads": grads, **states, **counters}.items():
        optional = name in ("grok_exp_avg", "grok_step", "weight_ema")
        fits = len(tensors) == len(params) or (optional and not tensors)
        _require(fits, name, f"of {len(params)} tensors, one for each parameter", len(tensors))
    _require(
        len(states["grok_exp_avg"]) == len(counters["grok_step"]),
        "grok_step", "given together with grok_exp_avg", len(counters["grok_step"]),
    )  # fmt: skip
    for index, param in enumerate(params):
        _check_param(index, param, params[0].device)
        _check_like(f"grads[{index}]", grads[index], param, STORAGE)
        for name, tensors in states.items():
            if tensors:
                _check_like(f"{name}[{index}]", tensors[index], param, STATE_STORAGE)
                _check_layout(f"{name}[{index}]", tensors[index], param)
        for name, tensors in counters.items():
            if tensors:
                _check_counter(f"{name}[{index}]", tensors[index], param.device)
    if params and params[0].device.type == "meta":
        return
    written = [*params, *(t for tensors in (*states.values(), *counters.values()) for t in tensors)]
    _require(
        not overlap(written, grads), "written tensors", "disjoint in memory", "two that overlap"
    )


def _check_param(index: int, param: Tensor, device: torch.device) -> None:
    name = f"params[{index}]"
    if param.dtype not in (*STORAGE, torch.float64):
        raise TypeError(
            f"adaptive_step_: {name} must be a floating point tensor; got {param.dtype}"
        )
    _require(param.device == device, name, f"on {device} as params[0]", str(param.device))


def _check_like(name: str, tensor: Tensor, param: Tensor, storage: tuple[torch.dtype, ...]) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"adaptive_step_: {name} must be a dense tensor; got {tensor.layout}")
    allowed = (torch.float64,) if param.dtype == torch.float64 else storage
    if tensor.dtype not in allowed:
        raise TypeError(
            f"adaptive_step_: {name} must be one of {allowed} for a {param.dtype} parameter; "
            f"got {tensor.dtype}"
        )
    matches = tensor.shape == param.shape and tensor.device == param.device
    required = f"{tuple(param.shape)} on {param.device} as its parameter"
    _require(matches, name, required, f"{tuple(tensor.shape)} on {tensor.device}")


def _check_layout(name: str, tensor: Tensor, param: Tensor) -> None:
    wanted = param if is_dense(param) else torch.empty(param.shape, device="meta")
    required = f"of strides {wanted.stride()}, in the memory order of its parameter"
    _require(same_order(tensor, wanted), name, required, tensor.stride())


def _check_counter(name: str, tensor: Tensor, device: torch.device) -> None:
    fits = tensor.dtype == torch.float32 and tensor.dim() == 0 and tensor.device == device
    came = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
    _require(fits, name, f"a float32 tensor of shape () on {device}", came)


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
    if torch.compiler.is_compiling():
        device = params[0].device
        torch.ops.trm_fast.adaptive_step_(*map(list, lists), *settings.arguments(device), backend)
        return
    with torch.no_grad():
        AdaptiveStep(*lists, backend=backend)(grads, settings)


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
    t = step.double() + 1
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
        g = torch.where(active, g + s.lamb * slow, g)
        mu = torch.where(active, mu, grok_exp_avg.to(real))
        _write(grok_exp_avg, mu, keep, bits=(t, 0, 16))
        _write(grok_step, torch.where(active, grok_step + 1, grok_step), keep)
    if s.rule == "adam":
        g = g + s.weight_decay * p
    else:
        p = p * (1 - s.lr * s.weight_decay)
    m = m + (1 - s.beta1) * (g - m)
    v = s.beta2 * v + (1 - s.beta2) * g * g
    vhat = v.sqrt() * (1 / (1 - s.beta2**t).sqrt())
    pace = s.lr / (1 - s.beta1**t)
    p = p - (pace * torch.atan2(m, vhat) if s.rule == "atan2" else pace * m / (vhat + s.eps))

    if weight_ema is not None:
        e = weight_ema.to(real)
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
        value = _round_stochastically(value, _random_words(target, bits[0], bits[1]) >> bits[2])
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
