"""``trm-fast eval``: the metrics of a checkpoint, with the data of its run or with others."""

import argparse
import json
import math
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trm_fast.cli import COMMANDS, suggest
from trm_fast.recipes import RECIPES

if TYPE_CHECKING:
    from trm_fast.train.checkpoint import Loaded
    from trm_fast.train.trainer import Trainer

HELP = COMMANDS["eval"]

# What an evaluation has no use for; a run without trackers and pictures has the same weights.
_OFF = {"tracker": "none", "plot": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run, which of its checkpoints, and what is to be different."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--which", default="latest", metavar="latest|best|STEP", help="checkpoint (default: latest)"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="other data, in a form that the recipe's data.path takes"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON, and no table")


def run(args: argparse.Namespace) -> int:
    """Prints the metrics of the averaged weights; nothing in the run changes.

    Raises:
        ValueError: there is no such run or checkpoint, it is damaged, or a setting is wrong.
        OSError: a file cannot be read.
        ModuleNotFoundError: jsonargparse, or what the recipe needs, is not installed.
    """
    which = _which(args.which)
    trainer, data = _built(args)
    from trm_fast.train.loading import load_run

    loaded = load_run(trainer, args.run, which)
    metrics = trainer.evaluate()
    if args.json:
        print(json.dumps(_plain(args.run, loaded, metrics, data), allow_nan=False))
        return 0
    _show(trainer, loaded, metrics, data)
    return 0


def _which(text: str) -> str | int:
    if text in ("latest", "best"):
        return text
    if not text.isdecimal():
        raise ValueError(f"eval: --which must be latest, best or a step; got {text!r}")
    return int(text)


def _built(args: argparse.Namespace) -> "tuple[Trainer, str]":
    """Returns a trainer of the run's settings, which has written nothing, and its data."""
    if not args.run.is_dir():
        raise ValueError(f"eval: RUN must be the directory of a run; got {args.run}")
    from trm_fast.cli._settings import changed, read_json
    from trm_fast.recipes._config import from_json, leaves, replaced

    name = read_json(args.run / "run.json").get("name")
    if not isinstance(name, str) or name not in RECIPES:
        hint = suggest(str(name), RECIPES)
        raise ValueError(f"eval: {args.run / 'run.json'}: unknown recipe {name!r}{hint}")
    module = import_module(RECIPES[name].module)
    kind = type(next(iter(module.PRESETS[name].values())))
    settings = read_json(args.run / "config.json")
    try:
        config = from_json(kind, settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"eval: {args.run / 'config.json'}: {error}") from None
    known = dict(leaves(config))
    config = replaced(config, {name: off for name, off in _OFF.items() if name in known})
    if args.data is not None:
        if "data.path" not in known:
            raise ValueError(f"eval: --data needs a recipe that reads data; got {name}")
        # All of it: the sizes in the settings are those of the run's own data.
        sizes: dict[str, Any] = {size: 0 for size in ("data.train", "data.test") if size in known}
        config = replaced(config, {"data.path": args.data, **sizes})
    config = changed("eval", config, args.set)
    return module.build(config), str(dict(leaves(config)).get("data.path") or "")


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


def _show(trainer: "Trainer", loaded: "Loaded", metrics: dict[str, float], data: str) -> None:
    from trm_fast.cli._tables import printable, show
    from trm_fast.train._report_tables import Table, metric_text
    from trm_fast.train.report import as_shares

    for reason in loaded.skipped:
        print(printable(f"passed over: {reason}"))
    weights = "the weights" if trainer.ema is None else "the averaged weights"
    source = f" on {data}" if data else " on the data of the run"
    print(printable(f"{loaded.path.name}: {weights} after {loaded.step:,} steps{source}"))
    shown = as_shares(trainer.name, metrics)
    rows = [(name, metric_text(name, value)) for name, value in shown.items()]
    show(Table("metrics", ("metric", "value"), rows, numeric=True))
