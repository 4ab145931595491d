"""The options that optimizers share: declared once, seen by tools, refused by name."""

import inspect
from dataclasses import fields

import pytest
import torch

import trm_fast
from trm_fast import AdamATan2, GradFilter, GrokFastAdamW, GrokFastSGD, MuGrokfast, Muon
from trm_fast.ops._adaptive_filters import FilterSettings
from trm_fast.optim import FilterOptions, StepOptions
from trm_fast.optim.options import FILTER_OPTIONS, WHOLE

SHARED = {
    "alpha": 0.98, "lamb": 2.0, "after_step": 0, "window": 100, "warmup": True, "proj_eps": 1e-10,
    "maximize": False, "capturable": False, "foreach": None, "fused": None, "backend": None,
    "weight_ema": None, "state_dtype": None, "clip_norm": None,
}  # fmt: skip
POSITIONS = {
    GrokFastAdamW: ["params", "lr", "betas", "eps", "weight_decay"],
    GrokFastSGD: ["params", "lr", "momentum", "dampening", "weight_decay", "nesterov"],
    AdamATan2: ["params", "lr", "betas", "weight_decay"],
    Muon: ["params", "lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps",
           "ns_steps", "adjust_lr_fn"],
    MuGrokfast: ["params", "lr", "muon_lr", "betas", "weight_decay", "momentum", "nesterov",
                 "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"],
    GradFilter: ["target", "filter"],
}  # fmt: skip
FILTERS = dict.fromkeys(POSITIONS, "ema") | {AdamATan2: None, Muon: None}
CHANGED = {MuGrokfast: {"lamb": 0.3}}
each_class = pytest.mark.parametrize("kind", POSITIONS, ids=lambda kind: kind.__name__)


def made(kind, **options):
    group = {"params": [torch.nn.Parameter(torch.ones(2, 2))]}
    return kind([group | ({"algorithm": "muon"} if kind is MuGrokfast else {})], **options)


@each_class
def test_the_signature_shows_names_and_defaults(kind):
    found = inspect.signature(kind).parameters
    names = [n for n in SHARED if kind is not GradFilter or n in FILTER_OPTIONS]
    shown = {name: found[name].default for name in names}
    assert shown == {name: SHARED[name] for name in names} | CHANGED.get(kind, {})
    assert all(found[name].kind == inspect.Parameter.KEYWORD_ONLY for name in names)
    assert found["filter"].default == FILTERS[kind]
    assert not any(p.kind == inspect.Parameter.VAR_KEYWORD for p in found.values())


@each_class
def test_positions_are_what_they_were(kind):
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    found = inspect.signature(kind).parameters.values()
    assert [p.name for p in found if p.kind == positional] == POSITIONS[kind]


@each_class
def test_the_groups_hold_the_defaults_that_the_signature_shows(kind):
    group = made(kind).param_groups[0]
    shown = inspect.signature(kind).parameters
    names = FILTER_OPTIONS if kind is GradFilter else {*shown} & {*StepOptions.__annotations__}
    names = {*names} - {*WHOLE}
    assert {n: group[n] for n in names} == {n: shown[n].default for n in names}
    assert not {*WHOLE} & {*group}


@each_class
def test_an_unknown_option_is_refused_with_the_nearest_one(kind):
    message = f"{kind.__name__}: options must be among .*; got 'lambd'; did you mean 'lamb'?"
    with pytest.raises(TypeError, match=message):
        made(kind, lambd=2.0)


def test_an_option_like_no_other_gets_no_suggestion():
    with pytest.raises(TypeError, match=r"got 'xyzzy'$"):
        made(GrokFastAdamW, xyzzy=1)


def test_a_subclass_has_the_signature_of_its_own():
    class Mine(GrokFastAdamW):
        def __init__(self, params, tempo=1.0):
            super().__init__(params, lr=tempo, lamb=1.0)

    assert [*inspect.signature(Mine).parameters] == ["params", "tempo"]
    assert made(Mine, tempo=0.5).param_groups[0]["lamb"] == 1.0


def test_every_option_of_a_filter_reaches_its_settings():
    numbers = {f.name for f in fields(FilterSettings) if f.init} - {"filter", "owner"}
    assert {*FILTER_OPTIONS} - {"window"} == numbers


@pytest.mark.parametrize("kind", [FilterOptions, StepOptions])
def test_every_option_is_documented(kind):
    own = {*kind.__annotations__} - (set() if kind is FilterOptions else {*FILTER_OPTIONS})
    assert all(f"\n        {name}: " in kind.__doc__ for name in own)


def test_the_error_of_a_filter_lists_all_of_them():
    known = ", ".join(repr(name) for name in trm_fast.ops.FILTERS if name != "none")
    with pytest.raises(ValueError, match=f"filter must be {known} or None; got 'none'"):
        made(GrokFastAdamW, filter="none")


@each_class
@pytest.mark.parametrize("name", WHOLE)
def test_what_holds_for_all_groups_is_refused_in_one(kind, name):
    if kind is GradFilter:
        pytest.skip("has none of these")
    group = {"params": [torch.nn.Parameter(torch.ones(2, 2))], name: None}
    with pytest.raises(ValueError, match=f"{name} must be an argument of the optimizer, as it hol"):
        kind([group | ({"algorithm": "muon"} if kind is MuGrokfast else {})])


@each_class
@pytest.mark.parametrize("value", ["no", None, 2])
def test_a_switch_is_true_or_false(kind, value):
    with pytest.raises(TypeError, match=f"{kind.__name__}: warmup must be True or False; got"):
        made(kind, filter="ma", warmup=value)
