"""Public data sets of the Hugging Face hub, from the local cache unless a download is asked for.

Nothing here runs code of a data set. Sudoku-Extreme and Maze-Hard are read from the CSV files of
their repositories, so that rows keep their lines and no type is guessed; anything else comes
through the package datasets.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from trm_fast._paths import expanded
from trm_fast.data.puzzles import PuzzleSet
from trm_fast.data.sources.pairs import read_maze_csv, read_sudoku_csv
from trm_fast.data.sources.rows import OnBad, Path, RowCounts

READERS = {
    "sapientinc/sudoku-extreme": read_sudoku_csv,
    "sapientinc/maze-30x30-hard-1k": read_maze_csv,
}
Skipped = Callable[[str], None]
_warned: set[str] = set()


def load_hub(
    repository: str,
    split: str = "train",
    *,
    download: bool = False,
    cache_dir: Path | None = None,
    skipped: Skipped | None = None,
    on_bad: OnBad = "error",
    bad_rows: Path | None = None,
    max_bad_fraction: float = 0.01,
    counts: RowCounts | None = None,
) -> PuzzleSet | None:
    """Reads a puzzle data set of the hub: ``<split>.csv`` of its repository.

    Args:
        repository: "sapientinc/sudoku-extreme" or "sapientinc/maze-30x30-hard-1k".
        split: "train" or "test".
        download: whether the file may be fetched; otherwise no connection is opened.
        cache_dir: of the hub, by default its own (``HF_HUB_CACHE``); a leading "~" is the home
            directory.
        skipped: called with the reason if the file cannot be had; by default a warning, once.
        on_bad, bad_rows, max_bad_fraction, counts: as for ``trm_fast.data.read_pairs``.

    Returns:
        The split, or None if the file cannot be had.

    Raises:
        OSError: the file cannot be read, or ``bad_rows`` not written.
        ValueError: the repository is another, or as ``read_pairs``.
    """
    if repository not in READERS:
        raise ValueError(
            f"load_hub: repository must be one of {', '.join(READERS)}; got {repository!r}"
        )
    file = f"{split}.csv"
    path = hub_file(repository, file, download=download, cache_dir=cache_dir, skipped=skipped)
    if path is None:
        return None
    return READERS[repository](
        path,
        on_bad=on_bad,
        bad_rows=bad_rows,
        max_bad_fraction=max_bad_fraction,
        counts=counts,
        name=f"{repository}/{file}",
    )


def hub_file(
    repository: str,
    file: str,
    *,
    download: bool = False,
    cache_dir: Path | None = None,
    skipped: Skipped | None = None,
) -> str | None:
    """Finds one file of a data set repository.

    Args:
        repository: its id.
        file: path inside it.
        download, cache_dir, skipped: as for ``load_hub``.

    Returns:
        Where the file is on this machine, or None if it cannot be had.

    Raises:
        ValueError: the id is none.
    """
    hub = _package("huggingface_hub", repository, skipped)
    if hub is None:
        return None
    cache = _expanded(cache_dir)
    if not download:
        # Not hf_hub_download(local_files_only=True), which asks the network who is calling.
        found = hub.try_to_load_from_cache(repository, file, cache, repo_type="dataset")
        if isinstance(found, str):
            return found
        remedy = f"`hf download --repo-type dataset {repository} {file}` fetches it"
        _skip(f"{repository}: {file} is not in the local cache; {remedy}", skipped)
        return None
    try:
        path: str = hub.hf_hub_download(repository, file, repo_type="dataset", cache_dir=cache)
    except OSError as error:
        _skip(f"{repository}: {file} could not be fetched ({type(error).__name__})", skipped)
        return None
    return path


def hub_rows(
    repository: str,
    config: str | None = None,
    split: str = "train",
    *,
    download: bool = False,
    cache_dir: Path | None = None,
    skipped: Skipped | None = None,
) -> Iterable[dict[str, Any]] | None:
    """Loads the rows of any data set of the hub through the package datasets.

    Args:
        repository: id of the data set.
        config: which of its configurations, None for the only one.
        split: name of the split.
        download: whether it may be fetched; otherwise no connection is opened.
        cache_dir: of datasets, by default its own (``HF_DATASETS_CACHE``).
        skipped: called with the reason if it cannot be had; by default a warning, once.

    Returns:
        Its rows, with a length, as often as they are iterated; None if it cannot be had.

    Raises:
        ValueError: the repository was asked and has no such configuration or split.
    """
    datasets = _package("datasets", repository, skipped)
    hub = _package("huggingface_hub", repository, skipped)
    if datasets is None or hub is None:
        return None
    try:
        with _offline(not download, datasets.config, hub.constants):
            rows: Iterable[dict[str, Any]] = datasets.load_dataset(
                repository, config, split=split, cache_dir=_expanded(cache_dir)
            )
    except OSError as error:
        reason = "is not in the local cache; download=True fetches it"
        if download:
            reason = f"could not be fetched ({type(error).__name__})"
        _skip(f"{repository}: {reason}", skipped)
        return None
    except ValueError as error:
        # Offline, a configuration or split that was never fetched is as absent as a repository.
        if download:
            raise ValueError(f"hub_rows: {str(error).partition(chr(10))[0]}") from None
        what = "/".join(filter(None, (repository, config, split)))
        _skip(f"{what} is not in the local cache; download=True fetches it", skipped)
        return None
    return rows


def _expanded(cache_dir: Path | None) -> str | None:
    return None if cache_dir is None else str(expanded(cache_dir))


@contextmanager
def _offline(wanted: bool, *modules: Any) -> Iterator[None]:
    """Sets what HF_HUB_OFFLINE sets, which the packages read only when they are imported."""
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module, value in zip(modules, before, strict=True):
        module.HF_HUB_OFFLINE = wanted or value
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _package(name: str, repository: str, skipped: Skipped | None) -> Any:
    try:
        return import_module(name)
    except ImportError:
        _skip(f"{repository}: the package {name} is required; pip install {name}", skipped)
        return None


def _skip(message: str, skipped: Skipped | None) -> None:
    if skipped is not None:
        skipped(message)
    elif message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
