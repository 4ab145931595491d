"""Settings of a ``Trainer``, and how its run ended."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trm_fast._fields import check_fields
from trm_fast.train.checkpoints.state import plain

Mode = Literal["max", "min"]
Strategy = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of a run that do not depend on what is trained.

    Args:
        steps: updates of the weights in the whole run.
        accumulate: batches per update; the last update of an epoch takes what is left of it.
        clip_norm: largest norm of the gradients of all parameters together; None does not clip.
        precision: "fp32" leaves dtypes to the model; "bf16" and "fp16" turn autocast on, and "fp16"
            scales the loss so that gradients stay in its range (``torch.amp.GradScaler``).
        ema: decay of the running average of the weights, with which the run is evaluated; None
            keeps none.
        log_every: updates per line of metrics.
        evaluate_every: updates per evaluation; 0 evaluates at the end only.
        save_every: updates per checkpoint; 0 saves at the end only.
        keep_last: checkpoints that are kept at least, the latest ones, >= 2.
        monitor: metric of the evaluation by which the best checkpoint is kept; empty for none. With
            stages the best is that of the last stage: values of different data do not compare.
        mode: whether the best value is the "max" or the "min".
        on_nonfinite: "stop" after ``max_nonfinite`` updates in a row were skipped because a loss or
            gradient was not finite, or "skip" as many as there are. Overflows of "fp16" that a
            smaller scale of the loss mends are skipped and do not count.
        max_nonfinite: skipped updates in a row after which "stop" ends the run, >= 1.
        seed: of Python's, NumPy's and torch's generators, to which the rank is added.
        strategy: for several processes: "ddp", or "fsdp2", which also shards the weights.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting is of another type.
    """

    steps: int = 1000
    accumulate: int = 1
    clip_norm: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float | None = None
    log_every: int = 50
    evaluate_every: int = 0
    save_every: int = 0
    keep_last: int = 2
    monitor: str = ""
    mode: Mode = "max"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite: int = 3
    seed: int = 0
    strategy: Strategy = "ddp"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain(value))  # JSON has no enumerations
        check_fields(self)
        least = {"steps": 0, "evaluate_every": 0, "save_every": 0, "keep_last": 2, "seed": 0}
        for name in ("accumulate", "log_every", "max_nonfinite"):
            least[name] = 1
        for name, bound in least.items():
            self._require(name, getattr(self, name) >= bound, f">= {bound}")
        if self.clip_norm is not None:
            self._require("clip_norm", 0 < self.clip_norm < math.inf, "> 0 and finite, or None")
        if self.ema is not None:
            self._require("ema", 0 <= self.ema <= 1, "in [0, 1], or None")
        choices = {
            "precision": ("fp32", "bf16", "fp16"),
            "mode": ("max", "min"),
            "on_nonfinite": ("stop", "skip"),
            "strategy": ("ddp", "fsdp2"),
        }
        for name, known in choices.items():
            self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"TrainerConfig: {name} must be {wanted}; got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Args:
        step: updates of the weights so far.
        reason: why it ended, in words.
        signal: number of the signal that interrupted it, or None.
        seconds: wall time of all parts of the run, evaluations and checkpoints included.
        skipped: updates that were skipped because something was not finite.
        metrics: of the last evaluation; empty if there was none.
        best: of the best evaluation by ``monitor``, with its "step"; empty if there was none.
        checkpoint: directory of the last checkpoint, or None.
    """

    step: int
    reason: str
    signal: int | None
    seconds: float
    skipped: int
    metrics: dict[str, float]
    best: dict[str, float]
    checkpoint: Path | None
