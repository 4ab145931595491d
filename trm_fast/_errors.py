"""Exceptions of the package, readable without importing torch."""


class BackendError(RuntimeError):
    """A backend was named that is unknown or cannot run the call, or strict mode met a fallback."""


def shown(name: str) -> str:
    """Returns a name from a file for a message: as it is, or as Python writes it if it is long or
    has characters that are not printed, such as line feeds."""
    return name if name.isprintable() and len(name) <= 200 else f"{name!r:.200}"
