"""Options of ``pytest bench``, and the tables at its end."""

import os

import pytest

# Read when Triton is first imported: a kernel is timed with the fused multiply-adds it ships with.
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

from ._report import Run

RUN = pytest.StashKey[Run]()


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption(
        "--rounds", type=int, default=20, help="turns of a fast variant per table (default: 20)"
    )
    group.addoption(
        "--save-results", action="store_true", help="write the run to bench/results as JSON"
    )


def pytest_configure(config):
    if config.getoption("--rounds") < 1:
        raise pytest.UsageError(f"--rounds must be >= 1; got {config.getoption('--rounds')}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("the interpreter is never timed: unset TRITON_INTERPRET")
    config.stash[RUN] = Run(config.getoption("--rounds"))


@pytest.fixture
def run(request) -> Run:
    """The run, which collects tables; it is printed when all of them are measured."""
    return request.config.stash[RUN]


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    run = config.stash[RUN]
    if not run.tables:
        return
    terminalreporter.write(run.text())
    if not config.getoption("--save-results"):
        return
    if exitstatus != 0:
        terminalreporter.write_line("not saved: results of a failed run are never kept")
    else:
        terminalreporter.write_line(f"saved: {run.save()}")
