"""A loader's own randomness: resumed anywhere, it gives the batches of one that was left alone."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from trm_fast.train import Callback, EpochBatches, Trainer, TrainerConfig
from trm_fast.train.batches import iterator_of, next_batches
from trm_fast.train.checkpoints.state import dumps, flatten, loads, unflatten
from trm_fast.train.generators import generators, set_generators

from ..interruptions import Interruption
from .runs import differences, function_run, result

CPU = torch.device("cpu")
SIZE, BATCH, BATCHES = 10, 4, 8  # two epochs and two batches of the third
GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "numpy": lambda: np.random.default_rng(1),
    "numpy philox": lambda: np.random.Generator(np.random.Philox(1)),
    "numpy legacy": lambda: np.random.RandomState(1),
    "python": lambda: random.Random(1),
}
GLOBAL = random.Random(1)


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return float(generator.random() if hasattr(generator, "random") else generator.rand())


class Noisy(Dataset):
    """Draws from its own generator for each example."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> float:
        return index + draw(self.generator)


class ByGlobal(Noisy):
    def __init__(self) -> None:
        pass

    def __getitem__(self, index: int) -> float:
        return index + GLOBAL.random()


class ByClass(Noisy):
    generator = random.Random(1)

    def __init__(self) -> None:
        pass


