"""``pytest bench``: rows of tables as items of pytest-benchmark, measured in turns."""

import itertools
import os

import pytest

# Read when Triton is first imported: a kernel is timed with the fused multiply-adds it ships with.
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

from . import _machine
from ._session import Bench
from ._tables import MORE
from ._timing import Budget

BENCH = pytest.StashKey[Bench]()
PLACE = pytest.StashKey[int]()
MACHINE = pytest.StashKey[dict]()
COMMIT = pytest.StashKey[dict]()
# Narrow enough for a terminal; --benchmark-columns takes others.
COLUMNS = ["median", "iqr", "min", "mean", "rounds"]
_places = itertools.count()


def pytest_addoption(parser):
    parser.getgroup("bench").addoption(
        "--all-rows", action="store_true", help="measure the tables and rows that are left out too"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", f"{MORE}: a row that is measured only with --all-rows")
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pytest bench needs pytest-benchmark: pip install -e '.[bench]'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("the interpreter is never timed: unset TRITON_INTERPRET")
    if not config.option.benchmark_columns:
        config.option.benchmark_columns = COLUMNS
    seconds, samples = config.option.benchmark_max_time, config.option.benchmark_min_rounds
    config.stash[BENCH] = Bench(Budget(float(seconds), samples))
    config.stash[MACHINE], config.stash[COMMIT] = _machine.machine(), _machine.commit()


def pytest_report_header(config):
    return f"bench: {_heading(config)}"


def _heading(config) -> str:
    return _machine.heading(config.stash[MACHINE], config.stash[COMMIT])


def pytest_itemcollected(item):
    item.stash[PLACE] = next(_places)


@pytest.hookimpl(trylast=True)  # after -k has selected, and a plugin may have shuffled
def pytest_collection_modifyitems(config, items):
    # The rows of a table follow each other, because one table is kept in memory at a time.
    own = sorted(
        (item for item in items if PLACE in item.stash), key=lambda item: item.stash[PLACE]
    )
    items[:] = [item for item in items if PLACE not in item.stash] + own
    left_out = [item for item in own if item.get_closest_marker(MORE)]
    # Who selects nothing but such rows wants them.
    if config.option.all_rows or len(left_out) == len(items):
        return
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker(MORE)]


def pytest_collection_finish(session):
    bench = session.config.stash[BENCH]
    for item in session.items:
        cases = getattr(getattr(item, "function", None), "cases", None)
        if cases is not None:
            bench.select(cases[item.callspec.params["table"]], item.callspec.params["row"])


@pytest.fixture
def bench(request) -> Bench:
    """The tables of the run, which are printed when all of them are measured."""
    return request.config.stash[BENCH]


def pytest_benchmark_update_machine_info(config, machine_info):
    # The name of a host says nothing about its speed, and the clock of the moment would make every
    # run one of another machine.
    del machine_info["node"]
    for name in ("hz_actual", "hz_actual_friendly"):
        machine_info["cpu"].pop(name, None)
    machine_info.update(config.stash[MACHINE])


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.update(config.stash[COMMIT])


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter, config):
    """Prints the tables below those of pytest-benchmark, also where it reports a regression."""
    try:
        return (yield)
    finally:
        bench = config.stash[BENCH]
        if bench.results or bench.notes:
            # It imports pytest-benchmark, whose absence pytest_configure reports.
            from . import _summary

            terminalreporter.section("bench, side by side")
            terminalreporter.write(_summary.text(bench, _heading(config)))
