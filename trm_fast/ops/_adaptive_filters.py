"""The gradient filters of an adaptive step: names, options, and what each does in plain torch.

With mu <- g at the first filtered step, later mu <- alpha * mu + (1 - alpha) * g:

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

The rest of the step is on the page trm_fast/ops/adaptive_step.py, and so are the sources.
CONTRIBUTING.md says what a new filter, or a new option of one, needs.
"""

from dataclasses import dataclass, field
from math import inf
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trm_fast.ops._stochastic_rounding import random_words, round_stochastically, write

# The one list of filters; "none" is no filter.
Filter = Literal["ema", "ma", "highpass", "projection", "cosine_gate", "none"]
FILTERS: tuple[str, ...] = get_args(Filter)
REDUCING = ("projection", "cosine_gate")  # filters that look at sums over a tensor
WINDOWED = ("ma",)  # filters that remember gradients in a ring, and not their mean
CHUNK = 1024  # elements of a ring that are summed anew together; a block of every fast form

Scalar = float | Tensor


@dataclass(slots=True, kw_only=True)
class FilterSettings:
    """The scalars of a filter.

    Args:
        filter: one of ``FILTERS``.
        alpha: decay of the filter state mu, in [0, 1].
        lamb: weight of the filter state, >= 0; > 0 for "cosine_gate".
        after_step: number of first steps without filter.
        warmup: whether "ma" leaves gradients alone until its window is full.
        proj_eps: "projection" leaves a tensor alone whose ||mu||^2 is not above this, >= 0.
        owner: who speaks in an error.
    """

    # What ``Settings.arguments`` returned last, and for what. First, because every other field that
    # is set looks at it.
    _kept: tuple[Any, ...] | None = field(default=None, init=False, compare=False, repr=False)
    filter: str = "none"
    alpha: float = 0.98
    lamb: Scalar = 0.0
    after_step: int = 0
    warmup: bool = True
    proj_eps: float = 1e-10
    owner: str = "adaptive_step_"

    def _check_filter(self) -> None:
        """Raises for a filter that is unknown, or a number of one that is out of range."""
        self._require(self.filter in FILTERS, "filter", f"one of {', '.join(FILTERS)}")
        self._check_scalar("lamb")
        if self.filter == "cosine_gate":
            gated = isinstance(self.lamb, Tensor) or self.lamb > 0
            self._require(gated, "lamb", "> 0 for filter 'cosine_gate', which divides by it")
        self._require(0 <= self._number("proj_eps") < inf, "proj_eps", "finite and >= 0")
        if not isinstance(self.after_step, int):
            raise TypeError(f"{self.owner}: after_step must be an int; got {self.after_step!r}")
        self._require(self.after_step >= 0, "after_step", ">= 0")
        self._require(0 <= self._number("alpha") <= 1, "alpha", "in [0, 1]")

    @property
    def reduces(self) -> bool:
        """Whether the step needs sums over whole tensors first."""
        return self.filter in REDUCING

    @property
    def windowed(self) -> bool:
        """Whether the filter remembers gradients in a ring."""
        return self.filter in WINDOWED

    def _check_scalar(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, Tensor):
            self._require(value.numel() == 1, name, "a number or a tensor of one element")
            setattr(self, name, value.reshape(()))
        else:
            self._require(0 <= self._number(name) < inf, name, "finite and >= 0")

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) and not isinstance(value, Real):
            raise TypeError(f"{self.owner}: {name} must be a number; got {value!r}")
        return value  # type: ignore[return-value]

    def _require(self, holds: bool, name: str, required: str) -> None:
        if not holds:
            came = getattr(self, name)
            raise ValueError(f"{self.owner}: {name} must be {required}; got {came!r}")


def exponential_average(
    s: FilterSettings,
    g: Tensor,
    grok_exp_avg: Tensor,
    grok_step: Tensor,
    sums: Tensor | None,
    factor: float | Tensor,
    t: Tensor,
    lamb: float | Tensor,
    keep: Tensor | None,
) -> Tensor:
    """Moves mu on and returns the gradient that a filter with a mean makes of ``g``.

    Args:
        s: the settings.
        g: gradient, scaled by ``factor``.
        grok_exp_avg: mu, overwritten.
        grok_step: finished steps of mu, overwritten.
        sums: those over the tensor, of the gradient as it came and mu as it is; None for a filter
            that needs none.
        factor: of the gradient.
        t: number of this step.
        lamb: that of the settings, on the device.
        keep: whether the step is taken at all, a bool on the device; None: it is.
    """
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
    else:
        raise ValueError(f"adaptive_step_: the reference has no filter {s.filter!r}")
    write(grok_exp_avg, torch.where(active, mu, old), keep, bits=(t, 0, 16))
    write(grok_step, torch.where(active, grok_step + 1, grok_step), keep)
    return torch.where(active, filtered, g)


def _gain_and_pull(
    s: FilterSettings,
    sums: Tensor,
    factor: float | Tensor,
    seeding: Tensor,
    lamb: float | Tensor,
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
    if s.filter == "cosine_gate":
        aligned = (dot > 0.5 * (square * mean_square).sqrt()).to(sums.dtype)
        return aligned * lamb + (1 - aligned) / lamb, torch.zeros_like(dot)
    raise ValueError(f"adaptive_step_: the reference has no filter {s.filter!r}")


def moving_average(
    s: FilterSettings,
    g: Tensor,
    grok_sum: Tensor,
    grok_step: Tensor,
    ring: Tensor,
    t: Tensor,
    lamb: float | Tensor,
    keep: Tensor | None,
) -> Tensor:
    """Moves the ring and its sum on and returns the filtered gradient; arguments as above."""
    window, slot = ring.shape[0], grok_step.long() % ring.shape[0]
    known = torch.clamp(grok_step + 1, max=window)
    fresh = g
    if ring.dtype == torch.bfloat16:
        fresh = round_stochastically(g.float(), random_words(grok_sum, t, 0) >> 16).to(g.dtype)
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
    write(grok_sum, total, keep)
    write(grok_step, grok_step + 1, keep)
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
