"""Trains what some settings of a recipe stand for: one run, or several, one after another."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from trm_fast._version import __version__
from trm_fast.recipes.recipe import Recipe
from trm_fast.recipes.settings import leaves, replaced, to_json
from trm_fast.train import RunDirectory, Summary
from trm_fast.train.distributed import World

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
        ValueError, OSError: as ``recipe.build`` and ``Trainer.fit``.
        FileExistsError: there are runs in the directory, and neither ``resume`` nor ``overwrite``.
    """
    runs = {} if recipe.runs is None else recipe.runs(config)
    if len(runs) <= 1:
        return _code(_train_one(recipe, next(iter(runs.values()), config), resume, overwrite))
    out = Path(dict(leaves(config))[recipe.directory] or f"runs/{recipe.name}")
    with ExitStack() as stack:
        if World("cpu").is_main:
            directory = stack.enter_context(RunDirectory(out, files=("run.json",)))
            if directory.existing() and not resume and not overwrite:
                raise FileExistsError(
                    f"train {recipe.name}: out must be a directory without runs; got {out}, which "
                    "holds some. Choose another one, resume the runs, or overwrite them"
                )
            directory.write_json("config.json", to_json(config))
            said = {"name": recipe.name, "trm_fast": __version__, "runs": [*runs]}
            directory.write_json("run.json", said)
        return _train_all(recipe, runs, out, resume, overwrite)


def _train_all(
    recipe: Recipe[Config], runs: Mapping[str, Config], out: Path, resume: bool, overwrite: bool
) -> int:
    summaries: dict[str, Summary] = {}
    for name, config in runs.items():
        settings = replaced(config, {recipe.directory: str(out / name)})
        # A run that has ended is not trained again: it goes on from its last step.
        summaries[name] = _train_one(recipe, settings, resume, overwrite, str(out))
        if summaries[name].signal is not None:
            return _code(summaries[name])
    if recipe.compare is not None and World("cpu").is_main:
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
