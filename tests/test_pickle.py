"""Nothing is pickled between processes, and nothing from a file is unpickled."""

import ast
from functools import cache
from pathlib import Path

from torch.distributed import distributed_c10d as exchanges

from .test_layers import MODULES, imports

# Modules that read or write pickles, or code.
PICKLERS = {
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "multiprocess",
    "pickle",
    "shelve",
}
# Modules of torch whose functions pickle what they send or save.
SENDERS = ("torch.distributed.checkpoint", "torch.distributed.rpc", "torch.multiprocessing")
# The type of an error that torch.load raises.
ALLOWED = {"pickle.UnpicklingError"}
OBJECTS = {name for name in dir(exchanges) if name.endswith(("_object", "_object_list"))}
ARRAYS = {"np.load", "np.save"}


@cache
def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def option(call: ast.Call, name: str) -> object:
    """The constant that a keyword of a call has, or None."""
    values = (each.value for each in call.keywords if each.arg == name)
    return next((value.value for value in values if isinstance(value, ast.Constant)), None)


def test_no_file_imports_what_pickles():
    for module, path in MODULES.items():
        found = imports(path, module) - ALLOWED
        assert not {name for name in found if name.split(".")[0] in PICKLERS}, module
        assert not {name for name in found if name.startswith(SENDERS)}, module


def test_no_process_sends_objects():
    assert {"all_gather_object", "broadcast_object_list", "gather_object"} <= OBJECTS
    for module, path in MODULES.items():
        named = {ast.unparse(call.func).rpartition(".")[2] for call in calls(path)}
        assert not named & OBJECTS, module


def test_files_are_read_and_arrays_written_without_objects():
    checked = 0
    for module, path in MODULES.items():
        for call in calls(path):
            name = ast.unparse(call.func)
            if name == "torch.load":
                assert option(call, "weights_only") is True, module
            if name in ARRAYS:
                assert option(call, "allow_pickle") is False, module
            checked += name == "torch.load" or name in ARRAYS
    assert checked
