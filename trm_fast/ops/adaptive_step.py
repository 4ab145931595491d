"""One optimizer step for many tensors: gradient filter, update rule, weight average.

For each tensor, at its own step t = 1, 2, ...:

    g     <- grad / grad_scale * clip                       negated with maximize
    ghat  <- filter(g), see below                           g without filter, or for t <= after_step
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

The filters, with mu <- g at the first filtered step, later mu <- alpha * mu + (1 - alpha) * g:

    "ema"          ghat <- g + lamb * mu                            GrokFast
    "highpass"     ghat <- g + lamb * (g - mu)                      its opposite
    "projection"   ghat <- g + lamb * (g.mu / ||mu||^2) * mu        g where ||mu||^2 <= proj_eps
    "cosine_gate"  ghat <- lamb * g if cos(g, mu) > 1/2 else g / lamb
    "ma"           ghat <- g + lamb * (mean of the last w gradients, this one included)

g.mu, ||mu||^2 and cos are taken over the whole tensor (for parts of a sharded one: over all parts)
from the sums of trm_fast/ops/filter_sums.py. "ma" costs the same whatever w is: a ring of the last
w gradients and their running sum S, with k the number of filtered steps before this one,

    S <- S + g - ring[k mod w];  ring[k mod w] <- g;  mean <- S / min(k + 1, w)

The rounding of S would drift, so elements i of chunk c = i // 1024 in memory sum their ring anew,
oldest to newest, whenever (k + 1 + c) mod 2w = 0: once in 2w steps, never all at once. With warmup
"ma" gives g until the ring is full; after_step withholds its amplification, not its memory.

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
from typing import Any

import torch
from torch import Tensor

from trm_fast import _native
from trm_fast._dispatch import Example, Op
from trm_fast.ops._adaptive_settings import SCHEMA, Settings
from trm_fast.ops._adaptive_tensors import AdaptiveStep
from trm_fast.ops._tensors import is_dense
from trm_fast.ops.filter_sums import sums_of

CHUNK = 1024  # elements of a ring that are summed anew together; a block of every fast form


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
    lists = (
        params, grads, exp_avgs, exp_avg_sqs, steps, grok_exp_avgs, grok_steps, weight_emas,
        grok_rings,
    )  # fmt: skip
    if not params and not grads:
        return
    if torch.compiler.is_compiling():
        device = params[0].device
        torch.ops.trm_fast.adaptive_step_(*map(list, lists), *settings.arguments(device), backend)
        return
    with torch.no_grad():
        step = AdaptiveStep(*lists, backend=backend)
        if settings.reduces:
            step.measure(grads)
        step(grads, settings)
    torch.autograd.graph.increment_version([t for tensors in lists[2:] for t in tensors])


# What torch.compile and other users of the dispatcher see.
_native.LIBRARY.define(
    "adaptive_step_(Tensor(a!)[] params, Tensor[] grads, "
    "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[] grok_exp_avgs, Tensor(f!)[] grok_steps, Tensor(g!)[] weight_emas, "
    f"Tensor(h!)[] grok_rings, {SCHEMA}, str? backend) -> ()"
)
# What native code implements: passing addresses costs a tenth of passing lists of tensors.
_native.LIBRARY.define(f"adaptive_step_rows_(Tensor table, Tensor? ticket, {SCHEMA}) -> ()")


def _from_dispatcher(*arguments: Any) -> None:
    lists, scalars, backend = arguments[:9], arguments[9:-1], arguments[-1]
    adaptive_step_(*lists, settings=Settings.from_arguments(*scalars), backend=backend)


_native.LIBRARY.impl("adaptive_step_", _from_dispatcher, "CompositeExplicitAutograd")
torch.library.register_fake("trm_fast::adaptive_step_", lambda *_: None, lib=_native.LIBRARY)


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
            g = _moving_average(s, g, grok_exp_avg, grok_step, ring, t, lamb, keep)
        elif s.filter not in ("none", "ma"):
            g = _exponential_average(s, g, grok_exp_avg, grok_step, sums, factor, t, lamb, keep)

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
    elif exp_avg_sq is not None:
        v = s.beta2 * exp_avg_sq.to(real) + (1 - s.beta2) * g * g
        vhat = v.sqrt() * (1 / (1 - s.beta2**t).sqrt())
        pace = lr / (1 - s.beta1**t)
        p = p - (pace * torch.atan2(m, vhat) if s.rule == "atan2" else pace * m / (vhat + s.eps))
        _write(exp_avg_sq, v, keep, bits=(t, 1, 0))

    if weight_ema is not None:
        e = torch.where(t == 1, param.to(real), weight_ema.to(real))
        _write(weight_ema, e + (1 - s.weight_ema) * (p - e), keep, bits=(t, 1, 16))
    if exp_avg is not None:
        _write(exp_avg, m, keep, bits=(t, 0, 0))
    _write(param, p, keep)
    _write(step, t, keep)


def _first_moment(s: Settings, g: Tensor, m: Tensor, t: Tensor) -> Tensor:
    if s.rule == "sgd":
        return torch.where(t == 1, g, s.beta1 * m + (1 - s.dampening) * g)
    return m + (1 - s.beta1) * (g - m)


def _exponential_average(
    s: Settings,
    g: Tensor,
    grok_exp_avg: Tensor,
    grok_step: Tensor,
    sums: Tensor | None,
    factor: float | Tensor,
    t: Tensor,
    lamb: float | Tensor,
    keep: Tensor | None,
) -> Tensor:
    """Moves mu on and returns the filtered gradient."""
    active, seeding = t > s.after_step, grok_step == 0
    old = grok_exp_avg.to(g.dtype)
    mu = torch.where(seeding, g, s.alpha * old + (1 - s.alpha) * g)
    if s.filter == "ema":
        filtered = g + lamb * mu
    elif s.filter == "highpass":
        filtered = g + lamb * (g - mu)
    elif sums is not None:
        gain, pull = _gain_and_pull(s, sums, factor, seeding, lamb)
        filtered = gain * g + pull * mu
    _write(grok_exp_avg, torch.where(active, mu, old), keep, bits=(t, 0, 16))
    _write(grok_step, torch.where(active, grok_step + 1, grok_step), keep)
    return torch.where(active, filtered, g)


def _gain_and_pull(
    s: Settings, sums: Tensor, factor: float | Tensor, seeding: Tensor, lamb: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Returns what the gradient and mu are multiplied by, from the sums over the whole tensor."""
    # Of the gradient as it is and of mu before this step; both change below.
    dot, square, mean_square = sums.unbind(-1)
    dot, square = dot * factor, square * factor * factor
    # Not torch.where(..., number, number), which is float32 however exact the sums are.
    keep = s.alpha * (~seeding).to(sums.dtype)
    fresh = 1 - keep
    mean_square = keep**2 * mean_square + 2 * keep * fresh * dot + fresh**2 * square
    dot = keep * dot + fresh * square
    if s.filter == "projection":
        pull = torch.where(mean_square > s.proj_eps, lamb * dot / mean_square, 0.0)
        return torch.ones_like(pull), pull
    aligned = (dot > 0.5 * (square * mean_square).sqrt()).to(sums.dtype)
    return aligned * lamb + (1 - aligned) / lamb, torch.zeros_like(dot)


