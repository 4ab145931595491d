"""Options of parameter groups as a state dict holds them.

Checkpoint tools, such as ``torch.distributed.checkpoint``, take numbers, strings, None, tensors,
lists, tuples and dicts. Whatever else an option may be is one of these in a state dict.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trm_fast.optim._states import Group

_OF_PARAMETERS = ("params", "param_names")


def saved_group(group: Group) -> Group:
    """Returns a group with a dtype by its name, as "torch.bfloat16", and plain numbers."""
    return {k: v if k in _OF_PARAMETERS else _saved(v) for k, v in group.items()}


def loaded_group(group: Group) -> Group:
    """Returns a group with the dtypes that ``saved_group`` has named."""
    return {k: v if k in _OF_PARAMETERS else _loaded(v) for k, v in group.items()}


def _saved(option: Any) -> Any:
    if isinstance(option, torch.dtype):
        return str(option)
    if isinstance(option, np.generic):
        return option.item()
    if isinstance(option, Sequence) and not isinstance(option, (str, bytes)):
        made = list if isinstance(option, list) else tuple
        return made(map(_saved, option))
    return option


def _loaded(option: Any) -> Any:
    if not isinstance(option, str) or not option.startswith("torch."):
        return option
    dtype = getattr(torch, option.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else option
