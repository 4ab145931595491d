"""Chooses between the compiled module ``trm_fast._data`` and the same functions in Python.

``native=True`` and ``native=False`` bind. None takes what is there, unless TRM_FAST_BACKEND is
"reference", which means Python, or "cpp", which binds; TRM_FAST_STRICT=1 refuses to fall back.
"""

import os
from functools import cache
from importlib import import_module
from types import ModuleType

from trm_fast._errors import BackendError
from trm_fast._paths import shadowed
from trm_fast._slow_paths import report, strict_in_environment
from trm_fast.data import _reference

# Raised, together with kRevision in csrc/data/module.cpp, whenever a function or a result changes.
REVISION = 1

_BUILD = "build it with TRM_FAST_DATA=1 pip install --no-build-isolation ."


@cache
def _load() -> ModuleType | str:
    try:
        module = import_module("trm_fast._data")
    except ModuleNotFoundError:
        return f"trm_fast._data is not built{shadowed('_data.*.so') or ':'} {_BUILD}"
    except ImportError as error:
        return f"trm_fast._data cannot be opened: {error}"
    if module.REVISION != REVISION:
        return f"trm_fast._data has revision {module.REVISION}, not {REVISION}: re{_BUILD}"
    return module


def unusable() -> str | None:
    """Returns why the compiled module cannot be used, or None if it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def choose(who: str, native: bool | None) -> ModuleType:
    """Returns the module that is to run.

    Args:
        who: function that asks; it begins the message of an error.
        native: True for C++, False for Python, None for what the environment says or else what is
            there.

    Raises:
        BackendError: C++ is asked for and cannot be used; the message says how to build it.
    """
    named = os.environ.get("TRM_FAST_BACKEND")
    if native is None and named in ("reference", "cpp"):
        native = named == "cpp"
    if native is False:
        return _reference
    loaded = _load()
    if isinstance(loaded, ModuleType):
        return loaded
    if native or strict_in_environment():
        raise BackendError(f"{who}: the C++ form must run, but {loaded}")
    measured = "Sudoku and mazes took 91 to 168 times as long where measured"
    report(who, "in Python", loaded, measured)
    return _reference
