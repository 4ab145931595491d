"""The way of a run back to its last checkpoint, and what is told of it."""

from collections.abc import Mapping
from typing import Any

from trm_fast.train._circumstances import changes_since, differences
from trm_fast.train._given import changed
from trm_fast.train._run_files import RunFiles
from trm_fast.train.checkpoints.checkpoints import Loaded
from trm_fast.train.checkpoints.resumable import Resumable
from trm_fast.train.checkpoints.snapshot import restore

Told = list[tuple[str, str]]  # names of events and their messages


def go_back(
    run: Resumable, files: RunFiles, settings: Mapping[str, Any]
) -> tuple[Loaded | None, Told]:
    """Takes a run back to the last checkpoint that is whole, if there is any. The files stay as
    they are.

    Returns:
        The checkpoint, and what to tell of it.

    Raises:
        ValueError: there are checkpoints, but none can be loaded or fits.
    """
    loaded = files.load()
    if loaded is None:
        if files.is_empty:
            return None, [("started", f"there is no run in {run.out} yet: this is a new one")]
        return None, [("started", "there is no checkpoint yet: starting at the beginning")]
    before = files.settings_of(loaded)
    lost = restore(run, loaded.state)
    told = [("checkpoint", reason) for reason in (*loaded.skipped, *([lost] if lost else []))]
    told.append(("resumed", f"resumed at step {loaded.step} from {loaded.path.name}"))
    sources = run.curriculum.sources
    data = None if lost else sources.fingerprints()
    told += (("changed", line) for line in changes_since(run, loaded.state, data))
    other = differences(before, settings)
    if other:
        told.append(("changed", f"settings have changed: {'; '.join(other)}"))
    before = loaded.state["trainer"].get("given", {})
    told += (("changed", line) for line in changed(before, run.given, other))
    told += (("data", line) for line in sources.beyond())
    return loaded, told


def drop_later(run: Resumable, files: RunFiles, records: int) -> Told:
    """Takes over the records of a run up to its checkpoint, and drops those after it.

    Args:
        run: the run, at the step of the checkpoint.
        files: its files.
        records: that the checkpoint counts.

    Returns:
        What to tell of it.
    """
    run.history, dropped = files.rewind(run.step, records)
    told = []
    if dropped:
        told.append(("rewound", f"lines dropped that came after step {run.step}: {dropped}"))
    lost = records - len(run.history)
    if lost > 0 and run.world.is_main:
        told.append(("rewound", f"lines that metrics.jsonl had before and lacks now: {lost}"))
    return told
