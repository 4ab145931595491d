"""``Tracker``: metrics to TensorBoard or Weights & Biases, from a thread of its own."""

import os
import queue
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from trm_fast.train.callbacks import Callback
from trm_fast.train.generators import fork_rng
from trm_fast.train.run import Record, Run

_NOT_METRICS = ("kind", "step", "seconds")
_QUEUE = 1000
_PATIENCE = 10.0


class Writer(Protocol):
    """Where numbers go."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Writes some numbers of a step."""

    def close(self) -> None:
        """Writes what is left."""


class Tracker(Callback):
    """Hands metrics to a tracker. One without its package or a login is an error when it is made,
    and one that cannot start is an error before the first step; one that raises or hangs later is
    switched off with one event, and the run neither waits for it nor changes. A metric goes there
    as ``train/loss`` or ``evaluation/accuracy``; one that has a slash in its name keeps that.

    Args:
        kind: "tensorboard" (needs tensorboard; writes below ``out``), "wandb" (needs wandb, and the
            network unless WANDB_MODE=offline), or a function of the run that returns a ``Writer``.

    Raises:
        ValueError: the kind is unknown, its package cannot be imported, or "wandb" has no login;
            when a run starts, what writes cannot be made.
        ModuleNotFoundError: the package of the kind is not installed.
    """

    def __init__(self, kind: Literal["tensorboard", "wandb"] | Callable[[Run], Writer]) -> None:
        if isinstance(kind, str) and kind not in _WRITERS:
            raise ValueError(f"Tracker: kind must be one of {', '.join(_WRITERS)}; got {kind!r}")
        if isinstance(kind, str) and find_spec(kind) is None:
            raise ModuleNotFoundError(
                f"Tracker: {kind!r} needs its package, which is not installed: pip install {kind}",
                name=kind,
            )
        if isinstance(kind, str):
            _check_import(kind)
        if kind == "wandb":
            _check_login()
        self._make = _WRITERS[kind] if isinstance(kind, str) else kind
        self._name = (
            kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)
        )
        self.name = f"Tracker {self._name}"
        self._queue: queue.Queue[Record | None] = queue.Queue(_QUEUE)
        self._thread: threading.Thread | None = None
        self._run: Run | None = None
        self._fault: str | None = None
        self._begun = threading.Event()

    def on_start(self, run: Run) -> None:
        if not run.world.is_main:
            return
        self._run, self._fault, self._queue = run, None, queue.Queue(_QUEUE)
        self._begun.clear()
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        # What is drawn at random to start it is no part of the run.
        with fork_rng(torch.device("cpu")):
            self._thread.start()
            self._begun.wait(_PATIENCE)
        if self._fault is not None:
            self._thread = None
            raise ValueError(f"Tracker: {self._name} must be able to start; got {self._fault}")

    def _work(self, run: Run) -> None:
        try:
            writer = self._make(run)
            self._begun.set()
            while (record := self._queue.get()) is not None:
                writer.write(record["step"], _numbers(record))
            writer.close()
        except BaseException as error:
            # Whatever a tracker does wrong must not end a run; the run says it.
            self._fault = f"{type(error).__name__}: {error}".partition("\n")[0]
        finally:
            self._begun.set()

    def _put(self, run: Run, record: Record) -> None:
        if self._thread is None:
            return
        if self._fault is None:
            try:
                self._queue.put_nowait(record)
                return
            except queue.Full:
                self._fault = f"it has not taken {_QUEUE} records"
        self._thread = None
        run.event("tracker", f"{self._name} is switched off: {self._fault}")

    def on_log(self, run: Run, record: Record) -> None:
        self._put(run, record)

    def on_evaluate(self, run: Run, record: Record) -> None:
        self._put(run, record)

    def close(self) -> None:
        thread, run = self._thread, self._run
        if thread is None or run is None:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._fault = f"it has not taken {_QUEUE} records"
        thread.join(_PATIENCE)
        if thread.is_alive() and self._fault is None:
            self._fault = f"it has not finished within {_PATIENCE:.0f} s"
        if self._fault is not None:
            run.event("tracker", f"{self._name} is switched off: {self._fault}")
        self._thread = self._run = None


def _numbers(record: Record) -> dict[str, float]:
    kind = record["kind"]
    return {
        name if "/" in name else f"{kind}/{name}": value
        for name, value in record.items()
        if name not in _NOT_METRICS and isinstance(value, (int, float))
    }


class _TensorBoard:
    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(out / "tensorboard"))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(dir=str(out), config=settings, resume="allow", id=out.name)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


def _check_import(kind: str) -> None:
    """Imports a package that is there.

    Raises:
        ValueError: it cannot be imported.
    """
    module = "torch.utils.tensorboard" if kind == "tensorboard" else kind
    try:
        import_module(module)
    except ImportError as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"Tracker: {kind!r} must be a package that works; got {reason}") from error


def _check_login() -> None:
    """Refuses what would ask a person for a key, or fail, while the run goes on without it.

    Raises:
        ValueError: there is no key, and Weights & Biases is to use the network.
    """
    import wandb

    if os.environ.get("WANDB_MODE", "online") in ("online", "run") and not wandb.api.api_key:
        raise ValueError(
            "Tracker: 'wandb' must be logged in, and is not: run `wandb login`, or set "
            "WANDB_API_KEY, or WANDB_MODE=offline to write below the directory of the run only"
        )


def _tensorboard(run: Run) -> Writer:
    return _TensorBoard(run.out or Path("."))


def _wandb(run: Run) -> Writer:
    return _WandB(run.out or Path("."), run.settings)


_WRITERS: dict[str, Callable[[Run], Writer]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
