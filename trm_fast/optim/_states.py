"""The states of an optimizer's parameters: which there are, and one keeper that makes, moves,
finds and loads them."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from trm_fast.ops import States
from trm_fast.ops._adaptive_tensors import STATE_STORAGE
from trm_fast.ops._tensors import in_order_of, is_dense, same_order
from trm_fast.optim._local import stacked_like

AVERAGES = ("exp_avg", "exp_avg_sq", "momentum_buffer", "grok_exp_avg", "weight_ema")
RING = "grok_ring"
SUM = "grok_sum"
COUNTERS = ("step", "grok_step")
ALL = (*AVERAGES, RING, SUM, *COUNTERS)
NARROWABLE = (*AVERAGES, RING)  # a sum has to be exact

Group = dict[str, Any]
State = dict[str, Any]
Keys = dict[str, str]  # argument of the op to the name of the state behind it

MEAN_KEYS = {"grok_exp_avg": "grok_exp_avg", "grok_step": "grok_step"}
WINDOW_KEYS = {"grok_exp_avg": SUM, "grok_step": "grok_step", "grok_ring": RING}
# What is dropped when a filter starts: its counter, and the state of the other kind of filter.
_REPLACED = {"grok_exp_avg": ("grok_step", SUM, RING), SUM: ("grok_step", "grok_exp_avg")}
# The argument behind each list of ``States``.
_ARGUMENTS = (
    "exp_avg", "exp_avg_sq", "step", "grok_exp_avg", "grok_step", "weight_ema", "grok_ring"
)  # fmt: skip


class StateKeeper:
    """Makes, moves and loads the state tensors of parameters.

    The tensors themselves are where torch keeps them, in ``optimizer.state``: users may replace
    that mapping, and every dictionary and tensor in it.

    Args:
        owner: name of the optimizer in errors.
        dtypes: dtype of each state that is not kept in float32, from ``check_state_dtypes``.
    """

    def __init__(self, owner: str, dtypes: Mapping[str, torch.dtype]) -> None:
        self._owner = owner
        self._dtypes = dtypes

    def complete(
        self,
        states: MutableMapping[Tensor, State],
        param: Tensor,
        needed: Iterable[str],
        window: int,
        late: tuple[str, ...] = (),
    ) -> State:
        """Returns the state of ``param``: creates what it lacks but for ``late``, and moves the
        rest to the device, dtype and memory order that go with the parameter."""
        state = states[param]
        if RING in needed and RING not in state:
            state.pop(SUM, None)  # a sum of gradients that are gone
        for name in needed:
            value = state.get(name)
            if isinstance(value, (int, float)):
                value = torch.tensor(float(value))
            if value is None and name in late:
                continue
            if value is None and param.is_cuda and is_capturing():
                raise RuntimeError(
                    f"{self._owner}: every state must exist before a CUDA graph is "
                    f"captured; {name} does not: take one step first"
                )
            if value is None or (value.is_meta and not param.is_meta):
                state[name] = _new_state(name, param, self._dtype(name, param), window)
                for old in _REPLACED.get(name, ()):  # a new filter starts at the next gradient
                    state.pop(old, None)
            else:
                if name == RING:
                    _check_window(self._owner, value, window)
                state[name] = _moved(name, value, param, self._dtype(name, param), window)
        return state

    def check_windows(self, states: Mapping[Tensor, State], group: Group) -> None:
        """Raises where the rings of a group hold another number of gradients than its window."""
        for ring in (states.get(param, {}).get(RING) for param in group["params"]):
            if ring is not None:
                _check_window(self._owner, ring, group["window"])

    def load(
        self,
        states: MutableMapping[Tensor, State],
        groups: Sequence[Group],
        loaded: dict[str, Any],
        needed_of: Callable[[Group], tuple[str, ...]],
    ) -> None:
        """Replaces what torch has cast to the dtypes of the parameters by copies of what was
        saved, and creates what was not; ``needed_of`` returns the states that a group needs."""
        keys = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        pairs = [(param, group) for group in groups for param in group["params"]]
        for key, (param, group) in zip(keys, pairs, strict=True):
            saved = {
                name: value
                for name, value in loaded["state"].get(key, {}).items()
                if name in ALL and value is not None
            }
            state = states[param] if saved or param.requires_grad else {}
            for name, value in saved.items():
                state[name] = self._loaded(name, value, param)
            if "grok_exp_avg" in saved and "grok_step" not in saved and "step" in saved:
                state["grok_step"] = state["step"].clone()
            if "momentum_buffer" in saved and "step" not in saved:  # of torch's SGD
                state["step"] = torch.ones((), dtype=torch.float32, device=param.device)
            if state.get("momentum_buffer", 0) is None:
                del state["momentum_buffer"]
            # The weights may be loaded after this, so their average starts at the next step.
            if state or param.requires_grad:
                late = ("weight_ema",)
                self.complete(states, param, needed_of(group), group["window"], late)

    def _loaded(self, name: str, value: Any, param: Tensor) -> Tensor:
        if name in COUNTERS:
            return torch.tensor(float(value), dtype=torch.float32, device=param.device)
        copy = value.detach().clone()
        window = len(copy) if name == RING else 0
        return _moved(name, copy, param, self._dtype(name, param), window)

    def _dtype(self, name: str, param: Tensor) -> torch.dtype:
        if param.is_complex() or param.dtype == torch.float64:
            return param.dtype
        return self._dtypes.get(name, torch.float32)


# Finding


def lists_of(keys: Keys, states: Sequence[State]) -> States:
    """Returns states that are alike as ``adaptive_step_`` takes them; a filter that has no state
    yet, because its lamb has always been 0, has none to hand over."""
    filtered = has_filter(keys, states[0])
    used = [
        keys[slot] if keys.get(slot) in states[0] and (filtered or slot[:4] != "grok") else None
        for slot in _ARGUMENTS
    ]
    return States(*[[] if key is None else [state[key] for state in states] for key in used])


def parts(keys: Keys, params: Sequence[Tensor], states: Sequence[State]) -> list[list[int]]:
    """Returns the indices that take their step in one call: one device, one arithmetic, and all
    with a filter state or all without."""
    members: dict[tuple[Any, ...], list[int]] = {}
    for index, (param, state) in enumerate(zip(params, states, strict=True)):
        double = param.dtype in (torch.float64, torch.complex128)
        kind = (param.device, double, has_filter(keys, state))
        members.setdefault(kind, []).append(index)
    return list(members.values())


def has_filter(keys: Keys, state: State) -> bool:
    """Returns whether all of the filter's states are there; those of another filter may be."""
    return all(key in state for slot, key in keys.items() if slot.startswith("grok"))


