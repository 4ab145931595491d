"""docs/environment.md lists every environment variable that the code, the build and make read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = [ROOT / "setup.py", ROOT / "bench" / "conftest.py"]
PYTHON += [path for folder in ("trm_fast", "kernels") for path in (ROOT / folder).rglob("*.py")]
NATIVE = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
MAKEFILE = (ROOT / "Makefile").read_text()
LISTED = set(re.findall(r"`([A-Z][A-Z0-9_]+)\b", (ROOT / "docs/environment.md").read_text()))
MACROS = {"TRM_FAST_CUDA_ARCHITECTURES", "TORCH_TARGET_VERSION"}  # that setup.py sets for C++


def environment_names(path: Path) -> Iterator[str]:
    """What a file looks up in ``os.environ``, by a constant or by one of a list in that file."""
    text = path.read_text()
    if "environ" in text:
        yield from re.findall(r"environ(?:\.\w+\(|\[)\"(\w+)\"", text)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and re.fullmatch("[A-Z]+_[A-Z_]+", str(node.value)):
                yield node.value


def test_variables_that_python_reads_are_listed():
    found = {name for path in PYTHON for name in environment_names(path)} - MACROS
    assert {"TRM_FAST_BACKEND", "LOCAL_RANK", "MASTER_PORT", "CXX", "WANDB_MODE"} <= found
    assert found <= LISTED


def test_variables_of_our_own_are_listed_and_no_others():
    texts = [MAKEFILE, *(path.read_text() for path in PYTHON)]
    named = {name for text in texts for name in re.findall(r"\bTRM_FAST_[A-Z_]+\b", text)} - MACROS
    assert named == {name for name in LISTED if name.startswith("TRM_FAST_")}


def test_native_code_reads_none():
    assert not [path for path in NATIVE if re.search(r"\bgetenv\b", path.read_text())]


@pytest.mark.parametrize("name", re.findall(r"^(?:export )?(\w+) \?=", MAKEFILE, re.MULTILINE))
def test_variables_of_make_are_listed(name):
    assert name in LISTED
