"""``trm-fast bench``: the benchmarks of the recipes that have one."""

import argparse

from trm_fast.cli import COMMANDS
from trm_fast.cli._own_commands import add_own_commands, run_own_command

HELP = COMMANDS["bench"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmarks and their options."""
    add_own_commands("bench", parser)


def run(args: argparse.Namespace) -> int:
    """Runs a benchmark.

    Returns:
        Its exit code.

    Raises:
        ValueError: no benchmark is named, or an option is wrong.
        ModuleNotFoundError: something that it needs is not installed.
    """
    return run_own_command("bench", args)
