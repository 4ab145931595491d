"""Public names of a package that are imported on first use."""

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module


def exports(
    package: str, homes: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Returns ``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    A bare import of the package then loads none of the modules behind its names, nor torch.

    Args:
        package: its full name.
        homes: public names by the module that has them; "batches" is ``<package>.batches``.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def getattribute(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def directory() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return getattribute, directory, sorted(home)
