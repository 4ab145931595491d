"""One optimizer step for many tensors: gradient filter, update rule, weight average.

For each tensor, at its own step t = 1, 2, ...:

    g     <- grad / grad_scale * clip                       negated with maximize
    ghat  <- filter(g)                                      g without filter, or for t <= after_step
    ghat  <- ghat + weight_decay * param                    rules "adam" and "sgd"
    param <- param * (1 - lr * weight_decay)                rules "adamw" and "atan2"
    m     <- m + (1 - beta1) * (ghat - m)                   every rule but "sgd" and "filter"
             ghat at t = 1, later beta1 * m + (1 - dampening) * ghat                   rule "sgd"
    v     <- beta2 * v + (1 - beta2) * ghat^2               rules "adamw", "adam", "atan2"
    vhat  <- sqrt(v) / sqrt(1 - beta2^t)
    param <- param - lr / (1 - beta1^t) * m / (vhat + eps)  rules "adamw" and "adam"
             param - lr / (1 - beta1^t) * atan2(m, vhat)    rule "atan2"
             param - lr * m                                 rule "sgd"
             m                                              rule "momentum": param is an output
             ghat                                           rule "filter": param is an output
    e     <- e + (1 - weight_ema) * (param - e)             where a weight average is kept; at t = 1
                                                            e is first param as it was before
    t     <- t + 1

With nesterov, "sgd" descends along ghat + beta1 * m, and "momentum" gives
ghat + beta1 * (m - ghat). "sgd" without m descends along ghat.

The filters and their states, mu or a sum S, are in trm_fast/ops/_adaptive_filters.py.
m, v, mu (or S) and e are called exp_avg, exp_avg_sq, grok_exp_avg and weight_ema. If ``found_inf``
is not zero, nothing changes at all. Gradients are only read. Arithmetic is float32, or float64 for
float64 parameters, whatever the storage.

States in bfloat16 are rounded stochastically: 16 random bits are added below the kept ones, so that
a mean that moves by less than one unit per step still moves on average. The bits depend on nothing
but the step, the place of the element in memory and the state, so every backend draws the same:

    word_i = mix(mix(t + 0x9e3779b9 * (2 * (i >> 32) + lane)) ^ i)          32 bits, modulo 2^32
    lane 0: lower half for m, upper half for mu or ring; lane 1: lower half for v, upper half for e

Bytes per float32 parameter and step: 28 for AdamW, as torch's fused one; 36 with mu; 8 more for a
weight average; "projection" and "cosine_gate" 8 more for their sums; "ma" 44 and 2 more to sum its
ring anew; 28 with mu and m in bfloat16. That is the floor, and the fused implementations read and
write each byte once.

Sources: GrokFast, Lee et al. 2024, arXiv:2405.20233, and ironjr/grokfast at 93b2248 (mu starts at
the first gradient; warmup); AdamW and SGD as in torch.optim; the atan2 rule, Everett et al. 2024,
arXiv:2407.05872, and imoneoi/adam-atan2 at 42a1aeb; the momentum of Muon as in torch.optim;
"projection" and "cosine_gate" as in DNYoussef/AIVillage at 381a5fe8; ``mix`` is "lowbias32" of
C. Wellons' hash-prospector.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from trm_fast import _native
from trm_fast._dispatch import Call, Example, Op
from trm_fast.ops._adaptive_filters import FILTERS, exponential_average, moving_average
from trm_fast.ops._adaptive_settings import NATIVE_SCHEMA, RULES, SCHEMA, Settings, Vocabulary
from trm_fast.ops._adaptive_tensors import AdaptiveStep, States
from trm_fast.ops._stochastic_rounding import write
from trm_fast.ops.filter_sums import sums_of


def adaptive_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    grok_exp_avgs: Sequence[Tensor] = (),
    grok_steps: Sequence[Tensor] = (),
    weight_emas: Sequence[Tensor] = (),
    grok_rings: Sequence[Tensor] = (),
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
            Empty for "sgd" without momentum and for "filter".
        exp_avg_sqs: second moments v, likewise; empty for "sgd", "momentum" and "filter".
        steps: finished steps t of each parameter, 0-d float32 on the device of the parameters;
            overwritten.
        grok_exp_avgs: filter states mu, as ``exp_avgs``; the sums S, float32, of "ma"; empty
            without a filter.
        grok_steps: finished steps of each mu, as ``steps``; 0 seeds mu with the gradient.
        weight_emas: averaged weights e, as ``exp_avgs``; empty without an average.
        grok_rings: the last w gradients of each parameter, of shape [w, *shape], each of them in
            the memory order of the parameter, float32 or bfloat16; empty except for "ma".
        settings: the scalars. ``lr``, ``weight_decay`` and ``lamb`` may be tensors of one element,
            which a GPU reads without the host; ``grad_scale``, ``found_inf`` and ``clip`` are such
            tensors, or None.
        backend: the implementation that must run; None takes the first usable one.

    Raises:
        ValueError: lists differ in length, tensors in shape, device or memory order, two of them
            overlap, or a state that the rule or the filter needs is missing.
        TypeError: a dtype or layout is not supported.
        BackendError: the named backend cannot run the call.
    """
    states = States(
        exp_avgs, exp_avg_sqs, steps, grok_exp_avgs, grok_steps, weight_emas, grok_rings
    )
    if not params and not grads:
        return
    if torch.compiler.is_compiling():
        device = params[0].device
        lists = map(list, (params, grads, *states))
        modes, scalars = (settings.rule, settings.filter), settings.arguments(device)
        torch.ops.trm_fast.adaptive_step_(*lists, *modes, *scalars, backend)
        return
    with torch.no_grad():
        step = AdaptiveStep(params, grads, states, backend=backend)
        if settings.reduces:
            step.measure(grads)
        step(grads, settings)
    torch.autograd.graph.increment_version(list(chain(*states)))


