"""The random generators of a process: Python's, NumPy's, torch's on the CPU and on a GPU."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

Generators = dict[str, Tensor]


def seed_everything(seed: int) -> None:
    """Seeds all generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generators(device: torch.device) -> Generators:
    """Returns the states of all generators as tensors, so that processes can exchange them."""
    version, words, spare = random.getstate()
    name, keys, place, has_spare, second = np.random.get_state()
    assert (version, name) == (3, "MT19937") and isinstance(keys, np.ndarray)
    states = {
        "python": torch.from_numpy(np.array(words, np.int64)),  # torch.tensor is slower
        "python_spare": _number(spare),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_place": torch.tensor([place, has_spare], dtype=torch.int64),
        "numpy_spare": _number(second),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: Generators, device: torch.device) -> None:
    """Takes the states of all generators back; a GPU's is left alone if there is none."""
    spare = float(states["python_spare"])
    words = tuple(states["python"].tolist())
    random.setstate((3, words, None if np.isnan(spare) else spare))
    place, has_spare = states["numpy_place"].tolist()
    keys = states["numpy"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, place, has_spare, float(states["numpy_spare"])))
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


@contextmanager
def fork_rng(device: torch.device) -> Iterator[None]:
    """A context after which all generators are as they were before it."""
    before = generators(device)
    try:
        yield
    finally:
        set_generators(before, device)


def _number(spare: float | None) -> Tensor:
    return torch.tensor(float("nan") if spare is None else spare, dtype=torch.float64)
