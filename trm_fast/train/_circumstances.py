"""What the bits of a run depend on beside its settings, and what of it is new at a resume."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from trm_fast._dispatch import named_backend
from trm_fast._version import __version__
from trm_fast.train.backends import used
from trm_fast.train.distributed import device_name
from trm_fast.train.run import Run


class Monitored(Run, Protocol):
    """A run that keeps the best checkpoint."""

    best_after: int


_ABSENT = "nothing"


def circumstances(run: Run) -> dict[str, Any]:
    """Returns versions, device, threads and backends, as plain values for a checkpoint."""
    device = run.world.device
    named = named_backend()
    chosen = {name: op["chosen"] for name, op in used(device).items()}
    return {
        "trm_fast": __version__,
        "torch": str(torch.__version__),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": run.world.size,
        "backend": named if named is not None else chosen,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns what has changed, such as "threads 1 is now 2", of values that may be nested."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        f"{name} {old.get(name, _ABSENT)} is now {new.get(name, _ABSENT)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            # As JSON gives it back.
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def other_data(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """Returns the stages whose data are others than before, as far as both are known."""
    return [
        f"the data of {name!r} are others"
        for name, found in now.items()
        if found is not None and before.get(name) is not None and before[name] != found
    ]


def begin_best_anew(run: Monitored, before: Sequence[str] | None) -> list[str]:
    """Forgets what was best by another monitor or mode: values of two measures do not compare.

    Args:
        run: with the ``best`` and ``best_after`` of the checkpoint.
        before: monitor and mode of the checkpoint, None if it does not say.

    Returns:
        What to report, if anything.
    """
    now = [run.config.monitor, run.config.mode]
    if before is None or list(before) == now:
        return []
    run.best, run.best_after = {}, run.step
    if not before[0]:
        return []
    return [
        f"the monitor {before[0]} ({before[1]}) is now {now[0] or 'none'} ({now[1]}): the best "
        f"checkpoint is looked for anew after step {run.step}"
    ]


def changes_since(
    run: Monitored, state: Mapping[str, Any], data: Mapping[str, str | None] | None
) -> list[str]:
    """Compares a run with the checkpoint that it has gone back to.

    Args:
        run: the run.
        state: of the checkpoint.
        data: fingerprints by the name of the stage; None where other processes have other parts.

    Returns:
        What to report.
    """
    saved = state["trainer"]
    run.best_after = saved.get("best_after", -1)
    lines = begin_best_anew(run, saved.get("monitor"))
    before = saved.get("circumstances")
    found = [] if before is None else differences(before, circumstances(run))
    if data is not None:
        found += other_data(state["process"][str(run.world.rank)].get("data", {}), data)
    if found:
        lines.append(f"what the bits depend on has changed: {'; '.join(found)}")
    return lines
