"""Continues runs that were started with other implementations of GrokFast."""

from collections.abc import Iterable, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


def from_lucidrains(state_dict: dict[str, Any], init_lr: float) -> dict[str, Any]:
    """Converts a state dict of ``grokfast_pytorch.GrokFastAdamW`` for
    ``GrokFastAdamW.load_state_dict``.

    That optimizer decays weights by ``lr / init_lr * weight_decay``; torch's convention is ``lr *
    weight_decay``, so the weight decay is divided by ``init_lr``. It has divided the learning rate
    by 1 + lamb already if ``normalize_lr`` was set; the saved one is taken as it is. It clamps its
    denominator at eps, where AdamW adds eps: the difference stays.

    Args:
        state_dict: what its ``state_dict()`` returned.
        init_lr: the learning rate it started with, after its division by 1 + lamb. The dict does
            not hold it.

    Returns:
        A new dict; its tensors are those of ``state_dict``.

    Raises:
        ValueError: ``init_lr`` is not positive, or the dict has another layout.
    """
    if not 0 < init_lr < inf:
        raise ValueError(f"from_lucidrains: init_lr must be finite and > 0; got {init_lr}")
    for group in state_dict["param_groups"]:
        _require_keys(_GROUP_KEYS, group, "group")
    for state in state_dict["state"].values():
        _require_keys(("steps", "exp_avg", "exp_avg_sq"), state, "state")
    groups = [_converted_group(group, init_lr) for group in state_dict["param_groups"]]
    state = {key: _converted_state(value) for key, value in state_dict["state"].items()}
    return {"state": state, "param_groups": groups}


_GROUP_KEYS = (
    "lr", "betas", "eps", "weight_decay",
    "grokfast", "grokfast_alpha", "grokfast_lamb", "grokfast_after_step",
)  # fmt: skip


def _require_keys(keys: tuple[str, ...], found: dict[str, Any], kind: str) -> None:
    missing = [key for key in keys if key not in found]
    if missing:
        lacks = ", ".join(missing)
        raise ValueError(f"from_lucidrains: every {kind} must hold {lacks}; got {sorted(found)}")


def _converted_group(group: dict[str, Any], init_lr: float) -> dict[str, Any]:
    return {
        "params": group["params"],
        "lr": group["lr"],
        "betas": group["betas"],
        "eps": group["eps"],
        "weight_decay": group["weight_decay"] / init_lr,
        "alpha": group["grokfast_alpha"],
        "lamb": group["grokfast_lamb"] if group["grokfast"] else 0.0,
        "after_step": group["grokfast_after_step"],
        "filter": "ema",
        "decoupled_weight_decay": True,
        "normalize_lr": False,
    }


def _converted_state(state: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: state[name] for name in ("exp_avg", "exp_avg_sq", "grok_exp_avg") if name in state
    }
    return {"step": torch.tensor(float(state["steps"]))} | kept


def load_official_ema(
    optimizer: Optimizer, ema: Mapping[str, Tensor], named_parameters: Iterable[tuple[str, Tensor]]
) -> None:
    """Takes over the averages that ``gradfilter_ema`` of ironjr/grokfast returned.

    Args:
        optimizer: a ``GrokFastAdamW`` with a filter, whose own state (of torch's Adam or AdamW) is
            loaded before.
        ema: name of a parameter to the running mean of its gradient.
        named_parameters: ``model.named_parameters()``, with the names of ``ema``.

    Raises:
        KeyError: ``ema`` has a name that no parameter of the optimizer has; nothing is loaded then.
        ValueError: a mean differs in shape from its parameter, or its group has no filter; nothing
            is loaded then.
        TypeError: a mean is not a tensor, as with the window filter; nothing is loaded then.
    """
    params = dict(named_parameters)
    states = {
        name: _filter_state(optimizer, name, params.get(name), mean) for name, mean in ema.items()
    }
    for name, state in states.items():
        state["grok_exp_avg"].copy_(ema[name].detach())
        state["grok_step"].fill_(1.0)


def _filter_state(
    optimizer: Optimizer, name: str, param: Tensor | None, mean: Tensor
) -> dict[str, Tensor]:
    if param is None or param not in optimizer.state:
        raise KeyError(f"load_official_ema: {name!r} is no parameter of this optimizer")
    state: dict[str, Tensor] = optimizer.state[param]
    if "grok_exp_avg" not in state:
        raise ValueError(
            f"load_official_ema: {name!r} must be in a group with a filter and lamb > 0"
        )
    if not isinstance(mean, Tensor):
        raise TypeError(f"load_official_ema: {name!r} must be a tensor; got {type(mean).__name__}")
    if mean.shape != param.shape:
        shapes = f"{tuple(param.shape)}; got {tuple(mean.shape)}"
        raise ValueError(f"load_official_ema: {name!r} must be of shape {shapes}")
    return state
