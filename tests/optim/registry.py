"""The optimizers that go through the suite of torch's checks, ``test_torch_suite*.py``.

A new optimizer is one entry of ``OPTIMIZERS``: how to make it, and what it supports.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
    optim_error_inputs_func_adamw,
    optim_inputs_func_adam,
    optim_inputs_func_adamw,
)

from trm_fast.optim import AdamATan2, GradFilter, GrokFastAdamW, GrokFastSGD, Muon

from .torch_checks import (
    IMPLEMENTATIONS,
    Options,
    build,
    make_grads,
    make_matrices,
    make_params,
    train,
)

# What an entry may support; a test that needs one of these leaves the others out.
OWN = "steps by itself, with the options of this package"
SHAPES = "parameters of any shape, and complex ones"
EVERYTHING = frozenset({OWN, SHAPES})


class Case(NamedTuple):
    """An optimizer with options.

    Args:
        make: takes parameters in any form, and options.
        options: those of this case.
        supports: which of the above.
    """

    make: Callable[..., Any]
    options: Options
    supports: frozenset[str] = EVERYTHING

    def __call__(self, params: Any, **more: Any) -> Any:
        """An optimizer over ``params``, with more or other options."""
        return self.make(params, **self.options | more)

    def params(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
        """Six parameters that it can step: of every layout, and an empty one among them."""
        return (make_params if SHAPES in self.supports else make_matrices)(dtype, seed)


def trained(case: Case, steps: int = 4, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """An optimizer of this case that has taken some steps."""
    params = case.params(dtype)
    optimizer = case(params, **more)
    train(optimizer, make_grads(params, steps))
    return optimizer


def _around_sgd(params: Any, **more: Any) -> GradFilter:
    inside = torch.optim.SGD(params, **{"lr": 1e-3, "momentum": 0.9} | more)
    return GradFilter(inside, filter="ma", window=3)


AVERAGED: Options = {"weight_ema": 0.9, "lr": 0.01}
FILTERS: dict[str, Options] = {
    "lamb0": {"lamb": 0.0},
    "ema": {"lamb": 2.0},
    "highpass": {"lamb": 2.0, "filter": "highpass"},
}
ADAMW = {f"adamw_{name}": Case(build, options) for name, options in FILTERS.items()}
# Every rule and every filter at least once, clipping, and a wrapped optimizer of torch.
OPTIMIZERS: dict[str, Case] = {
    **ADAMW,
    "adamw_ma": Case(build, AVERAGED | {"filter": "ma", "window": 2, "warmup": False}),
    "adamw_projection": Case(build, AVERAGED | {"filter": "projection", "clip_norm": 1.0}),
    "atan2": Case(AdamATan2, AVERAGED | {"betas": (0.9, 0.95)}),
    "atan2_ema": Case(AdamATan2, AVERAGED | {"filter": "ema"}),
    "atan2_ma": Case(AdamATan2, AVERAGED | {"filter": "ma", "window": 3}),
    "sgd": Case(GrokFastSGD, AVERAGED | {"filter": None}),
    "sgd_gate": Case(
        GrokFastSGD, AVERAGED | {"filter": "cosine_gate", "momentum": 0.9, "dampening": 0.1}
    ),
    "sgd_highpass": Case(
        GrokFastSGD, AVERAGED | {"filter": "highpass", "momentum": 0.9, "nesterov": True}
    ),
    "muon": Case(Muon, AVERAGED, frozenset({OWN})),
    "muon_ma": Case(Muon, AVERAGED | {"filter": "ma", "window": 2}, frozenset({OWN})),
    "around_sgd": Case(_around_sgd, {}, frozenset({SHAPES})),
}


def _parametrize(cases: dict[str, Case], *needs: str) -> pytest.MarkDecorator:
    chosen = {name: case for name, case in cases.items() if case.supports >= {*needs}}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)


each_case = _parametrize(OPTIMIZERS)
each_own = _parametrize(OPTIMIZERS, OWN)
each_of_any_shape = _parametrize(OPTIMIZERS, SHAPES)
each_averaging = _parametrize(OPTIMIZERS, OWN, SHAPES)
each_adamw = _parametrize(ADAMW)


# torch's own inputs for AdamW and Adam, which GrokFastAdamW replaces


def _torch_inputs(device: str, dtype: torch.dtype | None) -> Iterable[tuple[str, Options]]:
    """torch's inputs for AdamW, and for Adam with its own default of no weight decay."""
    for optim_input in optim_inputs_func_adamw(device, dtype):
        yield f"adamw {optim_input.desc}", optim_input.kwargs
    for optim_input in optim_inputs_func_adam(device, dtype):
        adam = {"decoupled_weight_decay": False, "weight_decay": 0.0}
        yield f"adam {optim_input.desc}", adam | optim_input.kwargs