def _moving_average(
    s: Settings,
    g: Tensor,
    grok_sum: Tensor,
    grok_step: Tensor,
    ring: Tensor,
    t: Tensor,
    lamb: float | Tensor,
    keep: Tensor | None,
) -> Tensor:
    """Moves the ring and its sum on and returns the filtered gradient."""
    window, slot = ring.shape[0], grok_step.long() % ring.shape[0]
    known = torch.clamp(grok_step + 1, max=window)
    fresh = g
    if ring.dtype == torch.bfloat16:
        fresh = _round_stochastically(g.float(), _random_words(grok_sum, t, 0) >> 16).to(g.dtype)
    held = ring.index_select(0, slot.view(1))[0]
    replaced = torch.where(grok_step < window, 0.0, held.to(g.dtype))
    total = torch.where(grok_step == 0, 0.0, grok_sum.to(g.dtype)) + (fresh - replaced)
    written = fresh.to(ring.dtype) if keep is None else torch.where(keep, fresh, held)
    ring.index_copy_(0, slot.view(1), written.to(ring.dtype)[None])
    if total.numel():
        total = _summed_anew(total, ring, grok_sum, grok_step)

    amplified = t > s.after_step
    if s.warmup:
        amplified = amplified & (known == window)
    _write(grok_sum, total, keep)
    _write(grok_step, grok_step + 1, keep)
    return torch.where(amplified, g + lamb * (total / known.to(g.dtype)), g)


