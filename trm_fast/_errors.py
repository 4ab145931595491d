"""Exceptions of the package, readable without importing torch."""


class BackendError(RuntimeError):
    """A backend was named that is unknown or cannot run the call, or strict mode met a fallback."""
