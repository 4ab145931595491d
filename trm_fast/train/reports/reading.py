"""What a run has been, read from its directory without its tensors.

A run that was killed, that still goes on, or that has recorded nothing yet is reported as such.
What cannot be read is an error, and what had to be left out is among the notes.
"""

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from trm_fast._files import open_file
from trm_fast._json import load_object
from trm_fast._paths import expanded
from trm_fast.train import files
from trm_fast.train.run_directory import LOCK, MAX_JSON, read_records

if TYPE_CHECKING:
    from trm_fast.train.checkpoints.checkpoints import CheckpointInfo

FILES = ("report.html", "curves.png")
State = Literal["running", "finished", "interrupted", "stopped", "unfinished", "empty"]
Record = dict[str, Any]

_MAX_LOCK = 400
_NOT_METRICS = ("kind", "step", "seconds", "count", "lr", "steps_per_second")
# Metrics by which a run is judged if its settings name none, best first.
_SHARES = ("exact_accuracy", "validation_accuracy", "accuracy")
_LOSSES = ("lm_loss", "validation_loss", "loss")
# Events that say whether a run goes on.
_TURNS = ("started", "resumed", "interrupted", "stopped", "failed")


@dataclass(frozen=True)
class RunReport:
    """What a run has been.

    Args:
        path: its directory.
        name: what was trained.
        state: "running" if a trainer of this machine holds its lock; "finished" or "interrupted"
            as it said at its end; "stopped" by non-finite steps; "unfinished" if it was killed;
            "empty" if nothing is recorded yet.
        reason: the same in words.
        step: updates of the weights so far.
        steps: updates that were asked for, or None.
        examples: examples per update at most, or None if the run does not say it.
        seconds: wall time of all parts of the run up to the last record.
        settings: dotted name to value.
        environment: versions, device and sizes, as in run.json.
        train: records of training, in order; numbers are floats.
        evaluations: records of evaluations, likewise.
        monitor: the metric by which the run is judged; empty if there was no evaluation.
        mode: whether "max" or "min" of it is best.
        best: the best evaluation of the last stage that has any, the first of equal ones; None if
            there is none.
        pace: updates per second, the median of the intervals; NaN if there is none.
        checkpoints: what they say of themselves, in the order of their saving.
        latest, best_checkpoint: names of those that LATEST and BEST name, or "".
        events: records of what did not go as planned.
        backends: by op, what ``trm_fast.train.backends.used`` gives; empty if not recorded.
        notes: what was left out in reading.
    """

    path: Path
    name: str
    state: State
    reason: str
    step: int
    steps: int | None
    examples: int | None
    seconds: float
    settings: dict[str, Any]
    environment: dict[str, Any]
    train: list[Record]
    evaluations: list[Record]
    monitor: str
    mode: Literal["max", "min"]
    best: Record | None
    pace: float
    checkpoints: "list[CheckpointInfo]"
    latest: str
    best_checkpoint: str
    events: list[Record]
    backends: dict[str, dict[str, Any]]
    notes: list[str]

    @property
    def last(self) -> Record | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def label(self) -> str:
        """The name of the directory."""
        return self.path.resolve().name


