"""The formula of adaptive_step in float64, written again, and the error that float32 may have."""

import math
import os

import torch
from torch import Tensor

from trm_fast.ops import Settings

STATES = ("exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema")
WRITTEN = ("param", *STATES, "step", "grok_step", "grok_ring")
CHUNK = 1024  # elements of a ring that are summed anew together

# Everything that one tensor brings to a step, by the names of the page.
Item = dict[str, Tensor]


def number(value: float | Tensor | None, default: float = 1.0) -> float:
    return default if value is None else float(value)


def gradient(item: Item, s: Settings) -> Tensor:
    g = item["grad"].double() / number(s.grad_scale) * number(s.clip)
    return -g if s.maximize else g


def filters_now(item: Item, s: Settings) -> bool:
    late_enough = s.filter == "ma" or float(item["step"]) + 1 > s.after_step
    return s.filter != "none" and "grok_exp_avg" in item and late_enough


def truth(item: Item, s: Settings) -> dict[str, Tensor]:
    """The formula of the page, in float64, for one tensor."""
    lr, wd = number(s.lr), number(s.weight_decay)
    p, g, t = item["param"].double(), gradient(item, s), float(item["step"]) + 1
    found: dict[str, Tensor] = {"step": item["step"].double() + 1}
    if filters_now(item, s):
        moved = moving_average if s.filter == "ma" else exponential_average
        g, states = moved(item, s, g)
        found |= states | {"grok_step": item["grok_step"].double() + 1}
    if s.rule in ("adam", "sgd"):
        g = g + wd * p
    if s.rule in ("adamw", "atan2"):
        p = p * (1 - lr * wd)
    m = g
    if "exp_avg" in item:
        m = found["exp_avg"] = first_moment(s, t, item["exp_avg"].double(), g)
    if s.rule == "filter":
        p = g
    elif s.rule == "momentum":
        p = g + s.beta1 * (m - g) if s.nesterov else m
    elif s.rule == "sgd":
        p = p - lr * (g + s.beta1 * m if s.nesterov and "exp_avg" in item else m)
    elif s.rule in ("adamw", "adam", "atan2"):
        v = s.beta2 * item["exp_avg_sq"].double() + (1 - s.beta2) * g**2
        found["exp_avg_sq"] = v
        p = p - move(s, t, m, v)
    else:
        raise NotImplementedError(f"the truth of rule {s.rule!r}")
    if "weight_ema" in item:
        e = item["weight_ema"].double() if t > 1 else item["param"].double()
        found["weight_ema"] = e + (1 - s.weight_ema) * (p - e)
    found["param"] = p
    return {name: found.get(name, item[name].double()) for name in WRITTEN if name in item}


def first_moment(s: Settings, t: float, m: Tensor, g: Tensor) -> Tensor:
    if s.rule == "sgd":
        return g if t == 1 else s.beta1 * m + (1 - s.dampening) * g
    return m + (1 - s.beta1) * (g - m)


