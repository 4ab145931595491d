"""The rule that marks tests by what their code reaches."""

import re
import subprocess
import sys
from functools import wraps
from types import SimpleNamespace

import pytest
import torch

from .support import kinds
from .support.kinds import COMPILE, PROCESSES, names_used


def compiled(function):
    return torch.compile(function, backend="eager")


def started(*words):
    return subprocess.run([sys.executable, *words], check=True)


class Machine:
    def run(self):
        return started("-c", "pass")


TABLE = {"through a table": started}


def compiles_by_a_helper():
    return compiled(abs)(1)


def compiles_inside():
    def inner():
        return torch.compile(abs)

    return inner


def compiles_a_pattern():
    return re.compile("a"), torch.zeros(1)


def starts_by_a_class():
    return Machine().run()


def starts_by_a_table():
    return TABLE["through a table"]()


def calls_a_module():
    return kinds.names_used(abs)


def does_nothing(started=None):
    return started, "subprocess"


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (compiles_by_a_helper, {"torch.compile"}),
        (compiles_inside, {"torch.compile"}),
        (wraps(compiles_inside)(lambda: None), {"torch.compile"}),
        (compiles_a_pattern, set()),
        (starts_by_a_class, {"subprocess"}),
        (starts_by_a_table, {"subprocess"}),
        (calls_a_module, set()),
        (does_nothing, set()),
    ],
)
def test_names_are_found_where_code_leads(function, found):
    assert names_used(function) & (COMPILE | PROCESSES) == found


def marks(request) -> set[str]:
    return {mark.name for mark in request.node.iter_markers()} - {"parametrize"}


def test_a_test_that_compiles_is_marked(request):
    compiled(abs)
    assert marks(request) == {"compile"}


@pytest.fixture
def process():
    return started("-c", "pass")


def test_a_test_whose_fixture_starts_a_process_is_marked(request, process):
    assert marks(request) == {"processes"}


INTERPRETED = "triton"


def found_in(request, monkeypatch) -> list[list[str]]:
    """The marks of this test in the interpreter and with compiled kernels."""
    found = []
    for interpreted in "10":
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        found.append([*kinds.kinds(request.node)])
    return found


@pytest.mark.parametrize("name", [INTERPRETED, "cpp"])
def test_a_test_of_triton_is_marked_in_the_interpreter_alone(request, monkeypatch, name):
    assert found_in(request, monkeypatch) == [["interpreter"] * (name == INTERPRETED), []]


def test_a_test_that_names_triton_in_its_code_is_marked_too(request, monkeypatch):
    assert INTERPRETED == "triton"
    assert found_in(request, monkeypatch) == [["interpreter"], []]


@pytest.mark.interpreted(size=[1])
@pytest.mark.parametrize(("name", "size"), [(INTERPRETED, 1), (INTERPRETED, 2), ("cpp", 2)])
def test_large_grids_of_the_interpreter_stand_in_the_long_lane(request, monkeypatch, name, size):
    wanted = [] if name == "cpp" else ["interpreter"] if size == 1 else ["interpreter", "long"]
    assert found_in(request, monkeypatch) == [wanted, []]


def test_the_quick_ones_are_a_case_of_each_test_and_cost_little():
    def item(name, *marks):
        found = [SimpleNamespace(name=mark) for mark in marks]
        return SimpleNamespace(nodeid=name, iter_markers=lambda: found)

    items = [
        item("a[0]", "parametrize"), item("a[1]", "slow"), item("b", "long"), item("c[2]"),
        item("a[2]"), item("a[3]"), item("d"),
    ]  # fmt: skip
    assert kinds.quick(items) == [items[0], items[3], items[6]]


def test_a_test_with_many_cases_leaves_half_of_them_to_the_long_lane():
    def cases(name, *values):
        return [SimpleNamespace(nodeid=f"{name}[{a}-{b}]") for a in values for b in "xyz"]

    few, many = cases("few", *range(kinds.MANY // 3)), cases("many", *range(20))
    found = [*kinds.second_halves([*many, *few])]
    assert 20 <= len(found) <= 40 and not {*map(id, found)} & {*map(id, few)}
    assert [*kinds.second_halves([*many, *few])] == found
    for value in "xyz":
        assert 5 <= sum(item.nodeid.endswith(f"{value}]") for item in found) <= 15
