"""``load_run``: the weights of a checkpoint, for a trainer that shall evaluate them."""

import os
from typing import TYPE_CHECKING

from trm_fast.train.checkpoints.checkpoints import Checkpoints, Loaded
from trm_fast.train.checkpoints.snapshot import _check, _load_model, _load_optimizer
from trm_fast.train.distributed import sharded_like

if TYPE_CHECKING:
    from trm_fast.train.trainer import Trainer


def load_run(
    trainer: "Trainer", directory: str | os.PathLike[str], which: str | int = "latest"
) -> Loaded:
    """Takes over weights, their average, optimizers and the step from a checkpoint of a run.

    What is read is verified, and compared with the trainer, before anything of it changes. Its
    place in the data and what belongs to the next step stay as they are: the data may be others.

    Args:
        trainer: of the same settings as the run; it need not write there.
        directory: of the run.
        which: "latest", "best" or a step, as for ``Checkpoints.load``.

    Returns:
        The checkpoint, which says its step and path, and which ones were passed over and why.

    Raises:
        ValueError: no checkpoint is whole, or it is of another model or other optimizers.
        OSError: a file cannot be read.
    """
    own_average = trainer.ema is not None and not trainer.ema.is_of_optimizer
    parts = ("model", "optim", "trainer", *(["ema"] if own_average else []))
    loaded = Checkpoints(directory).load(which, parts=parts)
    state = loaded.state
    _check(trainer, state)
    _load_model(trainer.model, state["model"])
    for index, optimizer in enumerate(trainer.optimizers):
        _load_optimizer(optimizer, state["optim"][str(index)])
    if trainer.ema is not None and own_average:
        average = trainer.ema.average
        saved = state["ema"]["average"].items()
        whole = {name: sharded_like(value, average[name]) for name, value in saved}
        trainer.ema.load_state_dict({**state["ema"], "average": whole})
    trainer.step = loaded.step
    return loaded