def exponential_average(item: Item, s: Settings, g: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    lamb, seeded = number(s.lamb), float(item["grok_step"]) > 0
    mu = s.alpha * item["grok_exp_avg"].double() + (1 - s.alpha) * g if seeded else g
    if s.filter == "ema":
        filtered = g + lamb * mu
    elif s.filter == "highpass":
        filtered = g + lamb * (g - mu)
    elif s.filter == "projection":
        square = (mu * mu).sum()
        filtered = g + lamb * (g * mu).sum() / square * mu if square > s.proj_eps else g
    elif s.filter == "cosine_gate":
        cosine = (g * mu).sum() / (g.norm() * mu.norm())
        filtered = lamb * g if cosine > 0.5 else g / lamb
    else:
        raise NotImplementedError(f"the truth of filter {s.filter!r}")
    return filtered, {"grok_exp_avg": mu}


def moving_average(item: Item, s: Settings, g: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    ring, k = item["grok_ring"].double(), int(item["grok_step"])
    window = len(ring)
    total = item["grok_exp_avg"].double() if k else torch.zeros_like(g)
    total = total + g - (ring[k % window] if k >= window else 0)
    ring[k % window] = g
    last = [ring[(k - age) % window] for age in range(min(k + 1, window))]
    total = torch.where(is_due(item), sum(last), total)
    amplified = float(item["step"]) + 1 > s.after_step and not (s.warmup and len(last) < window)
    filtered = g + number(s.lamb) * total / len(last) if amplified else g
    return filtered, {"grok_exp_avg": total, "grok_ring": ring}


def is_due(item: Item) -> Tensor:
    """Which elements sum their ring anew at the next step."""
    total = item["grok_exp_avg"]
    place = torch.empty_strided(total.shape, total.stride(), dtype=torch.int64, device=total.device)
    place.as_strided((place.numel(),), (1,)).copy_(torch.arange(place.numel()))
    return (int(item["grok_step"]) + 1 + place // CHUNK) % (2 * len(item["grok_ring"])) == 0


def move(s: Settings, t: float, m: Tensor, v: Tensor) -> Tensor:
    vhat = v.sqrt() / math.sqrt(1 - s.beta2**t)
    pace = number(s.lr) / (1 - s.beta1**t)
    return pace * (torch.atan2(m, vhat) if s.rule == "atan2" else m / (vhat + s.eps))


def allowed(item: Item, s: Settings) -> dict[str, Tensor]:
    """How far float32 (for float64 parameters: float64) may be from ``truth``, elementwise.

    A sum of products is off by at most k * u * (the sum of the absolute values of its terms), where
    k counts the roundings that one term passes, those of the constants included, and u is half of
    eps. ``filtered_error`` gives terms and error of ghat; the decay of adam and sgd adds 2. m adds
    4 and v, which squares ghat, twice its error and 4. The move of the parameter grows with m and
    falls with v, so its error is the largest one over the corners of m +- dm and v +- dv, plus 16 u
    for its own operations (9, of which a GPU rounds division and root to 2 ulp; atan2: 4 ulp, 6 u).
    """
    exact = item["param"].dtype == torch.float64
    u = torch.finfo(torch.float64 if exact else torch.float32).eps / 2
    tiny = 2.0**-1022 if exact else 2.0**-126  # below it hardware may flush to zero
    wd = number(s.weight_decay)
    size = {name: item[name].double().abs() for name in ("param", "grad", *STATES) if name in item}
    g, dg, error = filtered_error(item, s, size, u, tiny)
    if s.rule in ("adam", "sgd"):
        g = g + wd * size["param"]
        dg = dg + 2 * u * g
    after = truth(item, s)
    if "exp_avg_sq" in item:
        error |= adaptive_error(item, s, size, g, dg, after, u, tiny)
    else:
        error |= plain_error(item, s, size, g, dg, u, tiny)
    if "weight_ema" in item:
        e = size["weight_ema"] if float(item["step"]) > 0 else size["param"]
        terms = e + after["param"].abs() + e
        error["weight_ema"] = (1 - s.weight_ema) * error["param"] + 4 * u * terms + tiny
    return {name: error.get(name, torch.zeros(())) for name in after}


def adaptive_error(
    item: Item,
    s: Settings,
    size: Item,
    g: Tensor,
    dg: Tensor,
    after: dict[str, Tensor],
    u: float,
    tiny: float,
) -> dict[str, Tensor]:
    lr, wd, t = number(s.lr), number(s.weight_decay), float(item["step"]) + 1
    dm = (1 - s.beta1) * dg + 4 * u * (size["exp_avg"] + (1 - s.beta1) * (g + size["exp_avg"]))
    dv = 4 * u * (s.beta2 * size["exp_avg_sq"] + (1 - s.beta2) * g**2)
    dm, dv = dm + tiny, dv + (1 - s.beta2) * (2 * g + dg) * dg + 2 * tiny
    m, v = after["exp_avg"], after["exp_avg_sq"]
    moved = move(s, t, m, v)
    corners = torch.stack([move(s, t, m + a * dm, (v + b * dv).clamp(min=0)) for a, b in _CORNERS])
    # The powers behind the bias corrections are taken in double: 4 of its roundings over 1 - beta.
    power = 4 * 2.0**-53 / (1 - max(s.beta1, s.beta2))
    own = (16 * u + power) * corners.abs().amax(0)
    dp = (corners - moved).abs().amax(0) + own + 5 * u * (1 + lr * wd) * size["param"] + tiny
    return {"param": dp, "exp_avg": dm, "exp_avg_sq": dv}


def plain_error(
    item: Item, s: Settings, size: Item, g: Tensor, dg: Tensor, u: float, tiny: float
) -> dict[str, Tensor]:
    """Of "sgd", "momentum" and "filter": at most 6 roundings on the way to m, 8 on that to p."""
    error, along, dalong = {}, g, dg
    if "exp_avg" in item:
        along = g + 2 * size["exp_avg"]  # more than the terms of any first moment
        dalong = dg + 6 * u * along
        error["exp_avg"] = dalong + tiny
    if s.nesterov:
        along, dalong = g + along, dg + dalong
    if s.rule == "sgd":
        dp = number(s.lr) * (dalong + 4 * u * along) + 2 * u * size["param"]
    else:
        dp = dalong + 4 * u * along
    return error | {"param": dp + tiny}


def filtered_error(
    item: Item, s: Settings, size: Item, u: float, tiny: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum of the absolute terms of ghat, the error of ghat, and those of the filter's states.

    g has 3 roundings, mu 6. "ema" and "highpass" add 4 to each.
    """
    lamb = number(s.lamb)
    g = size["grad"] / number(s.grad_scale) * number(s.clip)
    if not filters_now(item, s):
        return g, 3 * u * g, {}
    if s.filter == "ma":
        return _ring_error(item, s, g, u, tiny)
    seeded = float(item["grok_step"]) > 0
    mu = s.alpha * size["grok_exp_avg"] + (1 - s.alpha) * g if seeded else g
    error = {"grok_exp_avg": 6 * u * mu + tiny}
    if s.filter in ("ema", "highpass"):
        terms = g + lamb * (mu if s.filter == "ema" else g + mu)
        return terms, 10 * u * terms, error
    if s.filter == "cosine_gate":
        _assert_clear(item, s, u)
        terms = max(lamb, 1 / lamb) * g
        return terms, 8 * u * terms, error
    assert s.filter == "projection", f"the error of filter {s.filter!r}"
    pull, dpull = _pull_error(item, s, u)
    terms = g + pull * mu
    return terms, 10 * u * terms + dpull * mu, error


# A sum has one rounding for each product and at most 32 additions in float32, one after the other;
# the rest is done in float64. Its factors, alpha and lamb among them, add at most 10.
_SUM = 45


def _sums(item: Item, s: Settings, u: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """g.mu, ||mu||^2 and ||g||^2 of the true mu, and the errors of the first two."""
    g, old = gradient(item, s), item["grok_exp_avg"].double()
    alpha = s.alpha if float(item["grok_step"]) > 0 else 0.0
    mu = alpha * old + (1 - alpha) * g if alpha else g
    old, size = old.abs() if alpha else 0 * g, g.abs()
    ddot = _SUM * u * (size * (alpha * old + (1 - alpha) * size)).sum()
    dsquare = _SUM * u * ((alpha * old + (1 - alpha) * size) ** 2).sum()
    return (g * mu).sum(), (mu * mu).sum(), (g * g).sum(), ddot, dsquare


def _pull_error(item: Item, s: Settings, u: float) -> tuple[Tensor, Tensor]:
    dot, square, _, ddot, dsquare = _sums(item, s, u)
    assert abs(square - s.proj_eps) >= dsquare, "it depends on rounding whether mu is long enough"
    if square <= s.proj_eps:
        return 0 * square, 0 * square
    least = square - dsquare
    return number(s.lamb) * dot.abs() / square, number(s.lamb) * (
        ddot / least + dot.abs() * dsquare / (square * least)
    )


def _assert_clear(item: Item, s: Settings, u: float) -> None:
    dot, square, norm, ddot, dsquare = _sums(item, s, u)
    half = 0.5 * (norm * square).sqrt()
    error = ddot + _SUM * u * half + (0.5 * (norm * dsquare).sqrt() if dsquare > square / 2 else
                                      half * dsquare / square.clamp(min=1e-300))  # fmt: skip
    assert abs(dot - half) >= error or norm == 0, "it depends on rounding which way the gate goes"


def _ring_error(
    item: Item, s: Settings, g: Tensor, u: float, tiny: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """S adds up 3 terms, or those of the whole ring, each with at most w + 6 roundings."""
    ring, k = item["grok_ring"], int(item["grok_step"])
    window, known = len(ring), min(k + 1, len(ring))
    held = ring.double().abs().nan_to_num(0.0)
    total = (item["grok_exp_avg"].double().abs() if k else 0 * g) + g + held.sum(0)
    dfresh = 3 * u * g + tiny
    dtotal = (window + 6) * u * total + tiny
    if ring.dtype == torch.bfloat16:
        dtotal = dtotal + torch.finfo(ring.dtype).eps * g + tiny
    dring = torch.zeros_like(held)
    dring[k % window] = dfresh
    pull = number(s.lamb) / known
    terms = g + pull * total
    return terms, 8 * u * terms + pull * dtotal, {"grok_exp_avg": dtotal, "grok_ring": dring}


_CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))


def stored(error: Tensor, value: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Adds to ``error``, where there is one, that of storing ``value`` as ``dtype``."""
    if dtype in (torch.float32, torch.float64):
        return error
    info = torch.finfo(dtype)
    # Nearest is half a unit; stochastic, and bfloat16 in Triton's interpreter, a whole one.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.bfloat16
    unit = info.eps * (1.0 if name in (*STATES, "grok_ring") or interpreted else 0.5)
    wider = error + unit * (value.abs() + error) + info.smallest_normal * info.eps
    return torch.where(error > 0, wider, error)