def _inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    cases = [
        (desc, {key: value for key, value in kwargs.items() if key != "amsgrad"})
        for desc, kwargs in _torch_inputs(device, dtype)
        if not kwargs.get("amsgrad")
    ]
    return [
        OptimizerInput(params=None, kwargs=deepcopy(kwargs) | options, desc=f"{desc}, {name}")
        for (desc, kwargs), (name, options) in itertools.product(cases, FILTERS.items())
    ]


_TORCH = [info for info in optim_db if info.optim_cls in (torch.optim.Adam, torch.optim.AdamW)]
INFO = OptimizerInfo(
    GrokFastAdamW,
    optim_inputs_func=_inputs,
    optim_error_inputs_func=optim_error_inputs_func_adamw,
    scheduler_inputs=tuple(itertools.chain(*(info.scheduler_inputs for info in _TORCH))),
    supported_impls=("foreach", "differentiable", "fused"),
    not_og_supported_flags=_TORCH[0].not_og_supported_flags,
    supports_fused_on=("cpu", "cuda"),
    has_capturable_arg=True,
)


def _of(inputs: Sequence[OptimizerInput]) -> dict[str, Case]:
    return {each.desc.replace(" ", "_"): Case(build, each.kwargs) for each in inputs}


_with_flags = partial(_get_optim_inputs_including_global_cliquey_kwargs, "cpu", None, INFO)
_OTHERS = {name: case for name, case in OPTIMIZERS.items() if name not in ADAMW}
# All of torch's inputs, and the other optimizers.
each_input = _parametrize(_of(_inputs("cpu")) | _OTHERS)
each_own_input = _parametrize(_of(_inputs("cpu")) | _OTHERS, OWN)
each_adamw_input = _parametrize(_of(_inputs("cpu")))
# torch's suite leaves `differentiable` out where a step would have to write to a leaf.
each_input_and_flag = _parametrize(_of(_with_flags(skip=("differentiable",))) | _OTHERS)
each_own_input_and_flag = _parametrize(_of(_with_flags(skip=("differentiable",))) | _OTHERS, OWN)
each_adamw_input_and_flag = _parametrize(_of(_with_flags(skip=("differentiable",))))
each_input_and_any_flag = _parametrize(_of(_with_flags()) | _OTHERS)
# The flags of which torch's suite takes one at a time.
each_flag = _parametrize(
    {
        name: Case(build, options)
        for name, options in {
            "ema": {},
            "lamb0": {"lamb": 0.0},
            "foreach": {"foreach": True},
            "fused": {"fused": True},
            "differentiable": {"differentiable": True},
        }.items()
    }
)


# Every way of asking for an implementation, and the other optimizers.
each_form = _parametrize(
    {
        f"{name}_{form}": Case(build, case.options | options)
        for name, case in ADAMW.items()
        for form, options in IMPLEMENTATIONS.items()
    }
    | _OTHERS
)
# Not Muon, whose fused form orthogonalises in bfloat16.
each_other_own = _parametrize(_OTHERS, OWN, SHAPES)
