"""What the tests of adaptive_step share: inputs, calls and assertions."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trm_fast.ops import AdaptiveStep, Settings, States, adaptive_step_
from trm_fast.ops._adaptive_filters import REDUCING, WINDOWED

from .adaptive_truth import STATES, Item, allowed, stored, truth

LISTS = (
    "param",
    "grad",
    "exp_avg",
    "exp_avg_sq",
    "step",
    "grok_exp_avg",
    "grok_step",
    "weight_ema",
    "grok_ring",
)
# Filters that look at whole tensors, or at several gradients.
NEW = (*REDUCING, *WINDOWED)
WINDOW = 5


def make(
    shape: Sequence[int] = (37,),
    param: torch.dtype = torch.float32,
    grad: torch.dtype | None = None,
    states: torch.dtype | dict[str, torch.dtype] = torch.float32,
    *,
    seed: int = 0,
    step: float = 9.0,
    grok_step: float = 9.0,
    window: int | None = None,
    ring: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Item:
    """Random tensors of a training that has taken ``step`` steps; a window brings a ring."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = dict.fromkeys(STATES, states) if isinstance(states, torch.dtype) else states
    drawn = {
        name: torch.randn(tuple(shape), generator=generator) for name in ("param", "grad", *STATES)
    }
    drawn["exp_avg_sq"].square_()
    kinds = {"param": param, "grad": grad or param, **dtypes}
    if window:
        drawn["grok_ring"] = torch.randn((window, *shape), generator=generator).to(ring)
        drawn["grok_ring"][int(grok_step) :] = math.nan  # holds no gradient yet
        drawn["grok_exp_avg"] = drawn["grok_ring"][: int(grok_step)].double().sum(0)
        exact = torch.float64 if param == torch.float64 else torch.float32
        kinds |= {"grok_ring": ring, "grok_exp_avg": exact}
    item = {name: value.to(device, kinds[name]) for name, value in drawn.items()}
    counters = {"step": step, "grok_step": grok_step}
    return item | {k: torch.tensor(v, device=device) for k, v in counters.items()}


def fitted(item: Item, s: Settings, *, moment: bool = True) -> Item:
    """Leaves out the states that a rule does not know, and the ring unless the filter has one."""
    unknown = {
        "sgd": ("exp_avg_sq",) if moment else ("exp_avg", "exp_avg_sq"),
        "momentum": ("exp_avg_sq", "weight_ema"),
        "filter": ("exp_avg", "exp_avg_sq", "weight_ema"),
    }.get(s.rule, ())
    return without(item, *unknown, *(() if s.filter == "ma" else ("grok_ring",)))


def copies(item: Item) -> Item:
    """Copies with the same strides."""
    return {name: torch.clone(tensor) for name, tensor in item.items()}


def without(item: Item, *names: str) -> Item:
    return {name: tensor for name, tensor in item.items() if name not in names}


def run(items: Iterable[Item], settings: Settings, backend: str | None = None) -> None:
    adaptive_step_(*lists_of(items), settings=settings, backend=backend)


def lists_of(items: Iterable[Item]) -> list[list[Tensor]]:
    """The tensors in the order of the arguments; a list is empty where no item has one."""
    items = list(items)
    return [[item[name] for item in items if name in item] for name in LISTS]


def kept_step(item: Item, backend: str | None = None) -> AdaptiveStep:
    """The checked step of one tensor, which can be taken again with other gradients."""
    params, grads, *states = lists_of([item])
    return AdaptiveStep(params, grads, States(*states), backend=backend)


def assert_right(before: Item, after: Item, settings: Settings) -> None:
    """Asserts that ``after`` is what one step makes of ``before``."""
    error = allowed(before, settings)
    for name, expected in truth(before, settings).items():
        bound = stored(error[name], expected, name, before[name].dtype)
        off = (after[name].double() - expected).abs()
        off = off.masked_fill(expected.isnan() & after[name].isnan(), 0.0)
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


def settings_with(filter_: str, **changes) -> Settings:
    default = {"lr": 1e-2, "weight_decay": 0.1, "lamb": 2.0, "weight_ema": 0.9, "warmup": False}
    return Settings(filter=filter_, **(default | changes))


def item_for(filter_: str, shape: tuple[int, ...] = (37,), **options) -> Item:
    return make(shape, window=WINDOW if filter_ == "ma" else None, **options)


def new_grad(item: Item, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    item["grad"] = torch.randn(item["grad"].shape, generator=generator).to(item["grad"])