def _summed_anew(total: Tensor, ring: Tensor, grok_sum: Tensor, grok_step: Tensor) -> Tensor:
    """Returns ``total`` with the chunks whose turn it is replaced by the sum of their ring."""
    window, size, k = ring.shape[0], total.numel(), grok_step.long()
    # Its turn depends on a tensor, so as many chunks are looked at as can ever be due at once.
    period = 2 * window
    most = -(-size // (CHUNK * period))
    first = (-(k + 1)) % period
    index = (first + period * torch.arange(most, device=ring.device)) * CHUNK
    index = (index[:, None] + torch.arange(CHUNK, device=ring.device)).flatten()
    ages = torch.arange(window, device=ring.device)
    # Oldest first; slots that hold no gradient yet would come before them.
    columns = ring.as_strided((window, size), (size, 1))[:, index.clamp(max=size - 1)]
    columns = columns[(k + 1 + ages) % window].to(total.dtype)
    sums = torch.zeros_like(columns[0])
    for age, column in enumerate(columns):
        sums = sums + torch.where(age >= window - 1 - k, column, 0.0)

    in_memory_order = torch.empty_strided(
        grok_sum.shape, grok_sum.stride(), dtype=total.dtype, device=total.device
    ).copy_(total)
    flat = in_memory_order.as_strided((size,), (1,))
    # What lies behind the end is written to one place behind it.
    longer = torch.cat([flat, flat[:1]])
    longer = longer.index_copy(0, index.clamp(max=size), sums)
    return longer[:size].as_strided(grok_sum.shape, grok_sum.stride())


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
        "adamw, projection": Settings(1e-3, filter="projection", lamb=2.0),
        "sgd, cosine_gate": Settings(1e-3, rule="sgd", filter="cosine_gate", lamb=2.0),
        "momentum, ma": Settings(1e-3, rule="momentum", filter="ma", lamb=5.0, nesterov=True),
    }
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
        step = AdaptiveStep(
            [own["param"]], [own["grad"]], lists["exp_avg"], lists["exp_avg_sq"], [counters[0]],
            lists["grok_exp_avg"], [counters[1]], lists["weight_ema"], lists["grok_ring"],
            backend=backend,
        )  # fmt: skip

        def call() -> None:
            if settings.reduces:
                step.measure([own["grad"]])
            step([own["grad"]], settings)

        return call, {name: own[name] for name in ("param", *names)}

    # At most 8 roundings on the way to a state, relative to its terms, which are at most 4 times
    # its largest value; a parameter is stored once more in its own dtype.
    eps = torch.finfo(state).eps
    tolerance = dict.fromkeys(names, 32 * eps) | {"param": 32 * eps + torch.finfo(dtype).eps}
    return Example(prepare, tolerance)


_STATES = ("exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema")


def _state_names(settings: Settings) -> tuple[str, ...]:
    plain = settings.rule in ("sgd", "momentum")
    names = [name for name in _STATES if not plain or name in ("exp_avg", "grok_exp_avg")]
    return (*names, "grok_ring") if settings.filter == "ma" else tuple(names)


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