# What torch.compile and other users of the dispatcher see.
_native.LIBRARY.define(
    "adaptive_step_(Tensor(a!)[] params, Tensor[] grads, "
    "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[] grok_exp_avgs, Tensor(f!)[] grok_steps, Tensor(g!)[] weight_emas, "
    f"Tensor(h!)[] grok_rings, {SCHEMA}, str? backend) -> ()"
)
# What native code implements: passing addresses costs a tenth of passing lists of tensors.
_native.LIBRARY.define(f"adaptive_step_rows_(Tensor table, Tensor? ticket, {NATIVE_SCHEMA}) -> ()")
# What a library knows, in words that ``Vocabulary.parse`` reads.
_native.LIBRARY.define("_adaptive_step_cpp_knows() -> str")
_native.LIBRARY.define("_adaptive_step_cuda_knows() -> str")


def _from_dispatcher(*arguments: Any) -> None:
    lists, scalars, backend = arguments[:9], arguments[9:-1], arguments[-1]
    adaptive_step_(*lists, settings=Settings.from_arguments(*scalars), backend=backend)


_native.LIBRARY.impl("adaptive_step_", _from_dispatcher, "CompositeExplicitAutograd")
_native.register_fake("adaptive_step_")


def _reference(step: AdaptiveStep, grads: Sequence[Tensor], settings: Settings) -> None:
    absent: list[Any] = [None] * len(grads)
    lists = [tensors or absent for tensors in (step.states | step.counters).values()]
    sums: Any = absent if step.sums is None else step.sums
    if settings.reduces and torch.is_grad_enabled():
        # What was measured knows nothing of autograd.
        sums = list(map(sums_of, grads, step.states["grok_exp_avg"]))
    for tensors in zip(step.params, grads, *lists, step.rings or absent, sums, strict=True):
        _step_one(settings, *tensors)