def read_run(directory: str | os.PathLike[str]) -> RunReport:
    """Reads the directory of a run, also while it is written.

    Args:
        directory: with config.json, run.json and what else a ``Trainer`` writes.

    Raises:
        ValueError: there is no run, or a file is damaged; one line that names it.
        OSError: a file cannot be read.
    """
    path = expanded(directory)
    _require_run(path)
    notes: list[str] = []
    settings = dict(_leaves(_object(path / "config.json", notes)))
    environment = _object(path / "run.json", notes)
    summary = _object(path / "summary.json", [])
    name = str(environment.get("name") or "run")
    shown = _shown(path / "run.json", environment)
    percent = shown["percent"]
    records = [as_shares(record, percent) for record in _metrics(path / "metrics.jsonl", notes)]
    events = list(_events(path / "events.jsonl", notes))
    train = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    checkpoints = [
        replace(info, summary=as_shares(info.summary, percent)) for info in _checkpoints(path)
    ]
    steps = shown["steps"]
    counted = [*records, *events, {"step": _whole(summary.get("step"))}]
    step = max([entry["step"] for entry in counted] + [info.step for info in checkpoints])
    state, reason = _state(path, summary, events, step, steps)
    monitor, mode = _monitor(shown, evaluations)
    paces = [record.get("steps_per_second", math.nan) for record in train]
    known = [pace for pace in paces if not math.isnan(pace)]
    return RunReport(
        path=path,
        name=name,
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        examples=shown["examples"],
        seconds=max([record["seconds"] for record in records], default=0.0),
        settings=settings,
        environment=environment,
        train=train,
        evaluations=evaluations,
        monitor=monitor,
        mode=mode,
        best=_best(evaluations, monitor, mode),
        pace=median(known) if known else math.nan,
        checkpoints=checkpoints,
        latest=_pointed(path / "ckpt" / "LATEST"),
        best_checkpoint=_pointed(path / "ckpt" / "BEST"),
        events=events,
        backends=_backends(path / "summary.json", summary),
        notes=notes,
    )


