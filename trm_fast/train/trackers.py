"""``Tracker``: metrics to TensorBoard or Weights & Biases, from a thread of its own."""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from trm_fast.train.callbacks import Callback, Record

if TYPE_CHECKING:
    from trm_fast.train.trainer import Trainer

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
    """Hands metrics to a tracker. A tracker that raises or hangs is switched off with one event;
    the run neither waits for it nor changes.

    Args:
        kind: "tensorboard" (needs tensorboard; writes below ``out``), "wandb" (needs wandb, and the
            network unless WANDB_MODE=offline), or a function of the trainer that returns a
            ``Writer``.

    Raises:
        ValueError: the kind is unknown.
    """

    def __init__(
        self, kind: Literal["tensorboard", "wandb"] | Callable[["Trainer"], Writer]
    ) -> None:
        if isinstance(kind, str) and kind not in _WRITERS:
            raise ValueError(f"Tracker: kind must be one of {', '.join(_WRITERS)}; got {kind!r}")
        self._make = _WRITERS[kind] if isinstance(kind, str) else kind
        self._name = (
            kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)
        )
        self._queue: queue.Queue[Record | None] = queue.Queue(_QUEUE)
        self._thread: threading.Thread | None = None
        self._trainer: Trainer | None = None
        self._fault: str | None = None

    def on_start(self, trainer: "Trainer") -> None:
        if trainer.world.is_main:
            self._trainer, self._fault, self._queue = trainer, None, queue.Queue(_QUEUE)
            self._thread = threading.Thread(target=self._work, args=(trainer,), daemon=True)
            self._thread.start()

    def _work(self, trainer: "Trainer") -> None:
        try:
            writer = self._make(trainer)
            while (record := self._queue.get()) is not None:
                writer.write(record["step"], _numbers(record))
            writer.close()
        except BaseException as error:
            # Whatever a tracker does wrong must not end a run; the run says it.
            self._fault = f"{type(error).__name__}: {error}".partition("\n")[0]

    def _put(self, trainer: "Trainer", record: Record) -> None:
        if self._thread is None:
            return
        if self._fault is None:
            try:
                self._queue.put_nowait(record)
                return
            except queue.Full:
                self._fault = f"it has not taken {_QUEUE} records"
        self._thread = None
        trainer.event("tracker", f"{self._name} is switched off: {self._fault}")

    def on_log(self, trainer: "Trainer", record: Record) -> None:
        self._put(trainer, record)

    def on_evaluate(self, trainer: "Trainer", record: Record) -> None:
        self._put(trainer, record)

    def close(self) -> None:
        thread, trainer = self._thread, self._trainer
        if thread is None or trainer is None:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._fault = f"it has not taken {_QUEUE} records"
        thread.join(_PATIENCE)
        if thread.is_alive() and self._fault is None:
            self._fault = f"it has not finished within {_PATIENCE:.0f} s"
        if self._fault is not None:
            trainer.event("tracker", f"{self._name} is switched off: {self._fault}")
        self._thread = self._trainer = None


def _numbers(record: Record) -> dict[str, float]:
    kind = record["kind"]
    return {
        f"{kind}/{name}": value
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


def _tensorboard(trainer: "Trainer") -> Writer:
    return _TensorBoard(trainer.out or Path("."))


def _wandb(trainer: "Trainer") -> Writer:
    return _WandB(trainer.out or Path("."), trainer.settings)


_WRITERS: dict[str, Callable[["Trainer"], Writer]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
