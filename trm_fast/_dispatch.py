"""Decides which implementation of an op runs, and says why another one does not.

Every op has up to four implementations, named ``reference``, ``cpp``, ``cuda`` and ``triton``.
Unnamed choice: the first usable one in ``ORDER``; a warning says once for each reason that the
reference runs instead of a faster one. Named choice (``TRM_FAST_BACKEND``,
``use_backend`` or a ``backend`` argument): that one or a ``BackendError``. ``TRM_FAST_STRICT=1``
turns every fallback into an error.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any, NamedTuple

import torch

from trm_fast import _native
from trm_fast._autograd import is_transformed
from trm_fast._compiler import constant_result
from trm_fast._errors import BackendError
from trm_fast._slow_paths import SlowPaths, report, strict_in_environment, watched

BACKENDS = ("reference", "cpp", "cuda", "triton")

# Fastest first. No GPU measurement has decided between cuda and triton yet.
ORDER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpp", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}

NO_GPU = "torch finds no CUDA device"
# Why no fused form runs where ``is_transformed``.
TRANSFORMED = "runs outside of torch.func and forward-mode derivatives only"

OPS: dict[str, "Op"] = {}


def check_name(name: str, argument: str = "backend") -> str:
    """Returns ``name`` if it is a backend.

    Raises:
        BackendError: it is not one; the message names the closest one.
    """
    if name in BACKENDS:
        return name
    near = get_close_matches(str(name), BACKENDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise BackendError(f"{argument} must be one of {', '.join(BACKENDS)}; got {name!r}{hint}")


def _named_in_environment() -> str | None:
    name = os.environ.get("TRM_FAST_BACKEND")
    return check_name(name, "TRM_FAST_BACKEND") if name else None


_named: str | None = _named_in_environment()
_strict: bool = strict_in_environment()


class use_backend:
    """Names the backend of every op in the process, for the length of a ``with`` block.

    Args:
        name: "reference", "cpp", "cuda" or "triton"; None returns the choice to the order of
            preference.

    Raises:
        BackendError: ``name`` is not a backend, or, inside the block, a call cannot run on it.
    """

    def __init__(self, name: str | None) -> None:
        self._name = None if name is None else check_name(name)
        self._outer: list[str | None] = []

    def __enter__(self) -> None:
        global _named
        self._outer.append(_named)
        _named = self._name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _named
        _named = self._outer.pop()


def named_backend() -> str | None:
    """Returns the backend that is named for the whole process, or None."""
    return _named


@cache
def _triton_unusable(device_type: str) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device_type != "cuda":
        return "needs a CUDA tensor, or TRITON_INTERPRET=1 set before the first import of triton"
    return _gpu_unusable()


@cache
def _gpu_unusable() -> str | None:
    if not torch.cuda.is_available():
        return NO_GPU
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU; this torch is built for ROCm"
    major, minor = min(_capabilities())
    return None if major >= 8 else f"needs compute capability 8.0 or higher; got {major}.{minor}"


@cache
def _cuda_unusable() -> str | None:
    reasons = map(_native.gpu_unusable, _capabilities())
    return _gpu_unusable() or next((reason for reason in reasons if reason), None)


def _capabilities() -> list[tuple[int, int]]:
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def unusable(backend: str, device_type: str) -> str | None:
    """Returns why ``backend`` can run nothing on devices of ``device_type``, or None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_unusable(device_type)
    if backend == "cpp" and device_type != "cpu":
        return f"runs on CPU tensors only; got {device_type}"
    if backend == "cuda" and device_type != "cuda":
        return f"runs on CUDA tensors only; got {device_type}"
    return _native.unusable(backend) or (_cuda_unusable() if backend == "cuda" else None)


class Call(NamedTuple):
    """What decides whether an implementation can run a call.

    Args:
        device_type: where the tensors are.
        dtypes: those that decide.
        details: what else the page of the op looks at, such as modes or sizes: hashable, of a form
            that the page defines; None where nothing but device and dtypes is known.
    """

    device_type: str
    dtypes: frozenset[torch.dtype]
    details: Any = None


def _knows_everything(backend: str) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and the reasons against those preferred to it."""

    backend: str
    run: Callable[..., Any]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Example:
    """A call of an op for ``doctor``, ``explain`` and the tests.

    Args:
        prepare: ``(backend, dtype)`` to a call on fresh copies of the same inputs, and the tensors
            that it overwrites, by name; a dtype other than None replaces that of every input.
        tolerance: bound on the error of each tensor, relative to its largest true value.
        details: those of the call, as ``Call`` has them.
    """

    prepare: Callable[[str, torch.dtype | None], tuple[Callable[[], None], dict[str, torch.Tensor]]]
    tolerance: Mapping[str, float]
    details: Any = None

    def run(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Makes the call on ``backend`` and returns what it wrote."""
        call, written = self.prepare(backend, dtype)
        call()
        return written

    def errors(self, backend: str) -> dict[str, float]:
        """Returns the error of each tensor against the reference in float64, relative to its
        largest value."""
        truth = self.run("reference", torch.float64)
        errors = {}
        for name, value in self.run(backend).items():
            difference = (value.double() - truth[name]).abs()
            largest = truth[name].abs().max().item() if truth[name].numel() else 0.0
            errors[name] = difference.max().item() / (largest or 1.0) if difference.numel() else 0.0
        return errors