def _step_one(
    s: Settings,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    grok_exp_avg: Tensor | None,
    weight_ema: Tensor | None,
    step: Tensor,
    grok_step: Tensor | None,
    ring: Tensor | None,
    sums: Tensor | None,
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
    p = param.to(real, copy=torch.is_grad_enabled())

    factor: float | Tensor = -1.0 if s.maximize else 1.0
    if s.grad_scale is not None:
        factor = factor / s.grad_scale.to(param.device)
    if s.clip is not None:
        factor = factor * s.clip.to(param.device)
    g = grad.to(real) * factor
    if grok_exp_avg is not None and grok_step is not None:
        if s.filter == "ma" and ring is not None:
            g = moving_average(s, g, grok_exp_avg, grok_step, ring, t, lamb, keep)
        elif s.windowed:
            raise ValueError(
                f"adaptive_step_: the reference has no filter {s.filter!r} of a window"
            )
        elif s.filter != "none":
            g = exponential_average(s, g, grok_exp_avg, grok_step, sums, factor, t, lamb, keep)

    if s.rule in ("adam", "sgd"):
        g = g + weight_decay * p
    if s.rule in ("adamw", "atan2"):
        p = p * (1 - lr * weight_decay)
    m = g if exp_avg is None else _first_moment(s, g, exp_avg.to(real), t)
    if s.rule == "filter":
        p = g
    elif s.rule == "momentum":
        p = g + s.beta1 * (m - g) if s.nesterov else m
    elif s.rule == "sgd":
        p = p - lr * (g + s.beta1 * m if s.nesterov and exp_avg is not None else m)
    elif s.rule in ("adamw", "adam", "atan2") and exp_avg_sq is not None:
        v = s.beta2 * exp_avg_sq.to(real) + (1 - s.beta2) * g * g
        vhat = v.sqrt() * (1 / (1 - s.beta2**t).sqrt())
        pace = lr / (1 - s.beta1**t)
        p = p - (pace * torch.atan2(m, vhat) if s.rule == "atan2" else pace * m / (vhat + s.eps))
        write(exp_avg_sq, v, keep, bits=(t, 1, 0))
    else:
        raise ValueError(f"adaptive_step_: the reference has no rule {s.rule!r}")

    if weight_ema is not None:
        e = torch.where(t == 1, param.to(real), weight_ema.to(real))
        write(weight_ema, e + (1 - s.weight_ema) * (p - e), keep, bits=(t, 1, 16))
    if exp_avg is not None:
        write(exp_avg, m, keep, bits=(t, 0, 0))
    write(param, p, keep)
    write(step, t, keep)


def _first_moment(s: Settings, g: Tensor, m: Tensor, t: Tensor) -> Tensor:
    if s.rule == "sgd":
        return torch.where(t == 1, g, s.beta1 * m + (1 - s.dampening) * g)
    return m + (1 - s.beta1) * (g - m)


@cache
def _vocabulary(backend: str) -> Vocabulary:
    """Returns what a fast form that runs at all knows."""
    if backend == "triton":
        from trm_fast.kernels import adaptive_step as kernels

        modes = (kernels.RULES, kernels.FILTERS)
        rules, filters = ({name: i for i, name in enumerate(names)} for names in modes)
        return Vocabulary(rules, filters, kernels.Numbers._fields)
    return Vocabulary.parse(getattr(torch.ops.trm_fast, f"_adaptive_step_{backend}_knows")())


def _on_cpp(step: AdaptiveStep, grads: Sequence[Tensor], settings: Settings) -> None:
    kernel = torch.ops.trm_fast.adaptive_step_rows_.default
    step.run_on_rows(kernel, _vocabulary("cpp"), grads, settings)


def _on_cuda(step: AdaptiveStep, grads: Sequence[Tensor], settings: Settings) -> None:
    kernel = torch.ops.trm_fast.adaptive_step_rows_.default
    step.run_on_rows(kernel, _vocabulary("cuda"), grads, settings)


def _on_triton(step: AdaptiveStep, grads: Sequence[Tensor], settings: Settings) -> None:
    from trm_fast.kernels.adaptive_step import adaptive_step_rows_

    step.run_on_rows(adaptive_step_rows_, _vocabulary("triton"), grads, settings)


def _refuses(backend: str, call: Call) -> str | None:
    if backend == "reference":
        return None
    if torch.float64 in call.dtypes:
        return "runs float32, bfloat16 and float16; got float64, which runs on the reference"
    unknown = None if call.details is None else _vocabulary(backend).refuses(call.details)
    return unknown and f"{backend} does not know {unknown}, which runs on the reference"


def _lacks(backend: str) -> tuple[str, ...]:
    return () if backend == "reference" else _vocabulary(backend).lacks()


# What the filters need beside their defaults to show what they do.
_SHOWN: dict[str, dict[str, Any]] = {"highpass": {"lamb": 0.1}, "ma": {"lamb": 5.0}}


def _examples(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Example]:
    rules = [Settings(1e-3, weight_decay=0.1, rule=rule, filter="ema", lamb=2.0) for rule in RULES]
    filters = [
        Settings(1e-3, filter=name, **({"lamb": 2.0} | _SHOWN.get(name, {}))) for name in FILTERS
    ]
    more = {
        "adamw, ema, weight average": Settings(1e-3, filter="ema", lamb=2.0, weight_ema=0.9),
        "atan2, ema, maximize": Settings(1e-3, rule="atan2", filter="ema", lamb=2.0, maximize=True),
        "momentum, ma, nesterov": Settings(
            1e-3, rule="momentum", filter="ma", lamb=5.0, nesterov=True
        ),
    }
    cases = {f"{s.rule}, {s.filter}": s for s in (*rules, *filters)} | more
    return {name: _example(settings, shape, dtype, device) for name, settings in cases.items()}


def _example(
    settings: Settings, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Example:
    generator = torch.Generator().manual_seed(0)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = {name: torch.randn(shape, generator=generator) for name in ("param", "grad", *_STATES)}
    drawn["exp_avg_sq"].square_()
    drawn["grok_ring"] = torch.randn((7, *shape), generator=generator)
    names = _state_names(settings)
    inputs = {
        name: value.to(device, dtype if name in ("param", "grad") else state)
        for name, value in drawn.items()
    }

    def prepare(
        backend: str, real: torch.dtype | None
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        own = {name: value.to(real or value.dtype, copy=True) for name, value in inputs.items()}
        counters = [torch.full((), 9.0, device=device) for _ in range(2)]
        lists = {name: [own[name]] if name in names else [] for name in (*_STATES, "grok_ring")}
        states = States(
            lists["exp_avg"], lists["exp_avg_sq"], [counters[0]],
            lists["grok_exp_avg"], [counters[1]], lists["weight_ema"], lists["grok_ring"],
        )  # fmt: skip
        step = AdaptiveStep([own["param"]], [own["grad"]], states, backend=backend)

        def call() -> None:
            if settings.reduces:
                step.measure([own["grad"]])
            step([own["grad"]], settings)

        return call, {name: own[name] for name in ("param", *names)}

    # At most 8 roundings on the way to a state, relative to its terms, which are at most 4 times
    # its largest value; a parameter is stored once more in its own dtype.
    eps = torch.finfo(state).eps
    tolerance = dict.fromkeys(names, 32 * eps) | {"param": 32 * eps + torch.finfo(dtype).eps}
    return Example(prepare, tolerance, settings.mode)


_STATES = ("exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema")


def _state_names(settings: Settings) -> tuple[str, ...]:
    of_rules = {"sgd": ("exp_avg",), "momentum": ("exp_avg",), "filter": ()}
    names = of_rules.get(settings.rule, ("exp_avg", "exp_avg_sq", "weight_ema"))
    rings = ("grok_ring",) if settings.windowed else ()
    return (*names, "grok_exp_avg", *rings)


_op = Op(
    name="adaptive_step",
    implementations={
        "reference": _reference,
        "cpp": _on_cpp,
        "cuda": _on_cuda,
        "triton": _on_triton,
    },
    refuses=_refuses,
    examples=_examples,
    lacks=_lacks,
    slower="the official filter with AdamW took 2.2 to 10.7 times as long where measured",
)
