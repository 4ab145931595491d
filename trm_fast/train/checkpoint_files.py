"""The files of a checkpoint by their names: whether a directory has any, and how they are deleted.

What somebody else has put beside them stays. Nothing here needs torch.
"""

import os
import re
from pathlib import Path

from trm_fast._json import load_object
from trm_fast.train import files

MANIFEST, STATE, CONFIG = "MANIFEST.json", "state.json", "config.json"
STEP = re.compile(r"step-(\d{8,18})(?:-(\d{1,9}))?")
FILE = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_-]{0,63}\.safetensors|state\.json|config\.json)")
# In memory it is up to 35 times as large; larger things belong into tensors.
MAX_JSON = 16 << 20


def names_in(directory: Path) -> list[str]:
    """Returns the names of the checkpoints in a directory, whole or damaged. One that has neither
    manifest nor state is none, but what a deletion has left of one."""
    if not directory.is_dir():
        return []
    found = (name for name in os.listdir(directory) if STEP.fullmatch(name))
    return [name for name in found if _is_one(directory / name)]


def _is_one(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return True  # and damaged, as its readers say
    return any(os.path.lexists(path / name) for name in (MANIFEST, STATE))


def remove_checkpoint(path: Path) -> list[str]:
    """Deletes the files of a checkpoint, and its directory if nothing else is in there.

    Args:
        path: the directory, finished or not; a file or link of its name is deleted.

    Returns:
        The names of what is left in it.
    """
    if path.is_symlink() or not path.is_dir():
        files.unlink(path)
        return []
    # The manifest goes last: it says which files are those of the checkpoint.
    for name in (*_files_of(path), MANIFEST):
        files.unlink(path / name)
    try:
        os.rmdir(path)
    except OSError:
        return sorted(os.listdir(path))
    return []


def _files_of(path: Path) -> list[str]:
    """Returns the files that the manifest lists; without one, those that have their names."""
    try:
        listed = load_object(files.read(path / MANIFEST, MAX_JSON), MANIFEST)["files"]
        found = [*dict(listed)]
    except (OSError, ValueError, TypeError, KeyError):
        found = os.listdir(path)
    return [name for name in found if FILE.fullmatch(name)]


def remains(path: Path, left: list[str]) -> str:
    """Says what a deletion has left of a checkpoint."""
    return f"{path} has other files, which stay: {', '.join(left)}"
