"""The whole state of a training run, for a checkpoint, and back."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trm_fast.train._circumstances import circumstances
from trm_fast.train.callbacks import Callback, by_name
from trm_fast.train.checkpoints.resumable import Resumable
from trm_fast.train.checkpoints.undo import undone_on_error
from trm_fast.train.distributed import sharded_like, whole
from trm_fast.train.generators import generators, set_generators
from trm_fast.train.run import Run

VERSION = 3  # of what a trainer saves; it grows when a resume needs something else


def snapshot(run: Resumable) -> dict[str, Any]:
    """Returns everything that a run needs to go on to the same bits; all processes must call it."""
    world = run.world
    states = {name: _state_of(name, part) for name, part in by_name(run.callbacks).items()}
    own = {
        "objective": run.objective.state_dict(),
        "extra": run.extra.state_dict(),
        "generators": generators(world.device),
        "meter": run.meter.state_dict(),
        "batches": run.curriculum.sources.places(),
        "data": {} if run.out is None else run.curriculum.sources.known_fingerprints(),
        "callbacks": {name: state for name, state in states.items() if state},
        "buffers": world.own_values(own_buffers(run)),
    }
    state = {
        "model": bare_names(whole(run.model.state_dict())),
        "optim": {str(i): whole(o.state_dict()) for i, o in enumerate(run.optimizers)},
        "process": {str(rank): part for rank, part in enumerate(world.collect(own))},
        "trainer": {
            "version": VERSION,
            "step": run.step,
            "seconds": run.elapsed(),
            "world_size": world.size,
            "optimizers": [type(optimizer).__name__ for optimizer in run.optimizers],
            "groups": _names_in_groups(run),
            "frozen": [name for name, p in _params(run).items() if not p.requires_grad],
            "schedules": [schedule.state_dict() for schedule in run.schedules],
            "curriculum": run.curriculum.state_dict(),
            "scaler": None if run.scaler is None else run.scaler.state_dict(),
            "guard": run.guard.state_dict(),
            "extra_updates": run.extra.count,
            "records": len(run.history),
            "metrics": dict(run.metrics),
            "evaluated_at": run.evaluated_at,
            "best": dict(run.best),
            "best_after": run.best_after,
            "monitor": [run.config.monitor, run.config.mode],
            "circumstances": circumstances(run),
            "schedule_kinds": [type(schedule).__name__ for schedule in run.schedules],
            "given": run.given,
        },
    }
    if run.ema is not None and not run.ema.is_of_optimizer:
        ema = whole(run.ema.state_dict())
        state["ema"] = {**ema, "average": bare_names(ema["average"])}
    return state


def restore(run: Resumable, state: dict[str, Any]) -> str | None:
    """Takes over a snapshot; after an error the run is as it was.

    Returns:
        What could not be taken over because there are other processes now, or None.

    Raises:
        ValueError: the snapshot is of another model, or other optimizers, callbacks or stages, or
            of another version of trm_fast that saves something else.
    """
    with undone_on_error(run):
        return _restore(run, fitted(run, state))


def _restore(run: Resumable, state: dict[str, Any]) -> str | None:
    saved = state["trainer"]
    same_world = saved["world_size"] == run.world.size
    own = _part(state, ("process", str(run.world.rank if same_world else 0)), dict)
    for name, kind in _PROCESS.items():
        _part(own, (name,), kind)
    with _taking("trainer.groups"):
        _add_groups(run, state)
    check_weights(run, state)
    _restore_callbacks(run.callbacks, own["callbacks"])
    take_stage(run, state)
    # A stage may have schedules of its own.
    _require_same("schedules", len(run.schedules), len(saved["schedules"]))
    kinds = [type(schedule).__name__ for schedule in run.schedules]
    _require_same("classes of schedules", kinds, saved.get("schedule_kinds", kinds))
    load_weights(run, state)
    with _taking("trainer"):
        _restore_progress(run, saved)
    with _taking("process.batches"):
        run.curriculum.sources.load_places(own["batches"])
        # Made now, so that its place is loaded while all can be undone.
        run.curriculum.sources.of(run.curriculum.index)
    if not same_world:
        return (
            f"the checkpoint is of {saved['world_size']} processes, now there are "
            f"{run.world.size}: carries, those of extra updates too, random generators and sums of "
            "metrics start anew, and buffers that differ are those of the first one"
        )
    with _taking("process"):
        _restore_process(run, own)
    return None


def take_stage(run: Resumable, state: dict[str, Any]) -> None:
    """Goes to the stage of a snapshot.

    Raises:
        ValueError: there is no such stage.
    """
    with _taking("trainer.curriculum"):
        run.curriculum.load_state_dict(state["trainer"]["curriculum"])
        run.curriculum.enter_again(run)


def _restore_progress(run: Resumable, saved: dict[str, Any]) -> None:
    for schedule, value in zip(run.schedules, saved["schedules"], strict=True):
        schedule.load_state_dict(value)
    if run.scaler is not None and saved["scaler"] is not None:
        run.scaler.load_state_dict(saved["scaler"])
    run.guard.load_state_dict(saved["guard"])
    run.step, run.seconds = saved["step"], saved["seconds"]
    run.metrics, run.best = saved["metrics"], saved["best"]
    run.evaluated_at = saved["evaluated_at"]
    run.extra.count = saved["extra_updates"]


def _restore_process(run: Resumable, own: dict[str, Any]) -> None:
    buffers = dict(run.model.named_buffers())
    with torch.no_grad():
        for name, value in named_as(own["buffers"], buffers).items():
            buffers[name].copy_(value)
    run.objective.load_state_dict(own["objective"])
    run.extra.load_state_dict(own["extra"])
    run.meter.load_state_dict(own["meter"])
    run.curriculum.sources.load_fingerprints(own["data"])
    set_generators(own["generators"], run.world.device)


# What a trainer saves, and of which kind: a checkpoint may be whole and yet say something else.
_NUMBER = (int, float)
_TRAINER: dict[str, Any] = {
    "step": int, "seconds": _NUMBER, "world_size": int, "optimizers": list, "schedules": list,
    "groups": list, "frozen": list,
    "curriculum": dict, "scaler": (dict, type(None)), "guard": dict, "extra_updates": int,
    "records": int, "metrics": dict, "evaluated_at": (int, type(None)), "best": dict,
}  # fmt: skip
_OPTIONAL: dict[str, Any] = {"given": dict, "schedule_kinds": list}
_PROCESS: dict[str, Any] = {
    "objective": dict, "extra": dict, "generators": dict, "meter": dict, "batches": dict,
    "callbacks": dict, "buffers": dict, "data": dict,
}  # fmt: skip
_WRAPPER = re.compile(r"(?<![^.])_orig_mod\.")


def fitted(run: Run, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a snapshot under the names of this model, whether it was compiled then or is now,
    after what it has was found to be of the right kinds.

    Raises:
        ValueError: something is missing or of another kind, or it is of another version.
    """
    check_version(state)
    for name, kind in _TRAINER.items():
        _part(state, ("trainer", name), kind)
    for name, kind in _OPTIONAL.items():
        if name in state["trainer"]:
            _part(state, ("trainer", name), kind)
    for name in ("step", "records", "extra_updates"):
        if state["trainer"][name] < 0:
            raise ValueError(
                f"Trainer: trainer.{name} of the checkpoint must be >= 0; got "
                f"{state['trainer'][name]}"
            )
    model = _tensors_of(state, "model")
    fits = {**state, "model": named_as(model, run.model.state_dict())}
    for index in range(len(run.optimizers)):
        _part(state, ("optim", str(index), "state"), dict)
        for group in _part(state, ("optim", str(index), "param_groups"), list):
            _part({"group": group}, ("group", "params"), list)
    if "ema" in state and run.ema is not None:
        average = _tensors_of(state, "ema", "average")
        fits["ema"] = {**state["ema"], "average": named_as(average, run.ema.average)}
    return fits


