"""``load_run``: the weights of a checkpoint, for a trainer that shall evaluate them."""

import os

from trm_fast.train.checkpoints.checkpoints import Checkpoints, Loaded
from trm_fast.train.checkpoints.resumable import Resumable
from trm_fast.train.checkpoints.snapshot import check_weights, fitted, load_weights, take_stage
from trm_fast.train.checkpoints.undo import undone_on_error


def load_run(
    run: Resumable, directory: str | os.PathLike[str], which: str | int = "latest"
) -> Loaded:
    """Takes over weights, their average, optimizers, step and stage from a checkpoint of a run.

    What is read is verified, and compared with the trainer, before anything of it changes; after
    an error it is as it was. Its place in the data and what belongs to the next step stay as they
    are: the data may be others.

    Args:
        run: a trainer of the same settings; it need not write there.
        directory: of the run.
        which: "latest", "best" or a step, as for ``Checkpoints.load``.

    Returns:
        The checkpoint, which says its step and path, and which ones were passed over and why.

    Raises:
        ValueError: no checkpoint is whole, or it is of another model or other optimizers.
        OSError: a file cannot be read.
    """
    own_average = run.ema is not None and not run.ema.is_of_optimizer
    parts = ("model", "optim", "trainer", *(["ema"] if own_average else []))
    loaded = Checkpoints(directory).load(which, parts=parts)
    state = fitted(run, loaded.state)
    check_weights(run, state)
    with undone_on_error(run):
        take_stage(run, state)
        load_weights(run, state)
    run.step = loaded.step
    return loaded
