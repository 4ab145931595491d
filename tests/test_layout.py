"""One word per system in every tree, and no recipe known by name below the recipes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trm_fast.recipes import RECIPES, load
from trm_fast.recipes.settings import leaves
from trm_fast.train import TrainerConfig

ROOT = Path(__file__).parents[1]
SYSTEMS = sorted({listing.system for listing in RECIPES.values()})
# Generators of puzzles have the names of what they make; they belong to the data, not to a recipe.
KINDS_OF_DATA = {"data.py", "_data_make.py", "_data_check.py"}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_is_found_in_every_tree_by_its_name(system):
    places = (
        f"trm_fast/recipes/{system}/__init__.py",
        f"trm_fast/recipes/{system}/__main__.py",
        f"trm_fast/recipes/{system}/config.py",
        f"trm_fast/recipes/{system}/trainer.py",
        f"tests/recipes/{system}/test_trainer.py",
        f"docs/recipes/{system}.md",
        f"examples/train_{system}.py",
    )
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_there_are_no_folders_pages_or_examples_without_a_system():
    folders = {path.parent.name for path in ROOT.glob("trm_fast/recipes/*/__init__.py")}
    tests = {path.parent.name for path in ROOT.glob("tests/recipes/*/test_*.py")}
    pages = {path.stem for path in ROOT.glob("docs/recipes/*.md")} - {"README"}
    examples = {path.stem.removeprefix("train_") for path in ROOT.glob("examples/train_*.py")}
    assert folders == tests == pages == examples == {*SYSTEMS}


@pytest.mark.parametrize("name", RECIPES)
def test_a_listing_leads_to_the_recipe_of_its_name(name):
    assert load(name).name == name


def strings(path: Path) -> Iterator[str]:
    """The string constants of a file, without docstrings."""
    tree = ast.parse(path.read_text())
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, scopes)]
    docs = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def below_the_recipes() -> list[Path]:
    return [*ROOT.glob("trm_fast/train/**/*.py"), *ROOT.glob("trm_fast/cli/*.py")]


@pytest.mark.parametrize("path", below_the_recipes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_train_and_cli_know_no_recipe_and_no_setting_of_one(path):
    settings = {name for recipe in map(load, RECIPES) for name, _ in leaves(recipe.default)}
    # Words of the trainer too: keys of parameter groups, modules, events.
    general = {name for name, _ in leaves(TrainerConfig())}
    general |= {"batch_size", "device", "epochs", "lr", "out", "supervision", "tracker"}
    known = set() if path.name in KINDS_OF_DATA else {*RECIPES, *SYSTEMS} | (settings - general)
    assert {*strings(path)} & known == set()


@pytest.mark.parametrize("path", below_the_recipes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_train_and_cli_import_no_system(path):
    text = path.read_text()
    assert [system for system in SYSTEMS if f"trm_fast.recipes.{system}" in text] == []


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bench" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [link for link in links if not link.startswith(("http:", "https:", "mailto:"))]
    assert [link for link in local if not (page.parent / link).exists()] == []
