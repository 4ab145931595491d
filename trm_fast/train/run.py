"""``Run``: what a callback may see and do; ``Step``: one update, as a callback sees it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from trm_fast.optim import WeightEMA
from trm_fast.train.config import TrainerConfig
from trm_fast.train.distributed import World
from trm_fast.train.meter import Meter
from trm_fast.train.objective import Metrics, Objective
from trm_fast.train.stateful import Stateful

Record = dict[str, Any]
Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass(slots=True, eq=False)
class Step:
    """One update of the weights. Nothing here waits for a GPU until a number is read.

    Attributes:
        index: which update of the run it is, from 1.
        batches: those of the update, on the device.
        loss: mean over the batches, 0-d, without gradient.
        losses: the loss of each batch, the sum of what its objective has yielded, 0-d.
        samples: for each batch what its objective says of every sample, [batch] by name.
        metrics: what the objective has yielded, in order.
        norm: of all dense gradients together, before clipping, 0-d.
        finite: whether loss and gradients are finite in all processes, 0-d, bool; otherwise the
            update changes nothing.
        clip_norm: largest norm of the gradients of this update, or None; ``on_gradients`` may
            change it.
        overflow: with precision "fp16" whether the gradients have only left the range of float16,
            which a smaller scale of the loss mends, 0-d, bool; else None.
    """

    index: int
    batches: Sequence[Any]
    loss: Tensor
    losses: list[Tensor]
    samples: list[Mapping[str, Tensor]]
    metrics: list[Metrics]
    norm: Tensor
    finite: Tensor
    clip_norm: float | None
    overflow: Tensor | None = None


class Stages(Stateful, Protocol):
    """The stages of a run, as a callback sees them; see ``Curriculum``."""

    index: int
    step: int
    history: list[Record]

    def go_to(self, name: str, reason: str) -> None: ...


class Run(Protocol):
    """A run as a callback sees it. A ``Trainer`` is one."""

    name: str
    config: TrainerConfig
    world: World
    model: nn.Module
    optimizers: list[Optimizer]
    schedules: list[Any]
    objective: Objective
    ema: WeightEMA | None
    meter: Meter
    out: Path | None
    settings: dict[str, Any]
    report: dict[str, Any]
    step: int
    evaluated_at: int
    stop_reason: str | None
    metrics: dict[str, float]
    best: dict[str, float]
    history: list[Record]

    @property
    def evaluator(self) -> Evaluate | None:
        """What evaluates the model in the present stage."""

    @property
    def batches(self) -> Iterable[Any]:
        """Those of the present stage."""

    @property
    def curriculum(self) -> Stages:
        """The stages; a run without any has one."""

    @property
    def epochs(self) -> int:
        """Epochs that are over."""

    @property
    def extra_updates(self) -> int:
        """Updates so far that are no steps."""

    def stop(self, reason: str) -> None:
        """Lets the run end after this step, with an evaluation and a checkpoint."""

    def event(self, name: str, message: str) -> None:
        """Records something that must not pass in silence, in events.jsonl and for callbacks."""

    def evaluate(self) -> dict[str, float]:
        """Returns the metrics of the model with its averaged weights."""

    def save(self) -> Path | None:
        """Writes a checkpoint, in a hook of a step as soon as the step is done; see
        ``Trainer.save``."""

    def elapsed(self) -> float:
        """Returns the wall time of all parts of the run, in seconds."""

    def extra_update(
        self,
        objective: Objective | Callable[[nn.Module, Any], Any],
        batches: Sequence[Any],
        name: str = "extra",
    ) -> Step:
        """Moves the weights once more, with other batches; see ``Trainer.extra_update``."""
