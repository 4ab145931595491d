"""The trainer: loop, deep supervision, checkpoints, callbacks, and what a run writes."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trm_fast.train._guard import NonFiniteError
    from trm_fast.train.batches import Batches, RepeatedBatches
    from trm_fast.train.callbacks import Callback, EarlyStopping, StopAtTarget
    from trm_fast.train.checkpoint import (
        CheckpointInfo,
        Checkpoints,
        Loaded,
        read_checkpoint,
        size_of,
    )
    from trm_fast.train.config import Summary, TrainerConfig
    from trm_fast.train.objective import FunctionObjective, Objective, StepResult
    from trm_fast.train.progress import Progress
    from trm_fast.train.run_directory import RunDirectory
    from trm_fast.train.supervision import JointSupervision, PerStepSupervision
    from trm_fast.train.trackers import Tracker
    from trm_fast.train.trainer import Trainer

_HOME = {
    "Batches": "batches",
    "Callback": "callbacks",
    "CheckpointInfo": "checkpoint",
    "Checkpoints": "checkpoint",
    "EarlyStopping": "callbacks",
    "FunctionObjective": "objective",
    "JointSupervision": "supervision",
    "Loaded": "checkpoint",
    "NonFiniteError": "_guard",
    "Objective": "objective",
    "PerStepSupervision": "supervision",
    "Progress": "progress",
    "RepeatedBatches": "batches",
    "RunDirectory": "run_directory",
    "StepResult": "objective",
    "StopAtTarget": "callbacks",
    "Summary": "config",
    "Tracker": "trackers",
    "Trainer": "trainer",
    "TrainerConfig": "config",
    "read_checkpoint": "checkpoint",
    "size_of": "checkpoint",
}

__all__ = [
    "Batches",
    "Callback",
    "CheckpointInfo",
    "Checkpoints",
    "EarlyStopping",
    "FunctionObjective",
    "JointSupervision",
    "Loaded",
    "NonFiniteError",
    "Objective",
    "PerStepSupervision",
    "Progress",
    "RepeatedBatches",
    "RunDirectory",
    "StepResult",
    "StopAtTarget",
    "Summary",
    "Tracker",
    "Trainer",
    "TrainerConfig",
    "read_checkpoint",
    "size_of",
]


# Resolved on first use: reading a run for a report needs no torch.
def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'trm_fast.train' has no attribute {name!r}")
    value = getattr(import_module(f"trm_fast.train.{_HOME[name]}"), name)
    globals()[name] = value
    return value
