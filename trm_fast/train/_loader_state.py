"""``LoaderState``: what a loader keeps from epoch to epoch, beside what the process shares."""

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from torch.utils.data import DataLoader

from trm_fast.train._loader_parts import parts_of
from trm_fast.train._loader_values import UnsavableError, generator_state, set_generator
from trm_fast.train._watched import watched


class LoaderState:
    """Random generators that a loader has for itself, and what its objects have changed since.

    Generators are looked for in all that the loader holds: attributes, lists and dicts, functions,
    and names of a module that its functions use. Of the user's own objects, such as a data set or a
    sampler, the attributes that have changed are part of the state too, as far as they are numbers,
    texts, arrays, or lists and dicts of these: a cached order, a counter, a list that is shuffled
    in place. Objects with a ``state_dict`` are asked for their state instead.

    Args:
        source: a loader, or a function that makes one.

    Raises:
        ValueError: a generator has no state, or processes of a loader draw on from epoch to epoch.
    """

    def __init__(self, source: Any) -> None:
        found = parts_of(source)
        for path, loader in found.loaders.items():
            _refuse_persistent(path, loader)
        for path, generator in found.generators.items():
            try:
                generator_state(generator)
            except UnsavableError:
                raise ValueError(
                    "EpochBatches: batches must be drawn from generators whose state can be saved; "
                    f"got {type(generator).__name__} as {path}"
                ) from None
        self.loaders = list(found.loaders.values())
        self._generators, self._stateful = found.generators, found.stateful
        self._watched = {path: watched(value) for path, value in found.watched.items()}

    def state_dict(self, between_epochs: bool) -> dict[str, Any]:
        """Returns copies of the states.

        Args:
            between_epochs: whether no epoch is under way; objects that know their state are asked
                then only, as it may be that of their place in the epoch.
        """
        asked = self._stateful if between_epochs else {}
        changed = ((path, part.changes()) for path, part in self._watched.items())
        return {
            "generators": {path: generator_state(g) for path, g in self._generators.items()},
            "changed": {path: changes for path, changes in changed if changes is not None},
            "stateful": {path: deepcopy(part.state_dict()) for path, part in asked.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to what ``state_dict`` returned; warns of parts that are no longer there."""
        for path, value in _known(state["stateful"], self._stateful):
            self._stateful[path].load_state_dict(value)
        changed = dict(_known(state["changed"], self._watched))
        for path, part in self._watched.items():
            part.go_back(changed.get(path))
        for path, value in _known(state["generators"], self._generators):
            set_generator(self._generators[path], value)

    def unsaved(self) -> list[str]:
        """Returns the paths of what has changed, may be random, and is in no state."""
        return [
            f"{path}.{name}".strip(".")
            for path, part in self._watched.items()
            for name in part.unsaved()
        ]


def _known(saved: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the states of parts that the loader has."""
    for path, value in saved.items():
        if path in own:
            yield path, value
            continue
        warnings.warn(
            f"EpochBatches: the batches have no {path} any more, of which there is a state: they "
            "go on without it",
            stacklevel=4,
        )


def _refuse_persistent(path: str, loader: DataLoader[Any]) -> None:
    if loader.persistent_workers:
        raise ValueError(
            "EpochBatches: persistent_workers of a DataLoader must be False, as its processes draw "
            "on from epoch to epoch, where no checkpoint finds what they have drawn; got True"
            f"{path and f' in {path}'}. Batches with state_dict and load_state_dict, such as "
            "torchdata's StatefulDataLoader, are taken as they are"
        )
