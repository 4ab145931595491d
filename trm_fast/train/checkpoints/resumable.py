"""``Resumable``: what a run has that a checkpoint holds."""

from typing import Protocol

from trm_fast.train._extra import ExtraUpdates
from trm_fast.train._given import Given
from trm_fast.train._guard import NonFiniteGuard
from trm_fast.train.callbacks import Callback
from trm_fast.train.curriculum import Curriculum
from trm_fast.train.run import Run
from trm_fast.train.stateful import Stateful


class Resumable(Run, Protocol):
    """A run with all that a checkpoint holds; a ``Trainer`` is one."""

    callbacks: list[Callback]
    guard: NonFiniteGuard
    seconds: float
    best_after: int
    extra: ExtraUpdates
    given: Given

    @property
    def curriculum(self) -> Curriculum: ...

    @property
    def scaler(self) -> Stateful | None: ...