@dataclass(frozen=True, eq=False)
class Op:
    """One op: its name, its implementations and the calls that they refuse.

    Args:
        name: the word under which the op is found in every tree.
        implementations: backend to function, or to "module:function", which is imported on first
            use.
        refuses: ``(backend, call)`` to the reason why the backend cannot run it, or None; asked
            only if the backend runs at all on the device of the call.
        examples: ``(shape, dtype, device)`` to named ``Example`` calls.
        order: device type to backends, fastest first.
        composed: backends on which the op calls other ops, and has no kernel of its own.
        lacks: backend that runs at all to the modes and options that it does not know.
        slower: how much slower the reference was where that was measured, for the warning.
    """

    name: str
    implementations: Mapping[str, Any]
    refuses: Callable[[str, Call], str | None]
    examples: Callable[[tuple[int, ...], torch.dtype, torch.device], dict[str, Example]]
    order: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: ORDER)
    composed: tuple[str, ...] = ()
    lacks: Callable[[str], tuple[str, ...]] = _knows_everything
    slower: str = ""
    choices: dict[tuple[object, ...], Choice] = field(default_factory=dict, init=False, repr=False)
    earlier: dict[tuple[object, ...], Choice] = field(default_factory=dict, init=False, repr=False)
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict, init=False, repr=False)
    notes: dict[str, dict[str, None]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def reason(
        self, backend: str, device_type: str, dtypes: frozenset[torch.dtype], details: Any = None
    ) -> str | None:
        """Returns why ``backend`` cannot run such a call, or None if it can; arguments as those of
        ``Call``."""
        if backend not in self.implementations:
            return f"{self.name} has no {backend} implementation"
        call = Call(device_type, dtypes, details)
        return unusable(backend, device_type) or self.refuses(backend, call)

    def choose(
        self,
        device_type: str,
        dtypes: frozenset[torch.dtype],
        named: str | None = None,
        details: Any = None,
    ) -> Choice:
        """Returns the implementation for a call; ``named`` binds, else the process-wide name does.

        Args:
            device_type: where the tensors are.
            dtypes: those that decide.
            named: the backend that must run, or None.
            details: what else decides, as ``Call`` has it.

        Raises:
            BackendError: the named backend cannot run the call, or strict mode met a fallback.
        """
        key = (device_type, dtypes, named or _named, details, is_transformed())
        if torch.compiler.is_compiling():
            backend: str = _constant_choice(self.name, key)
            return Choice(backend, self._function(backend), ())
        return self.choices.get(key) or self._remembered(key)

    def _remembered(self, key: tuple[Any, ...]) -> Choice:
        choice = self.choices.get(key) or self._choose(*key)
        self.choices[key] = choice
        return choice

    def forget_slow(self) -> None:
        """Has the choices of the reference made and reported anew; ``earlier`` keeps them."""
        for key, choice in list(self.choices.items()):
            if choice.backend == "reference":
                self.earlier[key] = choice
                self.choices.pop(key, None)

    def _choose(
        self,
        device_type: str,
        dtypes: frozenset[torch.dtype],
        named: str | None,
        details: Any,
        transformed: bool,
    ) -> Choice:
        def reason_against(backend: str) -> str | None:
            if transformed and backend != "reference":
                return TRANSFORMED
            return self.reason(backend, device_type, dtypes, details)

        if named is not None:
            reason = reason_against(check_name(named))
            if reason:
                raise BackendError(f"{self.name}: the named backend {named!r} cannot run: {reason}")
            faster = self.order.get(device_type, ())[:1] not in ((), ("reference",))
            if faster and named == _named == "reference":
                report(self.name, "on the reference", _what_names(), self.slower, warns=False)
            return Choice(named, self._function(named), ())
        if device_type not in self.order and device_type != "meta":
            reason = f"nothing faster runs on {device_type} tensors"
            report(self.name, "on the reference", reason, self.slower)
        skipped: list[tuple[str, str]] = []
        for backend in self.order.get(device_type, ("reference",)):
            reason = reason_against(backend)
            if reason is None:
                if skipped and backend == "reference":
                    reasons = "; ".join(map(": ".join, skipped))
                    report(self.name, "on the reference", reasons, self.slower)
                return Choice(backend, self._function(backend), tuple(skipped))
            skipped.append((backend, reason))
            if _strict:
                raise BackendError(
                    f"{self.name}: TRM_FAST_STRICT=1 and {backend} cannot run: {reason}"
                )
        raise BackendError(f"{self.name}: no implementation runs on {device_type}: {skipped}")

    def _function(self, backend: str) -> Callable[..., Any]:
        if backend not in self.functions:
            function = self.implementations[backend]
            if isinstance(function, str):
                module, _, attribute = function.partition(":")
                function = getattr(import_module(module), attribute)
            self.functions[backend] = function
        return self.functions[backend]


# If the compiler looked at the table of choices, it would trace anew whenever that grows.
@constant_result
def _constant_choice(op: str, key: tuple[Any, ...]) -> str:
    return OPS[op]._remembered(key).backend


@constant_result
def note_fallback(op: str, device_type: str, dtype: torch.dtype, instead: str, reason: str) -> None:
    """Notes among the fallbacks of an op that a call which it might serve ran without it.

    Args:
        op: its name.
        device_type, dtype: of the call.
        instead: how the call ran.
        reason: why.

    Raises:
        BackendError: strict mode is on, and the reference is not named.
    """
    kind = str(dtype).removeprefix("torch.")
    OPS[op].notes.setdefault(f"{device_type} {kind} ran {instead}", {})[reason] = None
    if _strict and _named != "reference":
        raise BackendError(f"{op}: TRM_FAST_STRICT=1 and the call would run {instead}: {reason}")
    report(op, instead, reason, OPS[op].slower, warns=_named != "reference")


@contextmanager
def slow_paths() -> Iterator[SlowPaths]:
    """Watches for a while which slow paths calls take, also those that were reported before."""
    with watched() as found:
        for op in OPS.values():
            op.forget_slow()
        yield found


def _what_names() -> str:
    """Returns what names the reference for the whole process."""
    if os.environ.get("TRM_FAST_BACKEND") == _named:
        return f"TRM_FAST_BACKEND={_named}"
    return f"use_backend({_named!r})"


def backends() -> dict[str, dict[str, dict[str, str]]]:
    """Returns, for each op, device type and backend, "chosen", "usable" or the reason why it cannot
    run.

    The answer is for float32 tensors; ``trm-fast explain`` gives it for one call. Under the key
    "lacking" of an op stand backends that run, but do not know all its modes and options, with
    those; under "fallbacks" those that happened in this process, as call to reason.
    """
    table: dict[str, dict[str, dict[str, str]]] = {}
    for op in OPS.values():
        table[op.name] = {device: _states(op, device) for device in op.order}
        for key, found in (("lacking", _lacking(op)), ("fallbacks", fallbacks(op))):
            if found:
                table[op.name][key] = found
    return table


def _states(op: Op, device_type: str) -> dict[str, str]:
    dtypes = frozenset({torch.float32})
    listed = [*op.order[device_type], *(b for b in BACKENDS if b not in op.order[device_type])]
    absent = NO_GPU if device_type == "cuda" and not torch.cuda.is_available() else "usable"
    states = {b: op.reason(b, device_type, dtypes) or absent for b in listed}
    usable = [b for b in op.order[device_type] if states[b] == "usable"]
    if _named is not None:
        usable = [_named] if states[_named] == "usable" else []
    if usable:
        states[usable[0]] = "chosen"
    return states


def _lacking(op: Op) -> dict[str, str]:
    runs = (b for b in op.implementations if any(unusable(b, kind) is None for kind in op.order))
    found = {backend: ", ".join(op.lacks(backend)) for backend in runs}
    return {backend: lacking for backend, lacking in found.items() if lacking}


def without(op: Op, backend: str) -> str:
    """Returns what a usable backend lacks, as the end of a sentence: empty, or ", without ..."."""
    lacking = ", ".join(op.lacks(backend))
    return f", without {lacking}" if lacking else ""


def fallbacks(op: Op) -> dict[str, str]:
    """Returns the calls of an op that did not run as fast as they might, to all reasons."""
    found: dict[str, list[str]] = {}
    for (device_type, dtypes, *_), choice in (op.earlier | op.choices).items():
        if choice.skipped:
            kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))  # type: ignore[attr-defined]
            reasons = found.setdefault(f"{device_type} {kinds} ran on {choice.backend}", [])
            # Calls that differ in their details may have reasons in common.
            given = (f"{backend}: {reason}" for backend, reason in choice.skipped)
            reasons.extend(reason for reason in given if reason not in reasons)
    return {call: "; ".join(reasons) for call, reasons in {**found, **op.notes}.items()}
