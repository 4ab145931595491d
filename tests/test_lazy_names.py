"""The names of packages that are imported on first use: the list for type checkers is that of the
imports."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = {"official": "sources", "arc_corpus": "puzzles"}


def for_types(tree: ast.Module) -> dict[str, str]:
    """Name and home of what is imported under ``if TYPE_CHECKING``."""
    blocks = [n for n in tree.body if isinstance(n, ast.If) and is_type_checking(n.test)]
    nodes = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {a.asname or a.name: str(node.module) for node in nodes for a in node.names}


def is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def on_use(tree: ast.Module, package: str) -> dict[str, str] | None:
    """Name and home of what ``exports`` is given, or None without a call of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "exports":
            homes = ast.literal_eval(node.args[1])
            return {name: f"{package}.{home}" for home, names in homes.items() for name in names}
    return None


def lazy_packages() -> dict[str, ast.Module]:
    found = {}
    for path in sorted((ROOT / "trm_fast").rglob("__init__.py")):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        tree = ast.parse(path.read_text())
        if on_use(tree, package) is not None:
            found[package] = tree
    return found


LAZY = lazy_packages()


def test_lazy_packages_are_found():
    assert {"trm_fast.train", "trm_fast.data", "trm_fast.recipes.classify"} <= {*LAZY}


@pytest.mark.parametrize("package", LAZY)
def test_both_lists_name_the_same_homes(package):
    assert for_types(LAZY[package]) == on_use(LAZY[package], package)


@pytest.mark.parametrize("package", LAZY)
def test_each_name_is_in_its_home(package):
    module = import_module(package)
    assert {name for name in module.__all__ if not hasattr(module, name)} == set()


def test_the_package_itself_names_the_same_homes():
    import trm_fast

    tree = ast.parse((ROOT / "trm_fast" / "__init__.py").read_text())
    # Parts such as ``trm_fast.nn`` are modules, which need no home.
    homes = {n: home for n, home in for_types(tree).items() if home != "trm_fast"}
    assert homes == trm_fast._HOME
    assert {*for_types(tree), "__version__"} == {*trm_fast.__all__}


@pytest.mark.parametrize("former", ["official", "arc_corpus"])
def test_a_former_place_gives_what_the_present_one_has(former):
    old = import_module(f"trm_fast.data.{former}")
    new = import_module(f"trm_fast.data.{PLACES[former]}.{former}")
    public = {name: value for name, value in vars(new).items() if not name.startswith("_")}
    assert public and {name: getattr(old, name, None) for name in public} == public