def _require_run(path: Path) -> None:
    names = ("config.json", "run.json", "metrics.jsonl")
    if not path.exists():
        found = "where there is nothing"
    elif not path.is_dir():
        found = "a file"
    elif any((path / name).exists() for name in names):
        return
    else:
        found = f"without {names[0]}, {names[1]} and {names[2]}"
    raise ValueError(f"report: RUN must be the directory of a run; got {path}, {found}")


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a record, without its place, learning rate and pace."""
    return {
        name: value
        for name, value in record.items()
        if name not in _NOT_METRICS and isinstance(value, float)
    }


def is_share(name: str) -> bool:
    """Returns whether a metric is a part of a whole, in [0, 1]."""
    return name.endswith("accuracy") or name.startswith("pass")


def as_shares(record: Mapping[str, Any], percent: Collection[str]) -> dict[str, Any]:
    """Returns a record with the metrics that are in percent as shares in [0, 1]."""
    return {
        name: value / 100 if name in percent and isinstance(value, float) else value
        for name, value in record.items()
    }


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    """Returns the object in a file, an empty one if there is no such file."""
    if not path.exists():
        notes.append(f"{path.name} is missing")
        return {}
    with files.explained("report", path):
        return load_object(files.read(path, MAX_JSON), f"{path}:")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _metrics(path: Path, notes: list[str]) -> Iterator[Record]:
    for place, record in enumerate(_records(path, notes), 1):
        if not isinstance(record.get("kind"), str) or not _is_step(record.get("step")):
            raise ValueError(f"{path}: record {place} must have a kind and a step >= 0")
        numbers = {name: _number(v) for name, v in record.items() if name not in ("kind", "step")}
        known = {name: value for name, value in numbers.items() if value is not None}
        yield {"seconds": 0.0, **known, "kind": record["kind"], "step": record["step"]}


def _events(path: Path, notes: list[str]) -> Iterator[Record]:
    for place, record in enumerate(_records(path, notes), 1):
        if not isinstance(record.get("event"), str) or not _is_step(record.get("step")):
            raise ValueError(f"{path}: record {place} must have an event and a step >= 0")
        yield {**record, "message": str(record.get("message", ""))}


def _records(path: Path, notes: list[str]) -> list[Record]:
    if not path.exists():
        return []
    files.file_size(path)  # a link or a pipe is none of the run
    records = read_records(path)
    with open_file(path, links=False) as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
            notes.append(f"{path.name}: its last line is torn and left out")
    return records


def _is_step(value: Any) -> bool:
    return type(value) is int and value >= 0


def _whole(value: Any) -> int:
    return value if _is_step(value) else 0


def _number(value: Any) -> float | None:
    """Returns a number as a float, also "NaN", "Infinity" and "-Infinity"; None for the rest."""
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def _shown(path: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """Takes out of run.json how the run is to be shown, each value or what stands for none."""
    found = environment.pop("report", {})
    kinds: dict[str, tuple[type, Any]] = {
        "steps": (int, None),
        "examples": (int, None),
        "monitor": (str, ""),
        "mode": (str, "max"),
        "percent": (list, []),
    }
    if not isinstance(found, dict):
        raise ValueError(f"report: {path}: report must be an object; got {found!r}")
    return {
        name: found[name] if type(found.get(name)) is kind else default
        for name, (kind, default) in kinds.items()
    }


def _state(
    path: Path, summary: Mapping[str, Any], events: list[Record], step: int, steps: int | None
) -> tuple[State, str]:
    if _is_locked(path / LOCK):
        return "running", "a trainer is at work on it"
    if summary.get("reason"):
        return ("interrupted" if summary.get("signal") else "finished"), str(summary["reason"])
    turns = [event for event in events if event["event"] in _TURNS]
    last = turns[-1]["event"] if turns else ""
    if last == "interrupted":
        return "interrupted", turns[-1]["message"]
    if last in ("stopped", "failed"):
        return "stopped", turns[-1]["message"]
    if step == 0:
        return "empty", "nothing is recorded yet"
    if steps is not None and step >= steps:
        return "finished", f"all {steps} steps are done"
    return "unfinished", "it has not said how it ended: it was killed, or runs elsewhere"


def _is_locked(path: Path) -> bool:
    """Returns whether the trainer that the lock file names holds it, without trying to take it: a
    trainer that starts just then would find it taken."""
    try:
        with open_file(path, links=False) as file:
            inode = os.fstat(file.fileno()).st_ino
            pid = file.read(_MAX_LOCK).decode("ascii", "replace").split()[0]
        lines = Path("/proc/locks").read_text().splitlines()
    except (OSError, IndexError):
        return False
    held = [line.split() for line in lines]
    # 1: FLOCK ADVISORY WRITE pid major:minor:inode start end
    return any(
        len(words) > 5 and words[1] == "FLOCK" and words[4] == pid
        and words[5].rpartition(":")[2] == str(inode)
        for words in held
    )  # fmt: skip


def _monitor(
    shown: Mapping[str, Any], evaluations: list[Record]
) -> tuple[str, Literal["max", "min"]]:
    if not evaluations:
        return "", "max"
    found = metrics_of(evaluations[-1])
    if shown["monitor"] in found:
        return shown["monitor"], "min" if shown["mode"] == "min" else "max"
    shares = [name for name in (*_SHARES, *filter(is_share, found)) if name in found]
    if shares:
        return shares[0], "max"
    losses = [name for name in (*_LOSSES, *found) if name in found]
    return (losses[0] if losses else ""), "min"


def _best(evaluations: list[Record], monitor: str, mode: str) -> Record | None:
    sign = -1.0 if mode == "max" else 1.0
    known = [e for e in evaluations if not math.isnan(e.get(monitor, math.nan))]
    # Stages are not compared; the step before its first one tells a stage from the others.
    known = [e for e in known if _stage_start(e) == _stage_start(known[-1])]
    return min(known, key=lambda record: sign * float(record[monitor]), default=None)


def _stage_start(record: Record) -> float:
    return float(record["step"] - record["curriculum/step"]) if "curriculum/step" in record else 0.0


def _checkpoints(path: Path) -> "list[CheckpointInfo]":
    if not (path / "ckpt").is_dir():
        return []
    # It takes torch, which a run without checkpoints does not need.
    from trm_fast.train.checkpoints.checkpoints import Checkpoints

    return Checkpoints(path).list()


def _pointed(path: Path) -> str:
    try:
        return files.read(path, 256).decode("ascii", "replace").strip()
    except (OSError, ValueError):
        return ""


def _backends(path: Path, summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = summary.get("backends", {})
    if not isinstance(found, dict) or not all(isinstance(op, dict) for op in found.values()):
        raise ValueError(f"{path}: backends must be an object of objects")
    for op in found.values():
        for name in ("calls", "fallbacks"):
            if not isinstance(op.get(name, {}), dict):
                raise ValueError(f"{path}: {name} of each op must be an object")
    return found
