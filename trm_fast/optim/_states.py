"""The tensors of an optimizer's state: which there are, how they are made, checked and adopted."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from trm_fast.ops._adaptive_tensors import STATE_STORAGE
from trm_fast.ops._tensors import in_order_of, is_dense, same_order

AVERAGES = ("exp_avg", "exp_avg_sq", "momentum_buffer", "grok_exp_avg", "weight_ema")
RING = "grok_ring"
SUM = "grok_sum"
COUNTERS = ("step", "grok_step")
ALL = (*AVERAGES, RING, SUM, *COUNTERS)
NARROWABLE = (*AVERAGES, RING)  # a sum has to be exact

Group = dict[str, Any]
State = dict[str, Any]


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


def new_state(name: str, param: Tensor, dtype: torch.dtype, window: int) -> Tensor:
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
        from torch.distributed.tensor import DTensor

        placements = list(map(one_dim_on, param.placements))  # type: ignore[attr-defined]
        return DTensor.from_local(
            _new_ring(param.to_local(), dtype, window),
            param.device_mesh,  # type: ignore[attr-defined]
            placements,
            shape=torch.Size((window, *param.shape)),
            stride=(param.numel(), *param.stride()),
        )
    inner = param.stride() if is_dense(param) else torch.empty(param.shape, device="meta").stride()
    strides = (param.numel(), *inner)
    ring = torch.empty_strided((window, *param.shape), strides, dtype=dtype, device=param.device)
    return ring.zero_()


def one_dim_on(place: Any) -> Any:
    """Returns the placement of a tensor with one more dimension in front."""
    if not hasattr(place, "dim"):
        return place
    strided = {name: getattr(place, name) for name in ("split_factor",) if hasattr(place, name)}
    return type(place)(place.dim + 1, **strided)


def suited(name: str, value: Tensor, param: Tensor, dtype: torch.dtype, window: int) -> Tensor:
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


def check_window(owner: str, ring: Tensor, window: int) -> None:
    """Raises where the option of a filter and what it remembers have parted."""
    if ring.shape[0] != window:
        raise ValueError(
            f"{owner}: window must be {ring.shape[0]}, the number of gradients in the state; got "
            f"{window!r}: delete {RING!r} from the states to start anew"
        )


def may_change(option: Any) -> bool:
    """Returns whether an option may change where it lies, and has to be looked at each time."""
    inner = option if isinstance(option, tuple) else ()
    return isinstance(option, (Tensor, list)) or any(map(may_change, inner))


def remember_loaded(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Checks a state dict before anything of it is used, and keeps it for the optimizer."""
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
        for group, ours in zip(state_dict["param_groups"], optimizer.param_groups, strict=False)
        for _ in group["params"]
    ]
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    # torch refuses other counts in its words.
    for key, param, window in zip(keys, params, windows, strict=False):
        for name, value in state_dict["state"].get(key, {}).items():
            _check_loaded(f"load_state_dict: {name} of parameter {key!r}", name, value, param)
            if name == RING and value.shape[0] != window:
                raise ValueError(
                    f"load_state_dict: window must be {value.shape[0]}, as in the {name} of "
                    f"parameter {key!r}; got {window!r}"
                )
    for group in state_dict["param_groups"]:
        optimizer._settings({**optimizer.defaults, **group})  # type: ignore[attr-defined]
    optimizer._loading = state_dict  # type: ignore[attr-defined]


def _check_loaded(label: str, name: str, value: Any, param: Tensor) -> None:
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