# Making and moving


def is_capturing() -> bool:
    """Returns whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_state_dtypes(
    owner: str, given: torch.dtype | Mapping[str, torch.dtype] | None
) -> dict[str, torch.dtype]:
    """Returns the dtype of each state that was asked for by name, or by one dtype for all."""
    if given is not None and not isinstance(given, (torch.dtype, Mapping)):
        required = "a torch.dtype, a mapping from names of states to these, or None"
        raise TypeError(f"{owner}: state_dtype must be {required}; got {given!r}")
    all_alike = isinstance(given, torch.dtype)
    wanted = dict.fromkeys(NARROWABLE, given) if all_alike else dict(given or {})  # type: ignore[arg-type]
    for name, dtype in wanted.items():
        if name not in NARROWABLE:
            raise ValueError(
                f"{owner}: state_dtype must name {', '.join(NARROWABLE)}; got {name!r}"
            )
        if dtype not in STATE_STORAGE:
            raise ValueError(
                f"{owner}: state_dtype must be torch.float32 or torch.bfloat16; got {dtype}"
            )
    return wanted  # type: ignore[return-value]


def _new_state(name: str, param: Tensor, dtype: torch.dtype, window: int) -> Tensor:
    """Returns a state of ``param`` as it is before the first step."""
    if name in COUNTERS:
        return torch.zeros((), dtype=torch.float32, device=param.device)
    if name == RING:
        return _new_ring(param, dtype, window)
    order = torch.preserve_format if is_dense(param) else torch.contiguous_format
    new = torch.zeros_like(param, dtype=dtype, memory_format=order)
    new.requires_grad_(False)
    return new.copy_(param.detach()) if name == "weight_ema" else new


def _new_ring(param: Tensor, dtype: torch.dtype, window: int) -> Tensor:
    if hasattr(param, "to_local"):
        ring: Tensor = _new_ring(param.to_local(), dtype, window)
        return stacked_like(ring, param, window, param.stride())  # type: ignore[no-any-return]
    inner = param.stride() if is_dense(param) else torch.empty(param.shape, device="meta").stride()
    strides = (param.numel(), *inner)
    ring = torch.empty_strided((window, *param.shape), strides, dtype=dtype, device=param.device)
    return ring.zero_()


def _moved(name: str, value: Tensor, param: Tensor, dtype: torch.dtype, window: int) -> Tensor:
    """Returns a state on the device and in the memory order of ``param``, and in ``dtype``."""
    if name in COUNTERS:
        return value.to(param.device)
    value = value.to(param.device, dtype)
    if hasattr(value, "to_local"):
        return value
    if name != RING:
        return in_order_of(value, param)
    ordered = same_order(value[0], param) if is_dense(param) else value[0].is_contiguous()
    if ordered and (value.stride(0) == param.numel() or window == 1):
        return value
    return _new_ring(param, dtype, window).copy_(value)


def _check_window(owner: str, ring: Tensor, window: int) -> None:
    if ring.shape[0] != window:
        raise ValueError(
            f"{owner}: window must be {ring.shape[0]}, the number of gradients in the state; got "
            f"{window!r}: delete {RING!r} from the states to start anew"
        )


# Loading


def check_loaded(state_dict: dict[str, Any], groups: Sequence[Group]) -> None:
    """Raises for states that cannot be continued by the parameters of ``groups``."""
    for group in state_dict["param_groups"]:
        if group.get("amsgrad"):
            raise ValueError(
                "load_state_dict: amsgrad must be False, its maximum has no place here; got True"
            )
        if "grokfast_alpha" in group:
            raise ValueError(
                "load_state_dict: the dict must have the layout of torch.optim; got that of "
                "grokfast-pytorch: use trm_fast.optim.from_lucidrains(state_dict, init_lr=...)"
            )
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    windows = [
        group.get("window", ours.get("window"))
        for group, ours in zip(state_dict["param_groups"], groups, strict=False)
        for _ in group["params"]
    ]
    params = chain.from_iterable(group["params"] for group in groups)
    # torch itself refuses another number of groups or parameters, so nothing is strict here.
    for key, param, window in zip(keys, params, windows, strict=False):
        for name, value in state_dict["state"].get(key, {}).items():
            _check_value(f"load_state_dict: {name} of parameter {key!r}", name, value, param)
            if name == RING and value.shape[0] != window:
                raise ValueError(
                    f"load_state_dict: window must be {value.shape[0]}, as in the {name} of "
                    f"parameter {key!r}; got {window!r}"
                )


def _check_value(label: str, name: str, value: Any, param: Tensor) -> None:
    if name == "momentum_buffer" and value is None:  # torch's SGD without momentum
        return
    if name in COUNTERS:
        single = (
            value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))
        )
        if not single:
            raise ValueError(f"{label} must be a number or a tensor of one element; got {value!r}")
    elif name in ALL:
        shape = value.shape[1:] if name == RING and isinstance(value, Tensor) else None
        shape = getattr(value, "shape", None) if name != RING else shape
        if not isinstance(value, Tensor) or shape != param.shape:
            came = tuple(value.shape) if isinstance(value, Tensor) else value
            wanted = f"[window, *{tuple(param.shape)}]" if name == RING else tuple(param.shape)
            raise ValueError(f"{label} must be a tensor {wanted}; got {came!r}")
