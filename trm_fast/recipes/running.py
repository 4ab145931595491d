"""Trains what some settings of a recipe stand for: one run, or several, one after another."""

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from trm_fast._json import read_object
from trm_fast._version import __version__
from trm_fast.recipes.recipe import Recipe
from trm_fast.recipes.settings import directory_of, leaves, replaced, to_json
from trm_fast.train import RunDirectory, Summary
from trm_fast.train.run_directory import FILES

Config = TypeVar("Config")


def train(
    recipe: Recipe[Config], config: Config, *, resume: bool = False, overwrite: bool = False
) -> int:
    """Trains, and prints what the recipe shows of it.

    Args:
        recipe: what is trained.
        config: its settings.
        resume, overwrite: as for ``Trainer.fit``.

    Returns:
        0, or 128 plus the number of the signal that interrupted it.

    Raises:
        ValueError, OSError: as ``runs_of``, ``recipe.build`` and ``Trainer.fit``.
        FileExistsError: there are runs in the directory, and neither ``resume`` nor ``overwrite``.
    """
    runs = runs_of(recipe, config)
    if len(runs) == 1:
        return _code(_train_one(recipe, next(iter(runs.values())), resume, overwrite))
    out = _directory(recipe, config)
    with ExitStack() as stack:
        if _is_main():
            directory = stack.enter_context(RunDirectory(out, files=("run.json",)))
            if directory.existing() and not resume and not overwrite:
                raise FileExistsError(
                    f"train {recipe.name}: out must be a directory without runs; got {out}, which "
                    "holds some. Choose another one, resume the runs, or overwrite them"
                )
            if overwrite:
                _clear(directory)
            directory.write_json("config.json", to_json(config))
            said = {"name": recipe.name, "trm_fast": __version__, "runs": [*runs]}
            directory.write_json("run.json", said)
        return _train_all(recipe, runs, out, resume, overwrite)


# Names of directories beside the files of the whole.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TAKEN = (*FILES, "run.json", "ckpt")


def _clear(directory: RunDirectory) -> None:
    """Removes the runs of a whole, and a run that lies in their place."""
    path = directory.path / "run.json"
    said = read_object(path) if path.exists() else {}
    for name in said.get("runs", ()):
        if isinstance(name, str) and _NAME.fullmatch(name) and (directory.path / name).is_dir():
            with RunDirectory(directory.path / name, files=("run.json",)) as run:
                run.clear()
    directory.clear()


def runs_of(recipe: Recipe[Config], config: Config) -> dict[str, Config]:
    """Returns the settings of each run that some settings stand for, by name, with its directory
    below that of the whole; those of one run as they are.

    Raises:
        ValueError: a name cannot be that of a directory, or the settings of a run stand for other
            runs: resumed alone, it would be another one, or have runs below it.
    """
    runs = {} if recipe.runs is None else dict(recipe.runs(config))
    if len(runs) <= 1:
        return runs or {recipe.name: config}
    out = _directory(recipe, config)
    placed = {}
    for name, each in runs.items():
        if not _NAME.fullmatch(name) or name in _TAKEN:
            raise ValueError(
                f"recipe {recipe.name}: runs must have names that directories can have; got "
                f"{name!r}"
            )
        placed[name] = replaced(each, {recipe.directory: str(out / name)})
        again = list(recipe.runs(placed[name]).values()) if recipe.runs is not None else []
        if again not in ([], [placed[name]]):
            raise ValueError(
                f"recipe {recipe.name}: the settings of a run must stand for that run alone; got "
                f"{len(again)} {'others' if len(again) > 1 else 'other'} for those of {name!r}"
            )
    return placed


def _directory(recipe: Recipe[Any], config: Any) -> Path:
    return Path(directory_of(dict(leaves(config))[recipe.directory], recipe.name))


def _is_main() -> bool:
    """Returns whether this process writes and prints. The group of processes is left to the
    trainer, whose device decides how they talk to each other."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    return rank == 0


def _train_all(
    recipe: Recipe[Config], runs: Mapping[str, Config], out: Path, resume: bool, overwrite: bool
) -> int:
    summaries: dict[str, Summary] = {}
    for name, config in runs.items():
        # A run that has ended is not trained again: it goes on from its last step.
        summaries[name] = _train_one(recipe, config, resume, overwrite, str(out))
        if summaries[name].signal is not None:
            return _code(summaries[name])
    if recipe.compare is not None and _is_main():
        for line in recipe.compare(summaries):
            print(line)
    return 0


def _train_one(
    recipe: Recipe[Any], config: Any, resume: bool, overwrite: bool, whole: str = ""
) -> Summary:
    trainer = recipe.build(config)
    summary = trainer.fit(resume=resume, overwrite=overwrite)
    if trainer.world.is_main:
        for line in recipe.finish(trainer, summary):
            print(line)
        if summary.signal is not None:
            print(f"go on: trm-fast train {recipe.name} --out {whole or trainer.out} --resume")
    return summary


def _code(summary: Summary) -> int:
    return 0 if summary.signal is None else 128 + summary.signal
