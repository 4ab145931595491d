"""Rows of a table of tensors on the device, and the programs that share out their elements."""

import numpy as np
import torch
import triton
from torch import Tensor
from trm_fast.kernels._tables import upload

SMALLEST_CHUNK, LARGEST_CHUNK = 1024, 65536
# Enough to even out the load, few enough to share the look-up of addresses.
CHUNKS_PER_PROCESSOR = 8


def chunk_size(elements: int, device: torch.device) -> int:
    """Returns the elements per program, a power of two that gives each processor several."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.next_power_of_2(max(1, elements // (CHUNKS_PER_PROCESSOR * processors)))
    return min(max(wanted, SMALLEST_CHUNK), LARGEST_CHUNK)


def programs_of(sizes: np.ndarray, chunk: int) -> np.ndarray:
    """Returns the number of programs of each tensor; one for an empty tensor, which counts too."""
    programs: np.ndarray = np.maximum(1, -(-sizes // chunk))
    return programs


def lay_out(
    rows: np.ndarray, sizes: np.ndarray, chunk: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rows, the number of the row of each program, and its first element."""
    table = upload((chunk, rows.shape, rows.tobytes()), lambda: _pack(rows, sizes, chunk), device)
    programs = (table.numel() - rows.size) // 2
    owner, start = table[rows.size :].view(2, programs)
    return table, owner, start


def _pack(rows: np.ndarray, sizes: np.ndarray, chunk: int) -> np.ndarray:
    programs = programs_of(sizes, chunk)
    owner = np.repeat(np.arange(len(rows)), programs)
    first = np.repeat(np.cumsum(programs) - programs, programs)
    start = (np.arange(len(owner)) - first) * chunk
    packed: np.ndarray = np.concatenate([rows.ravel(), owner, start]).astype(np.int64)
    return packed