class Order:
    """A sampler that draws each order from its own generator."""

    def __init__(self, generator: Any, size: int = 1) -> None:
        self.kept = {"generators": [generator]}
        self.size = size

    def __len__(self) -> int:
        return -(-SIZE // self.size)

    def __iter__(self) -> Iterator[Any]:
        keys = {i: draw(self.kept["generators"][0]) for i in range(SIZE)}
        order = sorted(keys, key=keys.__getitem__)
        if self.size == 1:
            return iter(order)
        return iter([order[i : i + self.size] for i in range(0, SIZE, self.size)])


class Collate:
    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __call__(self, items: list[Any]) -> Any:
        return default_collate(items), draw(self.generator)


def closure(generator: Any) -> Any:
    return lambda items: (default_collate(items), draw(generator))


def given(generator: Any, items: list[Any]) -> Any:
    return default_collate(items), draw(generator)


class Plain:
    """Something to iterate over without a length."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[float]:
        for _ in range(3):
            yield draw(self.generator)


DATA = list(range(SIZE))
HOLDERS: dict[str, Callable[[Any], Any]] = {
    "data set": lambda g: DataLoader(Noisy(g), BATCH),
    "data set in others": lambda g: DataLoader(
        ConcatDataset([Subset(Noisy(g), [1, 2, 3]), TensorDataset(torch.arange(2.0))]), 2,
        collate_fn=list,
    ),
    "sampler": lambda g: DataLoader(DATA, BATCH, sampler=Order(g)),
    "batch sampler": lambda g: DataLoader(DATA, batch_sampler=Order(g, 4)),
    "collate object": lambda g: DataLoader(DATA, BATCH, collate_fn=Collate(g)),
    "collate closure": lambda g: DataLoader(DATA, BATCH, collate_fn=closure(g)),
    "collate method": lambda g: DataLoader(DATA, BATCH, collate_fn=Collate(g).__call__),
    "collate partial": lambda g: DataLoader(DATA, BATCH, collate_fn=partial(given, g)),
    "iterable": Plain,
    "function": lambda g: lambda epoch: [epoch + draw(g) for _ in range(3)],
}  # fmt: skip


class Cached:
    """A sampler that keeps the order of its first epoch."""

    def __init__(self) -> None:
        self.order: list[int] | None = None

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        if self.order is None:
            self.order = torch.randperm(SIZE).tolist()
        return iter(self.order)


class LateOrder(Cached):
    """Makes its generator when it is needed first."""

    def __init__(self) -> None:
        self.generator: Any = None

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = np.random.default_rng(3)
        return iter(self.generator.permutation(SIZE).tolist())


class InPlace(Cached):
    """Shuffles the same list, or array, again and again."""

    def __init__(self, order: Any) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        np.random.shuffle(self.order)
        return iter([int(item) for item in self.order])


class Shuffled(InPlace):
    """Batches of its own, of tensors whose order it shuffles."""

    def __init__(self) -> None:
        self.by_kind = {"a": [torch.full((2,), float(i)) for i in range(4)]}

    def __iter__(self) -> Iterator[Any]:
        random.shuffle(self.by_kind["a"])
        yield from self.by_kind["a"]

    def __len__(self) -> int:
        return 4


class Counting(IterableDataset):
    """Goes on from where the last epoch has ended, and remembers what it drew for each number."""

    def __init__(self) -> None:
        self.place = 0
        self.drawn: dict[int, float] = {}

    def __iter__(self) -> Iterator[float]:
        for _ in range(SIZE):
            self.place += 1
            seen = self.place % 7
            self.drawn.setdefault(seen, random.random())
            yield self.place + self.drawn[seen]


class Knowing(IterableDataset):
    """Says itself what its state is."""

    def __init__(self) -> None:
        self.hidden = object(), 0

    def __iter__(self) -> Iterator[int]:
        for _ in range(SIZE):
            self.hidden = self.hidden[0], self.hidden[1] + 1
            yield self.hidden[1]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.hidden[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.hidden = self.hidden[0], state["place"]


SOURCES: dict[str, Callable[[], Any]] = {
    f"{holder}, {kind}": (lambda make=make, new=new: make(new()))
    for holder, make in HOLDERS.items()
    for kind, new in GENERATORS.items()
    if kind == "torch" or holder in ("data set", "iterable")
}
SOURCES |= {
    "loader": lambda: DataLoader(DATA, BATCH, shuffle=True, generator=GENERATORS["torch"]()),
    "replacement": lambda: DataLoader(
        DATA, BATCH, sampler=RandomSampler(DATA, True, generator=GENERATORS["torch"]())
    ),
    "weighted": lambda: DataLoader(
        DATA, BATCH, sampler=WeightedRandomSampler(DATA, SIZE, generator=GENERATORS["torch"]())
    ),
    "cached": lambda: DataLoader(DATA, BATCH, sampler=Cached()),
    "late": lambda: DataLoader(DATA, BATCH, sampler=LateOrder()),
    "list in place": lambda: DataLoader(DATA, BATCH, sampler=InPlace(list(range(SIZE)))),
    "array in place": lambda: DataLoader(DATA, BATCH, sampler=InPlace(np.arange(SIZE))),
    "nested in place": Shuffled,
    "counting": lambda: DataLoader(Counting(), BATCH),
    "knowing": lambda: DataLoader(Knowing(), BATCH),
    "by global": lambda: (GLOBAL.seed(1), DataLoader(ByGlobal(), BATCH))[1],
    "by class": lambda: (ByClass.generator.seed(1), DataLoader(ByClass(), BATCH))[1],
}
each_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)


class Run:
    """Takes batches as a trainer does, and draws from torch's generator between them."""

    def __init__(self, make: Callable[[], Any], state: Any = None) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.batches = EpochBatches(make())
        if state is not None:
            tensors, tree = state
            place, chance = unflatten(loads(tree, "tree"), tensors)
            self.batches.load_state_dict(place)
            set_generators(chance, CPU)
        self.iterator = iterator_of(self.batches)

    def take(self, count: int) -> list[Any]:
        """That many calls of ``next_batches``, each with one batch or the end of an epoch."""
        found = []
        for _ in range(count):
            found.append(next_batches(self.iterator, self.batches, 1, CPU)[0])
            torch.rand(3)
        return found

    def state(self) -> Any:
        tensors, tree = flatten([self.batches.state_dict(), generators(CPU)], "run")
        return {name: tensor.clone() for name, tensor in tensors.items()}, dumps(tree)


def same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)  # tensors of a few numbers


@each_source
def test_a_loader_goes_on_from_anywhere(make):
    whole = Run(make).take(BATCHES)
    for taken in range(BATCHES):
        first = Run(make)
        found = first.take(taken)
        state = first.state()
        assert same(found + Run(make, state).take(BATCHES - taken), whole), taken


@pytest.mark.parametrize("name", ["data set, torch", "late", "counting", "loader"])
def test_a_loader_that_is_left_goes_on_in_the_same_process(name):
    whole = Run(SOURCES[name]).take(BATCHES)
    run = Run(SOURCES[name])
    found = []
    for _ in range(BATCHES):
        found += run.take(1)
        run.iterator = iterator_of(run.batches)
    assert same(found, whole)


class Examples(Noisy):
    def __getitem__(self, index: int) -> Any:
        return torch.full((6,), super().__getitem__(index)), index % 3


