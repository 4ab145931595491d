"""``Recipe``: what a recipe declares; trainer and command line know none of them by name."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from trm_fast.recipes.settings import leaves
from trm_fast.train import Summary, Trainer, TrainerConfig

Config = TypeVar("Config")

# What changes nothing that a run computes, of the settings of its trainer.
TRAINER_MAY_CHANGE = (
    "log_every", "evaluate_every", "save_every", "keep_last", "monitor", "mode",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe(Generic[Config]):
    """A complete experiment: its settings, what is built of them, and what is shown of it.

    Settings are named as on the command line, with dots: "train.steps".

    Args:
        name: the word after ``trm-fast train``; also in the run.json of its runs.
        presets: settings by name, all of one dataclass; the first are the default ones.
        build: returns the ``Trainer`` of some settings; it writes nothing yet.
        finish: returns the lines that are shown after a run.
        length: the setting that says how long a run is.
        may_change: further settings in which a resumed run may differ from what it was. A dataclass
            among the settings stands for all of its fields.
        percent: metrics that are in percent, and not shares in [0, 1].
        evaluation: settings that ``trm-fast eval`` replaces, such as {"tracker": "none"}.
        data: the setting that names the data, for ``trm-fast eval --data``; empty for none.
        directory: the setting that names the directory of a run, which may be empty; of importance
            for ``runs`` only.
        all_data: settings that take all of the data named by ``data``, such as {"data.test": 0}.
        runs: for settings that stand for several runs: the settings of each, by a name that becomes
            its directory below that of the whole. They are trained one after another; a resumed
            whole goes on with those that have not ended. The settings of a run stand for that run
            alone. None if there is always one run.
        compare: the lines that are shown after several runs, of their summaries by name.

    Raises:
        TypeError: presets are of different classes, or of none.
        ValueError: there is no preset, or a setting is declared that the presets do not have.
    """

    name: str
    presets: Mapping[str, Config]
    build: Callable[[Config], Trainer]
    finish: Callable[[Trainer, Summary], list[str]]
    length: str
    may_change: tuple[str, ...] = ()
    percent: tuple[str, ...] = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    directory: str = "out"
    all_data: Mapping[str, Any] = field(default_factory=dict)
    runs: Callable[[Config], Mapping[str, Config]] | None = None
    compare: Callable[[Mapping[str, Summary]], list[str]] | None = None

    def __post_init__(self) -> None:
        if not self.presets:
            raise ValueError(f"Recipe {self.name!r}: presets must have at least one; got none")
        for preset, config in self.presets.items():
            if type(config) is not self.settings or not dataclasses.is_dataclass(config):
                raise TypeError(
                    f"Recipe {self.name!r}: presets must be of one dataclass, "
                    f"{self.settings.__name__}; got {type(config).__name__} for {preset!r}"
                )
        declared = {
            "length": (self.length,),
            "may_change": self.may_change,
            "evaluation": self.evaluation,
            "data": (self.data,) if self.data else (),
            "directory": (self.directory,) if self.runs is not None else (),
            "all_data": self.all_data,
        }
        known = [name for name, _ in leaves(self.default)]
        for argument, names in declared.items():
            for name in names:
                inner = argument == "may_change" and any(k.startswith(f"{name}.") for k in known)
                if name not in known and not inner:
                    raise ValueError(
                        f"Recipe {self.name!r}: {argument} must name settings of "
                        f"{self.settings.__name__}; got {name!r}, not among {', '.join(known)}"
                    )

    @property
    def default(self) -> Config:
        """The settings of the first preset."""
        return next(iter(self.presets.values()))

    @property
    def settings(self) -> type[Config]:
        """The class of the settings."""
        return type(self.default)

    def is_free(self, setting: str) -> bool:
        """Returns whether a resumed run may have another value of a setting."""
        free = (self.length, *self.may_change)
        return any(setting == name or setting.startswith(f"{name}.") for name in free)

    def changes(self, before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
        """Returns what a resumed run may not change and did: by setting, the values before and
        now."""
        old = dict(leaves(before))
        return {
            name: (old[name], value)
            for name, value in leaves(now)
            if value != old[name] and not self.is_free(name)
        }


def how_it_ended(summary: Summary) -> list[str]:
    """Returns the lines with which ``finish`` of a recipe begins: why the run ended and when, and
    what was skipped."""
    lines = [f"{summary.reason}: step {summary.step:,}, {summary.seconds:.1f} s"]
    if summary.skipped:
        lines.append(f"{summary.skipped} steps were skipped: see events.jsonl")
    return lines


def trainer_settings(prefix: str) -> tuple[str, ...]:
    """Returns the settings of a ``TrainerConfig`` below ``prefix`` in which a resumed run may
    differ, apart from its length."""
    names = {each.name for each in dataclasses.fields(TrainerConfig)}
    assert names >= {*TRAINER_MAY_CHANGE}
    return tuple(f"{prefix}.{name}" for name in TRAINER_MAY_CHANGE)
