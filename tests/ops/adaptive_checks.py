"""What the tests of adaptive_step share: inputs, the formula in float64 and the error it allows."""

import math
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trm_fast.ops import Settings, adaptive_step_

STATES = ("exp_avg", "exp_avg_sq", "grok_exp_avg", "weight_ema")
WRITTEN = ("param", *STATES, "step", "grok_step")
LISTS = (
    "param",
    "grad",
    "exp_avg",
    "exp_avg_sq",
    "step",
    "grok_exp_avg",
    "grok_step",
    "weight_ema",
)

# Everything that one tensor brings to a step, by the names of the page.
Item = dict[str, Tensor]


def make(
    shape: Sequence[int] = (37,),
    param: torch.dtype = torch.float32,
    grad: torch.dtype | None = None,
    states: torch.dtype | dict[str, torch.dtype] = torch.float32,
    *,
    seed: int = 0,
    step: float = 9.0,
    grok_step: float = 9.0,
    device: torch.device | str = "cpu",
) -> Item:
    """Random tensors of a training that has taken ``step`` steps."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = dict.fromkeys(STATES, states) if isinstance(states, torch.dtype) else states
    drawn = {
        name: torch.randn(tuple(shape), generator=generator) for name in ("param", "grad", *STATES)
    }
    drawn["exp_avg_sq"].square_()
    kinds = {"param": param, "grad": grad or param, **dtypes}
    item = {name: value.to(device, kinds[name]) for name, value in drawn.items()}
    counters = {"step": step, "grok_step": grok_step}
    return item | {k: torch.tensor(v, device=device) for k, v in counters.items()}


def copies(item: Item) -> Item:
    """Copies with the same strides."""
    return {name: torch.clone(tensor) for name, tensor in item.items()}


def without(item: Item, *names: str) -> Item:
    return {name: tensor for name, tensor in item.items() if name not in names}


def run(items: Iterable[Item], settings: Settings, backend: str | None = None) -> None:
    items = list(items)
    lists = [[item[name] for item in items if name in item] for name in LISTS]
    adaptive_step_(*lists, settings=settings, backend=backend)


def number(value: float | Tensor | None, default: float = 1.0) -> float:
    return default if value is None else float(value)


def truth(item: Item, s: Settings) -> dict[str, Tensor]:
    """The formula of the page, in float64, for one tensor."""
    lr, wd, lamb = number(s.lr), number(s.weight_decay), number(s.lamb)
    p, g, m, v = (item[k].double() for k in ("param", "grad", "exp_avg", "exp_avg_sq"))
    t, found = float(item["step"]) + 1, {}
    g = (-g if s.maximize else g) / number(s.grad_scale) * number(s.clip)
    if s.filter != "none" and "grok_exp_avg" in item and t > s.after_step:
        seeded = float(item["grok_step"]) > 0
        mu = s.alpha * item["grok_exp_avg"].double() + (1 - s.alpha) * g if seeded else g
        g = g + lamb * (mu if s.filter == "ema" else g - mu)
        found = {"grok_exp_avg": mu, "grok_step": item["grok_step"].double() + 1}
    if s.rule == "adam":
        g = g + wd * p
    else:
        p = p * (1 - lr * wd)
    m = m + (1 - s.beta1) * (g - m)
    v = s.beta2 * v + (1 - s.beta2) * g**2
    p = p - move(s, t, m, v)
    if "weight_ema" in item:
        e = item["weight_ema"].double() if t > 1 else item["param"].double()
        found["weight_ema"] = e + (1 - s.weight_ema) * (p - e)
    found |= {"param": p, "exp_avg": m, "exp_avg_sq": v, "step": item["step"].double() + 1}
    return {name: found.get(name, item[name].double()) for name in WRITTEN if name in item}


def move(s: Settings, t: float, m: Tensor, v: Tensor) -> Tensor:
    vhat = v.sqrt() / math.sqrt(1 - s.beta2**t)
    pace = number(s.lr) / (1 - s.beta1**t)
    return pace * (torch.atan2(m, vhat) if s.rule == "atan2" else m / (vhat + s.eps))


def allowed(item: Item, s: Settings) -> dict[str, Tensor]:
    """How far float32 (for float64 parameters: float64) may be from ``truth``, elementwise.

    A sum of products is off by at most k * u * (the sum of the absolute values of its terms), where
    k counts the roundings that one term passes, those of the constants included, and u is half of
    eps. k is 3 for g; +3 for mu, +3 for ghat of it, +1 for highpass, +1 for the decay of adam: 11.
    m adds 4 and v, which squares ghat, has 2 * 11 + 4. The move of the parameter grows with m and
    falls with v, so its error is the largest one over the corners of m +- dm and v +- dv, plus 16 u
    for its own operations (9, of which a GPU rounds division and root to 2 ulp; atan2: 4 ulp, 6 u).
    """
    u = (
        torch.finfo(torch.float64 if item["param"].dtype == torch.float64 else torch.float32).eps
        / 2
    )
    tiny = 2.0**-126 if u > 1e-10 else 2.0**-1022  # below it hardware may flush to zero
    lr, wd, lamb = number(s.lr), number(s.weight_decay), number(s.lamb)
    size = {name: item[name].double().abs() for name in ("param", "grad", *STATES) if name in item}
    g = size["grad"] / number(s.grad_scale) * number(s.clip)
    t, error = float(item["step"]) + 1, {}
    if s.filter != "none" and "grok_exp_avg" in item and t > s.after_step:
        seeded = float(item["grok_step"]) > 0
        mu = s.alpha * size["grok_exp_avg"] + (1 - s.alpha) * g if seeded else g
        error["grok_exp_avg"] = 6 * u * mu + tiny
        g = g + lamb * (mu if s.filter == "ema" else g + mu)
    if s.rule == "adam":
        g = g + wd * size["param"]
    dm = 15 * u * (size["exp_avg"] + (1 - s.beta1) * (g + size["exp_avg"])) + tiny
    dv = 26 * u * (s.beta2 * size["exp_avg_sq"] + (1 - s.beta2) * g**2) + 2 * tiny
    after = truth(item, s)
    m, v = after["exp_avg"], after["exp_avg_sq"]
    moved = move(s, t, m, v)
    corners = torch.stack([move(s, t, m + a * dm, (v + b * dv).clamp(min=0)) for a, b in _CORNERS])
    # The powers behind the bias corrections are taken in double: 4 of its roundings over 1 - beta.
    power = 4 * 2.0**-53 / (1 - max(s.beta1, s.beta2))
    own = (16 * u + power) * corners.abs().amax(0)
    dp = (corners - moved).abs().amax(0) + own + 5 * u * (1 + lr * wd) * size["param"] + tiny
    if "weight_ema" in item:
        e = size["weight_ema"] if float(item["step"]) > 0 else size["param"]
        terms = e + after["param"].abs() + e
        error["weight_ema"] = (1 - s.weight_ema) * dp + 4 * u * terms + tiny
    error |= {"param": dp, "exp_avg": dm, "exp_avg_sq": dv}
    return {name: error.get(name, torch.zeros(())) for name in after}


_CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))


def stored(error: Tensor, value: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Adds to ``error`` that of storing ``value`` as ``dtype``."""
    if dtype in (torch.float32, torch.float64) or not error.any():
        return error
    info = torch.finfo(dtype)
    # Nearest is half a unit; stochastic, and bfloat16 in Triton's interpreter, a whole one.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.bfloat16
    unit = info.eps * (1.0 if name in STATES or interpreted else 0.5)
    return error + unit * (value.abs() + error) + info.smallest_normal * info.eps


