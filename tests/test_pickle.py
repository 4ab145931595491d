"""Nothing is pickled between processes, and nothing from a file is unpickled."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_layers import MODULES, imports

# Modules that read or write pickles, or code.
PICKLERS = {
    "cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "multiprocess",
}  # fmt: skip
# Of torch, modules whose functions pickle what they send or save.
SENDERS = ("torch.distributed.checkpoint", "torch.distributed.rpc", "torch.multiprocessing")
# The type of an error, which torch.load raises.
ALLOWED = {"pickle.UnpicklingError"}


def calls(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """The name of each call, as it is written, and its keywords that are constants."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            constants = {
                each.arg or "**": each.value.value
                for each in node.keywords
                if isinstance(each.value, ast.Constant)
            }
            yield ast.unparse(node.func), constants


@pytest.mark.parametrize("module", MODULES)
def test_no_file_imports_what_pickles(module):
    found = imports(MODULES[module], module) - ALLOWED
    assert not {name for name in found if name.split(".")[0] in PICKLERS}
    assert not {name for name in found if name.startswith(SENDERS)}


@pytest.mark.parametrize("module", MODULES)
def test_no_file_sends_objects_or_unpickles(module):
    for name, options in calls(MODULES[module]):
        last = name.rpartition(".")[2]
        # all_gather_object, broadcast_object_list, scatter_object_list and the like.
        assert not last.endswith(("_object", "_object_list")), name
        if name == "torch.load":
            assert options.get("weights_only") is True
        if last in ("load", "save") and name.startswith(("np.", "numpy.")):
            assert options.get("allow_pickle") is False
