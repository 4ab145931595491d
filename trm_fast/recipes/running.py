"""Trains what some settings of a recipe stand for: one run, or several, one after another."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from trm_fast._files import require_own
from trm_fast._json import read_object
from trm_fast._slow_paths import without_warnings
from trm_fast._version import __version__
from trm_fast.recipes.recipe import Recipe
from trm_fast.recipes.settings import directory_of, from_json, leaves, replaced, to_json
from trm_fast.train import Checkpoints, RunDirectory, Summary, Trainer
from trm_fast.train._launch import launched
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
    # What cannot be built has to show before anything is deleted.
    first = recipe.build(next(iter(runs.values())))
    if len(runs) == 1:
        return _code(_train_one(recipe, config, first, resume, overwrite))
    out = _directory(recipe, config)
    with ExitStack() as stack:
        if _is_main():
            directory = stack.enter_context(RunDirectory(out, files=("run.json",)))
            if directory.existing() and not resume and not overwrite:
                raise FileExistsError(
                    f"train {recipe.name}: out must be a directory without runs; got {out}, which "
                    "holds some. Choose another one, resume the runs, or overwrite them"
                )
            directory.require_ours()
            for name in runs:
                require_own(out / name)
            if overwrite:
                for left in directory.clear():
                    print(left)
            directory.write_json("config.json", to_json(config))
            said = {"name": recipe.name, "trm_fast": __version__, "runs": [*runs]}
            directory.write_json("run.json", said)
        return _train_all(recipe, runs, first, out, resume, overwrite)


# Names of directories beside the files of the whole.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TAKEN = (*FILES, "run.json", "ckpt")


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
    rank = dist.get_rank() if dist.is_initialized() else launched()[0]
    return rank == 0


def _train_all(
    recipe: Recipe[Config],
    runs: Mapping[str, Config],
    first: Trainer,
    out: Path,
    resume: bool,
    overwrite: bool,
) -> int:
    summaries: dict[str, Summary] = {}
    for name, config in runs.items():
        trainer = recipe.build(config) if summaries else first
        # A run that has ended is not trained again: it goes on from its last step.
        summaries[name] = _train_one(recipe, config, trainer, resume, overwrite, str(out))
        if summaries[name].signal is not None:
            return _code(summaries[name])
    if recipe.compare is not None and _is_main():
        for line in recipe.compare(summaries):
            print(line)
    return 0


def _train_one(
    recipe: Recipe[Any],
    config: Any,
    trainer: Trainer,
    resume: bool,
    overwrite: bool,
    whole: str = "",
) -> Summary:
    if resume and trainer.out is not None:
        _require_settings(recipe, config, trainer.out)
    with without_warnings():  # by an event of the run, which recipes show
        summary = trainer.fit(resume=resume, overwrite=overwrite)
    if trainer.world.is_main:
        for line in recipe.finish(trainer, summary):
            print(line)
        if summary.signal is not None:
            print(f"go on: trm-fast train {recipe.name} --out {whole or trainer.out} --resume")
    return summary


def _require_settings(recipe: Recipe[Any], config: Any, out: Path) -> None:
    """Compares the settings with those that the last checkpoint was made with: config.json beside
    it may have been changed since.

    Raises:
        ValueError: one that a resumed run may not change differs.
    """
    made = [info.path / "config.json" for info in Checkpoints(out).list() if info.damage is None]
    if not made or not made[-1].is_file():
        return
    found = read_object(made[-1])
    try:
        before = from_json(recipe.settings, found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"train {recipe.name}: {made[-1]}: {error}") from None
    for name, (old, new) in recipe.changes(before, config).items():
        raise ValueError(
            f"train {recipe.name}: {name} must be {old!r} as in the last checkpoint, "
            f"{made[-1].parent}; got {new!r}. Set it back in {out / 'config.json'}"
        )


def _code(summary: Summary) -> int:
    return 0 if summary.signal is None else 128 + summary.signal
