"""``.pt`` files of tensors and plain values, which execute nothing when they are read."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trm_fast._pt import MAX_PICKLE, load_pt, pickle_size
from trm_fast.train import files


def write_pt(owner: str, path: Path, values: Mapping[str, Any]) -> None:
    """Writes a file: after a crash it is as before or complete.

    Args:
        owner: begins the messages.
        path: the file; missing parents are made.
        values: tensors, plain values, and dicts and lists of them.

    Raises:
        OSError: it cannot be written.
        ValueError: the plain values are more than ``read_pt`` reads.
    """
    buffer = io.BytesIO()
    torch.save(dict(values), buffer)
    with zipfile.ZipFile(buffer) as archive:
        size = pickle_size(archive)
    if size > MAX_PICKLE:
        raise ValueError(
            f"{owner}: values that are no tensors must take at most {MAX_PICKLE} bytes; got {size}"
        )
    with files.explained(owner, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, buffer.getvalue())


def read_pt(
    owner: str,
    path: Path,
    kinds: Mapping[str, type | tuple[type, ...]],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Reads a file of ``write_pt``.

    Args:
        owner: begins the messages.
        path: the file.
        kinds: the keys that it must have, and the types that their values must be of.
        device: where the tensors shall be.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else, a key is missing, or a value is of another type.
    """
    wanted = f"{owner}: {path} must be a file of save_checkpoint"
    with files.explained(owner, path):
        try:
            found: Any = load_pt(path, device)
        except ValueError as error:
            raise ValueError(f"{wanted}; {str(error).rpartition('; ')[2]}") from None
    if not isinstance(found, dict) or not found.keys() >= {*kinds}:
        lacking = ", ".join(sorted({*kinds} - {*found})) if isinstance(found, dict) else "all keys"
        raise ValueError(f"{wanted}; got one without {lacking}")
    for key, kind in kinds.items():
        # A bool is an int for Python, and no number here.
        if not isinstance(found[key], kind) or isinstance(found[key], bool):
            raise ValueError(f"{wanted}; got {key} of type {type(found[key]).__name__}")
    return found


def check_model(owner: str, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Compares the shapes of a state dict with those of a model.

    Raises:
        ValueError: they differ; the line names the first tensor that does.
    """
    have = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    came = {
        name: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        for name, value in state.items()
    }
    for name in sorted({*have, *came}):
        if have.get(name) != came.get(name):
            raise ValueError(
                f"{owner}: a checkpoint must be of the same model, with {name} "
                f"{have.get(name)}; got {came.get(name)}"
            )
