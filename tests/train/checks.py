"""What the tests of checkpoints share: small states, and damage to files."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch

from trm_fast.train import Checkpoints


def state_at(step: int) -> dict:
    """A state of every part, from which its step can be told."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(5, 3, generator=generator)
    return {
        "model": {"layer.weight": weight, "head.weight": weight, "layer.bias": torch.ones(3)},
        "ema": {"layer.weight": weight / 2},
        "optim": {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": weight * 2}}},
        "carry": {"halted": torch.tensor([True, False]), "inputs": torch.arange(8).view(2, 4)},
        "trainer": {"step": step, "betas": (0.9, 0.95), "rng": torch.arange(9, dtype=torch.uint8)},
    }


def is_state_at(step: int, state: dict) -> bool:
    expected = state_at(step)
    return (
        equal(state, expected) and state["model"]["head.weight"] is state["model"]["layer.weight"]
    )


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def saved(run: Path, *steps: int, **options: object) -> Checkpoints:
    """A run with a checkpoint at each of these steps."""
    checkpoints = Checkpoints(run, **{"keep_last": 10, **options})
    for step in steps:
        checkpoints.save(step, state_at(step))
    return checkpoints


def files(directory: Path) -> dict[str, bytes]:
    """All files below a directory, by their path in it."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def damages(data: bytes, chance: random.Random, flips: int) -> Iterator[tuple[str, bytes]]:
    """Single-bit flips, truncations and zeroed pages, each another file than ``data``."""
    for _ in range(flips):
        bit = chance.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(flipped)
    for end in {0, 1, len(data) // 2, len(data) - 1, chance.randrange(len(data))}:
        yield f"cut at {end}", data[:end]
    for start in {0, (len(data) - 1) // 4096 * 4096, chance.randrange(len(data)) // 4096 * 4096}:
        zeroed = bytearray(data)
        zeroed[start : start + 4096] = bytes(len(data[start : start + 4096]))
        if zeroed != data:
            yield f"page {start} zeroed", bytes(zeroed)
    yield "longer", data + b"\0"


def sealed(directory: Path, **changed: bytes) -> None:
    """Writes files and a manifest that fits them: what a stranger with a hash function can make."""
    for name, data in changed.items():
        (directory / name.replace("__", ".")).write_bytes(data)
    listed = {
        path.name: [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in directory.iterdir()
        if path.name != "MANIFEST.json"
    }
    manifest = {"format": 1, "files": listed}
    (directory / "MANIFEST.json").write_text(json.dumps(manifest, separators=(",", ":")))
