"""The runs in a directory: it is one, or that of several which one command has trained."""

from pathlib import Path
from typing import Any

from trm_fast._json import read_object


def runs_in(who: str, directory: Path) -> list[Path]:
    """Returns the directory itself, or those of its runs that have begun, in order.

    Raises:
        ValueError: none has begun, or what the directory says of them is damaged.
        OSError: it cannot be read.
    """
    path = directory / "run.json"
    if not path.is_file():
        return [directory]
    described = read_object(path)
    if "runs" not in described:
        return [directory]
    found = [directory / name for name in _names(path, described["runs"])]
    begun = [run for run in found if (run / "run.json").is_file()]
    if not begun:
        raise ValueError(
            f"{who}: RUN must have runs that have begun; got {directory}, where none of "
            f"{len(found)} has"
        )
    return begun


def _names(path: Path, names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: runs must be a list of names; got {names!r:.80}")
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"{path}: runs must be names of directories; got {name!r:.80}")
    return names
