"""The way of a run back to its last checkpoint, and what is reported of it."""

from collections.abc import Mapping
from typing import Any

from trm_fast.train._circumstances import changes_since, differences
from trm_fast.train._given import changed
from trm_fast.train._run_files import RunFiles
from trm_fast.train.checkpoints.checkpoints import Loaded
from trm_fast.train.checkpoints.resumable import Resumable
from trm_fast.train.checkpoints.snapshot import restore

Events = list[tuple[str, str]]  # names of events and their messages


def go_back(
    run: Resumable, files: RunFiles, settings: Mapping[str, Any]
) -> tuple[Loaded | None, Events]:
    """Takes a run back to the last checkpoint that is whole, if there is any. The files stay as
    they are.

    Returns:
        The checkpoint, and what to report of it.

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
    events = [("checkpoint", reason) for reason in (*loaded.skipped, *([lost] if lost else []))]
    events.append(("resumed", f"resumed at step {loaded.step} from {loaded.path.name}"))
    sources = run.curriculum.sources
    data = None if lost else sources.fingerprints()
    events += (("changed", line) for line in changes_since(run, loaded.state, data))
    other = differences(before, settings)
    if other:
        events.append(("changed", f"settings have changed: {'; '.join(other)}"))
    before = loaded.state["trainer"].get("given", {})
    events += (("changed", line) for line in changed(before, run.given, other))
    events += (("data", line) for line in sources.beyond())
    return loaded, events


def drop_later(run: Resumable, files: RunFiles, records: int) -> Events:
    """Takes over the records of a run up to its checkpoint, and drops those after it.

    Args:
        run: the run, at the step of the checkpoint.
        files: its files.
        records: that the checkpoint counts.

    Returns:
        What to report of it.
    """
    run.history, dropped = files.rewind(run.step, records)
    events = []
    if dropped:
        events.append(("rewound", f"lines dropped that came after step {run.step}: {dropped}"))
    lost = records - len(run.history)
    if lost > 0 and run.world.is_main:
        events.append(("rewound", f"lines that metrics.jsonl had before and lacks now: {lost}"))
    return events