def assert_right(before: Item, after: Item, settings: Settings) -> None:
    """Asserts that ``after`` is what one step makes of ``before``."""
    error = allowed(before, settings)
    for name, expected in truth(before, settings).items():
        bound = stored(error[name], expected, name, before[name].dtype)
        off = (after[name].double() - expected).abs()
        wrong = ~(off <= bound)
        assert not wrong.any(), (
            f"{name} ({before[name].dtype}): {int(wrong.sum())} of {off.numel()} elements are off "
            f"by up to {(off / bound.clamp(min=1e-300)).max():.3g} times what is allowed"
        )


def assert_step(items: Sequence[Item], settings: Settings, backend: str) -> None:
    """Takes one step in place and asserts that it is right."""
    before = [copies(item) for item in items]
    run(items, settings, backend)
    for old, new in zip(before, items, strict=True):
        assert_right(old, new, settings)


def bits(tensor: Tensor) -> list[int]:
    """The bytes of the elements in order, so that NaN equals NaN and -0.0 is not 0.0."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same_bits(one: Item, other: Item) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if bits(one[name]) != bits(other[name])]
    assert not different


class Arena:
    """Tensors inside larger memory, whose rest holds sentinels."""

    SENTINEL = -77.0

    def __init__(self) -> None:
        self._memory: list[tuple[Tensor, Tensor]] = []

    def place(self, value: Tensor, strides: Sequence[int], start: int = 1) -> Tensor:
        """Copies ``value`` to ``start`` elements into new memory, with these strides."""
        extent = start + 1 + sum(s * (n - 1) for s, n in zip(strides, value.shape, strict=True))
        size = max(start, extent if value.numel() else 0) + 19
        memory = torch.full((size,), self.SENTINEL, dtype=value.dtype, device=value.device)
        rest = torch.ones(size, dtype=torch.bool, device=value.device)
        rest.as_strided(value.shape, strides, start).fill_(False)
        self._memory.append((memory, rest))
        view = memory.as_strided(value.shape, strides, start)
        return view.copy_(value)

    def assert_untouched(self) -> None:
        for memory, rest in self._memory:
            assert (memory[rest] == self.SENTINEL).all()


def strides_of(shape: Sequence[int], order: Sequence[int], gap: int = 1) -> tuple[int, ...]:
    """Strides of memory with the dimensions in ``order``, slowest first, ``gap`` apart."""
    lengths = [shape[d] for d in order][1:]
    steps = [gap]
    for n in reversed(lengths):
        steps.append(steps[-1] * max(n, 1))
    by_dim = dict(zip(order, reversed(steps), strict=False))
    return tuple(by_dim[d] for d in range(len(shape)))