@pytest.mark.parametrize("step", [2, 3, 5, 6, 8])  # three batches are an epoch
def test_a_run_is_taken_up_with_the_generators_of_its_loader(step, tmp_path):
    def run(out: Any, *callbacks: Any) -> Trainer:
        data = Examples(np.random.default_rng(1))
        return function_run(out, callbacks, batches=DataLoader(data, 4, sampler=Cached()), steps=9)

    run(tmp_path / "whole").fit()
    run(tmp_path / "parts", Interruption("signal", step)).fit()
    run(tmp_path / "parts").fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


class ByWorkers(Noisy):
    """Draws from its own generator, and from what its process shares."""

    def __getitem__(self, index: int) -> float:
        return super().__getitem__(index) + random.random() + float(torch.rand(()))


@pytest.mark.parametrize("taken", [1, 2, 4])  # in an epoch, at its end, in the second one
def test_a_loader_with_processes_goes_on(taken):
    def make() -> Any:
        data = ByWorkers(np.random.default_rng(1))
        return DataLoader(data, 6, sampler=Order(random.Random(1)), num_workers=2)

    whole = Run(make).take(5)
    first = Run(make)
    found = first.take(taken)
    assert same(found + Run(make, first.state()).take(5 - taken), whole)


def persistent() -> DataLoader:
    return DataLoader(DATA, 6, num_workers=2, persistent_workers=True)


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: persistent(), "got True. "),
        (lambda: WithLoader(), "got True in loader. "),
    ],
)
def test_processes_that_draw_on_from_epoch_to_epoch_are_refused(make, where):
    source = make()
    with pytest.raises(ValueError, match=f"persistent_workers .* must be False, .*{where}"):
        trainer(source)


class WithLoader(Plain):
    def __init__(self) -> None:
        self.loader = persistent()


def trainer(source: Any, **options: Any) -> Trainer:
    model = torch.nn.Linear(1, 1)
    return Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), source,
        lambda model, batch: model.weight.sum(), TrainerConfig(steps=2), device="cpu", **options,
    )  # fmt: skip


def test_a_generator_without_a_state_is_refused_when_the_trainer_is_made():
    source = HOLDERS["data set"](random.SystemRandom())
    with pytest.raises(ValueError, match=r"got SystemRandom as dataset\.generator"):
        trainer(source)


class Cache(Noisy):
    def __init__(self) -> None:
        self.cache: dict[int, Any] = {}
        self.file: Any = None

    def __getitem__(self, index: int) -> float:
        self.file = self.file or open(__file__)
        self.cache[index] = [object()]
        return 0.0


def test_what_has_changed_and_cannot_be_saved_is_told_of_once():
    source = Cache()
    batches = EpochBatches(DataLoader(source, BATCH))
    iterator = iter(batches)
    batches.state_dict()
    next(iterator)
    with pytest.warns(UserWarning, match="dataset.cache.. has changed and is not saved"):
        batches.state_dict()
    batches.state_dict()
    source.file.close()


def test_parts_that_are_no_longer_there_are_told_of():
    state = EpochBatches(HOLDERS["sampler"](random.Random(1))).state_dict()
    with pytest.warns(UserWarning, match=r"have no sampler\.kept\.generators\.0 any more"):
        EpochBatches(DataLoader(DATA, BATCH)).load_state_dict(state)


class Shifting(Cached, Callback):
    """A sampler that is a callback as well."""

    def __init__(self) -> None:
        self.first = 0

    def __iter__(self) -> Iterator[int]:
        return iter([(self.first + i) % SIZE for i in range(SIZE)])

    def on_step(self, run: Any, step: Any) -> None:
        self.first += 1

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first = state["first"]


@pytest.mark.parametrize("step", [2, 3, 5])  # three batches are an epoch
def test_a_sampler_may_be_a_callback(step, tmp_path):
    def run(out: Any, *callbacks: Any) -> Trainer:
        sampler = Shifting()
        loader = DataLoader(Examples(random.Random(1)), 4, sampler=sampler)
        return function_run(out, (sampler, *callbacks), batches=loader, steps=9)

    run(tmp_path / "whole").fit()
    run(tmp_path / "parts", Interruption("signal", step)).fit()
    run(tmp_path / "parts").fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


def test_the_generators_of_the_process_are_not_those_of_a_loader():
    shared = [torch.default_generator, np.random.mtrand._rand, random.seed.__self__]
    state = EpochBatches(Plain(shared)).state_dict()
    assert state["now"] == {"generators": {}, "changed": {}, "stateful": {}}
