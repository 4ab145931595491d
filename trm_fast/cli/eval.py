"""``trm-fast eval``: the metrics of a checkpoint, with the data of its run or with others."""

import argparse
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trm_fast._paths import expanded
from trm_fast.cli import COMMANDS, suggest
from trm_fast.cli._runs import runs_in
from trm_fast.recipes import RECIPES, load

if TYPE_CHECKING:
    from trm_fast.recipes.recipe import Recipe
    from trm_fast.train.checkpoints.checkpoints import Loaded
    from trm_fast.train.trainer import Trainer

HELP = COMMANDS["eval"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run, which of its checkpoints, and what is to be different."""
    parser.add_argument(
        "run", type=expanded, metavar="RUN",
        help="directory of a run, or of several that one command has trained, each of which is "
        "evaluated",
    )  # fmt: skip
    parser.add_argument(
        "--which", default="latest", metavar="latest|best|STEP", help="checkpoint (default: latest)"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="other data, in a form that the recipe's data.path takes"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one line of JSON for each run, and no table"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the metrics of the averaged weights; nothing in the run changes.

    Raises:
        ValueError: there is no such run or checkpoint, it is damaged, or a setting is wrong.
        OSError: a file cannot be read.
        ModuleNotFoundError: jsonargparse, or what the recipe needs, is not installed.
    """
    if not args.run.is_dir():
        raise ValueError(
            f"eval: RUN must be the directory of a run; got {args.run}, where there is none"
        )
    runs = runs_in("eval", args.run)
    for run in runs:
        which = _which(args.which, run)
        if runs != [args.run] and not args.json:
            print(f"\n{run.name}")
        _evaluate(args, run, which)
    return 0


def _evaluate(args: argparse.Namespace, run: Path, which: str | int) -> None:
    recipe, trainer, data = _built(args, run)
    from trm_fast.train.checkpoints.loading import load_run

    loaded = load_run(trainer, run, which)
    metrics = trainer.evaluate()
    if args.json:
        print(json.dumps(_plain(run, loaded, metrics, data), allow_nan=False))
    else:
        _show(recipe, trainer, loaded, metrics, data)


def _which(text: str, run: Path) -> str | int:
    if text in ("latest", "best"):
        return text
    names = [path.name for path in (run / "ckpt").glob("step-*")]
    steps = sorted({int(found[1]) for name in names if (found := re.match(r"step-(\d+)", name))})
    if not text.isdecimal() or int(text) not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ValueError(
            f"eval: --which must be latest, best or a step; got {text!r}, and the steps of {run} "
            f"are: {there}"
        )
    return int(text)


def _built(args: argparse.Namespace, run: Path) -> "tuple[Recipe[Any], Trainer, str]":
    """Returns the recipe of a run, a trainer that has written nothing, and the data."""
    from trm_fast.cli._settings import changed, read_json
    from trm_fast.recipes.settings import from_json, leaves, replaced

    name = read_json(run / "run.json").get("name")
    if not isinstance(name, str) or name not in RECIPES:
        hint = suggest(str(name), RECIPES)
        raise ValueError(f"eval: {run / 'run.json'}: unknown recipe {name!r}{hint}")
    recipe = load(name)
    settings = read_json(run / "config.json")
    try:
        config = from_json(recipe.settings, settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"eval: {run / 'config.json'}: {error}") from None
    config = replaced(config, recipe.evaluation)
    if args.data is not None:
        if not recipe.data:
            raise ValueError(f"eval: --data needs a recipe that reads data; got {name}")
        # All of it: the sizes in the settings are those of the run's own data.
        config = replaced(config, {recipe.data: args.data, **recipe.all_data})
    config = changed("eval", config, args.set)
    data = str(dict(leaves(config))[recipe.data]) if recipe.data else ""
    return recipe, recipe.build(config), data


def _plain(run: Path, loaded: "Loaded", metrics: dict[str, float], data: str) -> dict[str, Any]:
    numbers = {name: v if math.isfinite(v) else str(v) for name, v in metrics.items()}
    return {
        "run": str(run),
        "checkpoint": loaded.path.name,
        "step": loaded.step,
        "data": data,
        "metrics": numbers,
        "skipped": loaded.skipped,
    }


def _show(
    recipe: "Recipe[Any]",
    trainer: "Trainer",
    loaded: "Loaded",
    metrics: dict[str, float],
    data: str,
) -> None:
    from trm_fast.cli._tables import printable, show
    from trm_fast.train.reports.reading import as_shares
    from trm_fast.train.reports.tables import Table, metric_text

    for reason in loaded.skipped:
        print(printable(f"passed over: {reason}"))
    weights = "the weights" if trainer.ema is None else "the averaged weights"
    source = f" on {data}" if data else " on the data of the run"
    print(printable(f"{loaded.path.name}: {weights} after {loaded.step:,} steps{source}"))
    shown = as_shares(metrics, recipe.percent)
    rows = [(name, metric_text(name, value)) for name, value in shown.items()]
    show(Table("metrics", ("metric", "value"), rows, numeric=True))