def _part(state: Any, keys: tuple[str, ...], kind: Any) -> Any:
    """Returns what stands at some place of a snapshot, which must be of a kind."""
    value = state
    for key in keys:
        value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
    # A bool is an int to Python, and no number here.
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        got = "nothing" if value is _MISSING else type(value).__name__
        raise ValueError(
            f"Trainer: {'.'.join(keys)} of the checkpoint must be of type {wanted}; got {got}"
        )
    return value


_MISSING = object()


def _tensors_of(state: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Returns named tensors; extra states of modules may be anything."""
    found: dict[str, Any] = _part(state, keys, dict)
    for name, value in found.items():
        if not isinstance(value, Tensor) and not str(name).endswith("_extra_state"):
            raise ValueError(
                f"Trainer: {'.'.join(keys)}.{name} of the checkpoint must be a tensor; got "
                f"{type(value).__name__}"
            )
    return found


def bare_names(named: dict[str, Any]) -> dict[str, Any]:
    """Returns values without the names that torch.compile puts before those of a module."""
    bare = {_WRAPPER.sub("", name): value for name, value in named.items()}
    return bare if len(bare) == len(named) else named


def named_as(saved: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values under the names of ``own`` that differ in what torch.compile adds only."""
    full = {_WRAPPER.sub("", name): name for name in own}
    if len(full) < len(own):
        return saved
    return {full.get(_WRAPPER.sub("", str(name)), name): v for name, v in saved.items()}


@contextmanager
def _taking(what: str) -> Iterator[None]:
    """Names the part of a checkpoint that could not be taken over."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, ValueError) and "\n" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"Trainer: {what} of the checkpoint must be what this run can take over; got "
            f"{type(error).__name__}: {reason}"
        ) from error


def _params(run: Run) -> dict[str, nn.Parameter]:
    """Returns the parameters by names that are the same for a compiled model."""
    return bare_names(dict(run.model.named_parameters()))


def _names_in_groups(run: Run) -> list[list[list[str | None]]]:
    """Returns the names of the parameters in each group of each optimizer, None where the model
    has none."""
    names = {id(param): name for name, param in _params(run).items()}
    return [
        [[names.get(id(param)) for param in group["params"]] for group in optimizer.param_groups]
        for optimizer in run.optimizers
    ]


def _add_groups(run: Run, state: dict[str, Any]) -> None:
    """Gives optimizers the groups that they were given during the run, and parameters the flag of
    whether they are trained."""
    params, saved = _params(run), state["trainer"]
    if any(name not in params for name in saved["frozen"]):
        return  # of another model, which is refused
    for name, param in params.items():
        param.requires_grad_(name not in saved["frozen"])
    for index, optimizer in enumerate(run.optimizers[: len(saved["groups"])]):
        added = slice(len(optimizer.param_groups), None)
        groups = state["optim"][str(index)]["param_groups"][added]
        for names, options in zip(saved["groups"][index][added], groups, strict=True):
            if all(name in params for name in names):
                optimizer.add_param_group(_named_group(options, [params[n] for n in names]))


def _named_group(options: dict[str, Any], params: list[nn.Parameter]) -> dict[str, Any]:
    """Returns a group with the options of a saved one, whose parameters may have names."""
    group = {name: value for name, value in options.items() if name != "param_names"}
    names = options.get("param_names")
    return {**group, "params": params if names is None else list(zip(names, params, strict=True))}


def _state_of(name: str, callback: Callback) -> dict[str, Any]:
    state: Any = callback.state_dict()
    if not isinstance(state, dict):
        raise TypeError(
            f"Trainer: state_dict() of callback {name!r} must return a dict; got "
            f"{type(state).__name__}"
        )
    return state


def own_buffers(run: Resumable) -> dict[str, Tensor]:
    """Returns the buffers that are saved, by their names in a checkpoint, but for those of
    optimizers, which move them alike in all processes."""
    saved = run.model.state_dict().keys()
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    moved = {id(param) for group in groups for param in group["params"]}
    own = {
        name: buffer
        for name, buffer in run.model.named_buffers()
        if name in saved and id(buffer) not in moved
    }
    return bare_names(own)


def _restore_callbacks(callbacks: list[Callback], states: dict[str, Any]) -> None:
    """Gives each callback the state of its name."""
    found = by_name(callbacks)
    for name, state in states.items():
        if name not in found:
            raise ValueError(
                f"Trainer: the callbacks must be those of the checkpoint, which has a state of "
                f"{name!r}; got {', '.join(found) or 'none'}"
            )
        try:
            found[name].load_state_dict(state)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"Trainer: the state of callback {name!r} must be one that it can load; got one "
                f"with {', '.join(map(str, state))} ({type(error).__name__}: {error})"
            ) from error


def check_version(state: dict[str, Any]) -> None:
    """Compares the version of a snapshot with this one.

    Raises:
        ValueError: it is another one.
    """
    known = {"version": 1} | _part(state, ("trainer",), dict)
    found = _part({"trainer": known}, ("trainer", "version"), int)
    if found != VERSION:
        raise ValueError(
            f"Trainer: the checkpoint must be of version {VERSION} of the state of a trainer; got "
            f"{found}. Go on with the trm_fast that has written it, which run.json names"
        )


def check_weights(run: Run, state: dict[str, Any]) -> None:
    """Compares model, optimizers and averages with what is needed, before anything is changed.

    Raises:
        ValueError: they differ.
    """
    have, need = state["model"], run.model.state_dict()
    for what, found in (("lacks", need.keys() - have.keys()), ("has", have.keys() - need.keys())):
        if found:
            raise ValueError(
                f"Trainer: the checkpoint must be of the same model; it {what} {min(found)}"
            )
    for name, tensor in need.items():
        if isinstance(tensor, Tensor) and (
            not isinstance(have[name], Tensor) or _kind(tensor) != _kind(have[name])
        ):
            got = _kind(have[name]) if isinstance(have[name], Tensor) else "no tensor"
            raise ValueError(
                f"Trainer: {name} of the checkpoint must be {_kind(tensor)} as in the model; "
                f"got {got}"
            )
    averages = run.ema is not None and not run.ema.is_of_optimizer
    _require_same(
        "optimizers", [type(o).__name__ for o in run.optimizers], state["trainer"]["optimizers"]
    )
    _require_same(
        "parameters in groups",
        [_sizes(o.param_groups) for o in run.optimizers],
        [_sizes(saved["param_groups"]) for saved in state["optim"].values()],
    )
    with _taking("trainer.groups"):
        _require_same_names(_names_in_groups(run), state["trainer"]["groups"])
    _require_same("averages of weights", int(averages), int("ema" in state))


def _require_same(what: str, now: Any, saved: Any) -> None:
    if now != saved:
        got = " ".join(str(saved).split())[:200]
        raise ValueError(
            f"Trainer: the checkpoint must be of a run with the same {what}, {now}; got {got}"
        )


def _require_same_names(now: list[list[list[str | None]]], saved: Any) -> None:
    """Refuses parameters in another order: states of optimizers have no names."""
    for optimizer, (own, others) in enumerate(zip(now, saved, strict=True)):
        for name, other in zip(chain(*own), chain(*others), strict=True):
            if name != other and None not in (name, other):
                raise ValueError(
                    f"Trainer: optimizer {optimizer} must have its parameters in the order of the "
                    f"checkpoint, where {other!r} is in this place; got {name!r}"
                )


def _sizes(groups: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def load_weights(run: Run, state: dict[str, Any]) -> None:
    """Takes over model, optimizers and averages, which ``check_weights`` has compared."""
    with _taking("model"):
        _load_model(run.model, state["model"])
    with _taking("optim"):
        for index, optimizer in enumerate(run.optimizers):
            _load_optimizer(optimizer, state["optim"][str(index)])
    if run.ema is None or run.ema.is_of_optimizer:
        return
    with _taking("ema"):
        average = run.ema.average
        saved = state["ema"]["average"].items()
        loaded = {name: sharded_like(value, average.get(name)) for name, value in saved}
        run.ema.load_state_dict({**state["ema"], "average": loaded})


def _load_model(model: nn.Module, state: dict[str, Any]) -> None:
    current = model.state_dict()
    model.load_state_dict({name: sharded_like(v, current[name]) for name, v in state.items()})


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = {
        index: {
            name: sharded_like(value, params[index]) if _fits(value, params[index]) else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def _fits(value: Any, param: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == param.shape
