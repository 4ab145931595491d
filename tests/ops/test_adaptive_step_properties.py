"""adaptive_step_ on drawn mixes of shapes, dtypes, strides and settings against the formula."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trm_fast.ops import Settings
from trm_fast.ops._adaptive_filters import FILTERS
from trm_fast.ops._adaptive_settings import RULES

from .adaptive_checks import Arena, assert_step, fitted, make, strides_of
from .adaptive_truth import STATES, Item

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.one_of(
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
    st.sampled_from([(1023,), (1025,), (2, 1024), (33, 65)]),
)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Strides of any order of dimensions, with or without gaps; and a start in memory."""
    order = draw(st.permutations(range(len(shape))))
    gap = draw(st.sampled_from([1, 1, 2, 3]))
    return strides_of(shape, order, gap), draw(st.integers(0, 9))


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    steps = sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1)
    expected = 1
    for step, n in steps:
        if step != expected:
            return False
        expected *= n
    return True


@st.composite
def items(draw: st.DrawFn, s: Settings) -> tuple[Item, Arena]:
    shape, arena = draw(SHAPES), Arena()
    states = {name: draw(st.sampled_from(STORAGE[:2])) for name in STATES}
    steps = {k: float(draw(st.sampled_from([0, 1, 2, 50, 10_000]))) for k in ("step", "grok_step")}
    kinds = draw(st.sampled_from(STORAGE)), draw(st.sampled_from(STORAGE))
    window = draw(st.sampled_from([1, 2, 5])) if s.filter == "ma" else None
    ring = draw(st.sampled_from(STORAGE[:2]))
    item = make(
        shape, *kinds, states, seed=draw(st.integers(0, 99)), window=window, ring=ring, **steps
    )
    item = fitted(item, s)
    item["grad"] *= draw(st.sampled_from([0.0, 1e-4, 1.0, 100.0]))
    strides, start = draw(layouts(shape))
    dense = strides if is_dense(shape, strides) else strides_of(shape, range(len(shape)))
    item["param"] = arena.place(item["param"], strides, start)
    item["grad"] = arena.place(item["grad"], *draw(layouts(shape)))
    for name in STATES:
        if name in item:
            item[name] = arena.place(item[name], dense, draw(st.integers(0, 9)))
    if window:
        strides = (item["param"].numel(), *dense)
        item["grok_ring"] = arena.place(item["grok_ring"], strides, draw(st.integers(0, 9)))
    return item, arena


@st.composite
def settings(draw: st.DrawFn) -> Settings:
    numbers = {
        "lr": [0.0, 1e-3, 0.1], "beta1": [0.0, 0.9, 0.99], "beta2": [0.0, 0.95, 0.999],
        "eps": [1e-8, 1e-3], "weight_decay": [0.0, 0.1, 1.0], "alpha": [0.0, 0.8, 0.98, 1.0],
        "lamb": [0.0, 0.1, 2.0, 5.0], "after_step": [0, 2, 60],
        "weight_ema": [0.0, 0.5, 0.999, 1.0],
        "rule": RULES, "filter": FILTERS, "maximize": [False, True],
        "dampening": [0.0, 0.5, 1.0], "nesterov": [False, True], "warmup": [False, True],
    }  # fmt: skip
    drawn = {name: draw(st.sampled_from(values)) for name, values in numbers.items()}
    if drawn["filter"] == "cosine_gate":
        drawn["lamb"] = max(drawn["lamb"], 0.1)
    for name in ("lr", "weight_decay", "lamb"):
        if draw(st.booleans()):
            drawn[name] = torch.tensor(drawn[name])
    for name in ("grad_scale", "clip"):
        if draw(st.booleans()):
            drawn[name] = torch.tensor(draw(st.sampled_from([0.5, 3.0, 1024.0])))
    return Settings(**drawn)


@given(
    settings().flatmap(lambda s: st.tuples(st.lists(items(s), min_size=1, max_size=3), st.just(s)))
)
def test_any_mix_is_right_and_leaves_its_neighbours(backend, device, case):
    drawn, settings = case
    placed = [({k: v.to(device) for k, v in item.items()}, arena) for item, arena in drawn]
    if device.type != "cpu":
        placed = [(item, Arena()) for item, _ in placed]
    assert_step([item for item, _ in placed], settings, backend)
    for _, arena in placed:
        arena.assert_untouched()
