"""What differentiable ops do under ``torch.autocast``: they choose the dtype, not torch."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from trm_fast._compiler import constant_result


def activation(x: Tensor) -> Tensor:
    """Returns ``x`` in the dtype to compute in: that of autocast where it is on, else its own.

    As everywhere in torch, autocast leaves float64 alone. The cast carries the gradient.
    """
    kind = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and _is_on(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Returns a context in which operators on the device of ``x`` keep the dtype of their inputs.

    Needed in the forward and in the backward of an op that has chosen its dtype: a backward pass
    runs under the autocast of its caller.
    """
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if _is_on(kind) else nullcontext()


def _is_on(kind: str) -> bool:
    # Some device types, such as meta, know no autocast, and asking about them is an error.
    return _knows_autocast(kind) and torch.is_autocast_enabled(kind)


@constant_result  # the compiler of torch 2.11 cannot trace the question
def _knows_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)
