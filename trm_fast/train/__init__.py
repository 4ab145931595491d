"""The trainer: loop, stages, deep supervision, checkpoints, callbacks, and what a run writes."""

from typing import TYPE_CHECKING

from trm_fast._lazy import exports

if TYPE_CHECKING:
    from trm_fast.train._guard import NonFiniteError as NonFiniteError
    from trm_fast.train.batches import Batches as Batches
    from trm_fast.train.batches import EpochBatches as EpochBatches
    from trm_fast.train.batches import RepeatedBatches as RepeatedBatches
    from trm_fast.train.callbacks import Callback as Callback
    from trm_fast.train.callbacks import EarlyStopping as EarlyStopping
    from trm_fast.train.callbacks import StopAtTarget as StopAtTarget
    from trm_fast.train.checkpoints.checkpoints import Checkpoints as Checkpoints
    from trm_fast.train.checkpoints.checkpoints import size_of as size_of
    from trm_fast.train.checkpoints.reader import CheckpointInfo as CheckpointInfo
    from trm_fast.train.checkpoints.reader import Loaded as Loaded
    from trm_fast.train.checkpoints.reader import read_checkpoint as read_checkpoint
    from trm_fast.train.config import Summary as Summary
    from trm_fast.train.config import TrainerConfig as TrainerConfig
    from trm_fast.train.curriculum import Curriculum as Curriculum
    from trm_fast.train.curriculum import Stage as Stage
    from trm_fast.train.curriculum import until as until
    from trm_fast.train.objective import FunctionObjective as FunctionObjective
    from trm_fast.train.objective import Metrics as Metrics
    from trm_fast.train.objective import Objective as Objective
    from trm_fast.train.objective import StepResult as StepResult
    from trm_fast.train.progress import Progress as Progress
    from trm_fast.train.run import Record as Record
    from trm_fast.train.run import Run as Run
    from trm_fast.train.run import Step as Step
    from trm_fast.train.run_directory import RunDirectory as RunDirectory
    from trm_fast.train.stateful import Stateful as Stateful
    from trm_fast.train.supervision import DeepSupervision as DeepSupervision
    from trm_fast.train.supervision import JointSupervision as JointSupervision
    from trm_fast.train.supervision import PerStepSupervision as PerStepSupervision
    from trm_fast.train.trackers import Tracker as Tracker
    from trm_fast.train.trainer import Trainer as Trainer

# Resolved on first use: reading a run for a report needs no torch.
__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "_guard": ("NonFiniteError",),
        "batches": (
            "Batches",
            "EpochBatches",
            "RepeatedBatches",
        ),
        "callbacks": (
            "Callback",
            "EarlyStopping",
            "StopAtTarget",
        ),
        "checkpoints.checkpoints": (
            "Checkpoints",
            "size_of",
        ),
        "checkpoints.reader": (
            "CheckpointInfo",
            "Loaded",
            "read_checkpoint",
        ),
        "config": (
            "Summary",
            "TrainerConfig",
        ),
        "curriculum": ("Curriculum", "Stage", "until"),
        "objective": (
            "FunctionObjective",
            "Metrics",
            "Objective",
            "StepResult",
        ),
        "progress": ("Progress",),
        "run": ("Record", "Run", "Step"),
        "run_directory": ("RunDirectory",),
        "stateful": ("Stateful",),
        "supervision": (
            "DeepSupervision",
            "JointSupervision",
            "PerStepSupervision",
        ),
        "trackers": ("Tracker",),
        "trainer": ("Trainer",),
    },
)
