"""Optimizers of torch that GradFilter stands in front of, and parameters that all of them take."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn import Parameter

from .torch_checks import make_params

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1)
INNER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": SGD,
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "adamw_fused": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, alpha=0.9),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
}
each_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)


def dense_params(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    """Without the strided view, whose gaps torch's fused steps on a CPU write to."""
    return [param for param in make_params(dtype) if param.stride() != (8, 2)]
