"""Small tables that a kernel reads on the device, such as the addresses of many tensors."""

from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor

_uploaded: dict[tuple[Hashable, ...], Tensor] = {}
_MOST_UPLOADED = 64  # tables of about 12 KB; gradients that move give a new one
_spare: dict[int, Tensor] = {}  # pinned memory by size: none can be had during a capture
_captured: list[Tensor] = []  # a CUDA graph copies its table again, and reads it, at each replay


def upload(key: Hashable, pack: Callable[[], np.ndarray], device: torch.device) -> Tensor:
    """Returns an int64 table on ``device`` without waiting for it, as far as possible an old one.

    Args:
        key: what the table depends on; equal keys must mean equal tables.
        pack: makes the table, a 1-d int64 array.
        device: where the kernel runs; the copy is in order on its current stream.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        table = torch.from_numpy(pack())
        host = _spare.pop(table.numel(), None)
        host = table.pin_memory() if host is None else host.copy_(table)
        _captured.extend((host, host.to(device, non_blocking=True)))
        return _captured[-1]
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    full_key = (device, stream, key)
    if full_key not in _uploaded:
        table = torch.from_numpy(pack())
        if len(_uploaded) >= _MOST_UPLOADED:
            _uploaded.clear()
        if device.type == "cuda":
            if table.numel() not in _spare:
                _spare[table.numel()] = torch.empty_like(table).pin_memory()
            table = table.pin_memory().to(device, non_blocking=True)
        _uploaded[full_key] = table
    return _uploaded[full_key]
