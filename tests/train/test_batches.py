"""Batches that know their place, and what is moved to a device."""

import random
from collections import OrderedDict, namedtuple
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from trm_fast.train import Batches, EpochBatches, RepeatedBatches
from trm_fast.train.batches import iterator_of, next_batches, to_device
from trm_fast.train.generators import fork_rng, generators, seed_everything, set_generators

CPU = torch.device("cpu")


def loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(10)), 3, shuffle=True, **options)


def first(batches: RepeatedBatches, count: int) -> list[list[int]]:
    return [batch[0].tolist() for batch, _ in zip(batches, range(count), strict=False)]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("taken", range(10))
def test_after_any_number_of_batches_the_next_ones_are_the_same(taken, own):
    def make() -> RepeatedBatches:
        generator = torch.Generator().manual_seed(5) if own else None
        return RepeatedBatches(loader(generator=generator))

    torch.manual_seed(0)
    wanted = first(make(), 13)
    torch.manual_seed(0)
    batches = make()
    iterator = iter(batches)
    assert [next(iterator)[0].tolist() for _ in range(taken)] == wanted[:taken]
    state, now = batches.state_dict(), torch.get_rng_state()
    again = make()
    torch.manual_seed(1)
    again.load_state_dict(state)
    torch.set_rng_state(now)
    # The first process draws epochs that begin later from its generator, as the other one does.
    rest = iter(again)
    assert [next(rest)[0].tolist() for _ in range(13 - taken)] == wanted[taken:]


def test_every_epoch_has_all_examples_in_an_order_of_its_own():
    torch.manual_seed(0)
    batches = first(RepeatedBatches(loader()), 12)
    epochs = [[*chain(*batches[start : start + 4])] for start in (0, 4, 8)]
    assert all(sorted(epoch) == [*range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_it_ends_after_its_epochs_also_when_taken_up():
    batches = RepeatedBatches([1, 2, 3], epochs=2)
    assert list(batches) == [1, 2, 3, 1, 2, 3]
    batches = RepeatedBatches([1, 2, 3], epochs=2)
    iterator = iter(batches)
    for _ in range(4):
        next(iterator)
    assert batches.describe() == "epoch 1, batch 0"
    other = RepeatedBatches([1, 2, 3], epochs=2)
    other.load_state_dict(batches.state_dict())
    assert list(other) == [2, 3]


def test_a_sampler_is_told_the_epoch():
    data = TensorDataset(torch.arange(12))
    parts = []
    for rank in range(2):
        sampler = DistributedSampler(data, 2, rank, shuffle=True)
        parts.append(first(RepeatedBatches(DataLoader(data, 3, sampler=sampler)), 4))
    epochs = [[*chain(*parts[0][i : i + 2], *parts[1][i : i + 2])] for i in (0, 2)]
    assert all(sorted(epoch) == [*range(12)] for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_reading_again_leaves_all_generators_as_they_are():
    class Draws:
        def __iter__(self) -> Any:
            return iter([random.random(), np.random.rand(), float(torch.rand(()))])

    batches = RepeatedBatches(Draws())
    next(iter(batches))
    _ = random.random(), np.random.rand(), torch.rand(())  # what the run draws itself
    before = generators(CPU)
    other = RepeatedBatches(Draws())
    other.load_state_dict(batches.state_dict())
    next(iter(other))
    assert all(torch.equal(value, before[name]) for name, value in generators(CPU).items()
               if not name.endswith("spare"))  # fmt: skip


def test_without_any_batch_there_is_one_line():
    with pytest.raises(ValueError, match=r"batches must give at least one; got none from \[\]"):
        next(iter(RepeatedBatches([])))


def test_what_knows_its_place_is_recognised():
    assert isinstance(RepeatedBatches([]), Batches)
    assert not isinstance(loader(), Batches) and not isinstance([1], Batches)


def test_tensors_are_found_in_mappings_lists_and_tuples():
    pair = namedtuple("pair", ["a", "b"])
    tensor = torch.ones(2)
    batch = OrderedDict(x=tensor, y=[tensor, 3], z=(tensor, "s"), w=pair(tensor, None))
    meta = to_device(batch, torch.device("meta"))
    found = [meta["x"], meta["y"][0], meta["z"][0], meta["w"].a]
    assert all(value.is_meta for value in found)
    assert (meta["y"][1], meta["z"][1], meta["w"].b) == (3, "s", None)
    assert (type(meta["y"]), type(meta["z"]), type(meta["w"])) == (list, tuple, pair)
    assert to_device(3, CPU) == 3


def test_batches_are_taken_with_their_names():
    batches = RepeatedBatches([torch.tensor(i) for i in range(3)], epochs=1)
    iterator = iter(batches)
    taken, names = next_batches(iterator, batches, 2, CPU)
    assert ([int(i) for i in taken], names) == ([0, 1], ", epoch 0, batch 0, epoch 0, batch 1")
    assert [int(i) for i in next_batches(iterator, batches, 2, CPU)[0]] == [2]
    assert next_batches(iterator, batches, 2, CPU) == ([], "")
    assert next_batches(iter([1, 2]), object(), 1, CPU) == ([1], "")


def test_generators_go_to_tensors_and_back():
    def draws() -> list[float]:
        return [
            random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(),
            float(torch.rand(())), float(torch.randn(())),
        ]  # fmt: skip

    with fork_rng(CPU):
        seed_everything(2**33 + 1)
        draws()  # leaves the second of two Gaussians to be used, in Python and in NumPy
        state = {name: value.clone() for name, value in generators(CPU).items()}
        wanted = draws()
        seed_everything(0)
        assert draws() != wanted
        set_generators(state, CPU)
        assert draws() == wanted


def test_a_fork_gives_them_back_also_after_an_error():
    before = (random.getstate(), np.random.get_state()[2], torch.get_rng_state())
    with pytest.raises(KeyError), fork_rng(CPU):
        seed_everything(3)
        raise KeyError
    after = (random.getstate(), np.random.get_state()[2], torch.get_rng_state())
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


# Epochs


class NoLength:
    """An iterable that does not say how many there are."""

    def __iter__(self) -> Any:
        return iter([1, 2, 3])


class Items:
    """Is iterated over by its items, and has no ``__iter__``."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        return [1, 2, 3][index]


@pytest.mark.parametrize("source", [[1, 2, 3], Items(), NoLength(), lambda epoch: [1, 2, 3]])
def test_what_is_accumulated_ends_with_its_epoch(source):
    batches = EpochBatches(source, epochs=2)
    iterator, found, epochs = iterator_of(batches), [], []
    while batches.completed < 2 or (found and found[-1]):
        found.append(next_batches(iterator, batches, 2, CPU)[0])
        epochs.append(batches.completed)
    assert [part for part in found if part] == [[1, 2], [3], [1, 2], [3]]
    assert sorted(epochs) == epochs
    # Where the length is known, the last batch of an epoch ends it.
    if not isinstance(source, NoLength):
        assert epochs[:4] == [0, 1, 1, 2]


def test_what_is_neither_iterated_over_nor_called_is_refused():
    with pytest.raises(TypeError, match=r"source must be something to iterate over, .* got int"):
        EpochBatches(3)


def test_an_epoch_may_be_made_for_its_number():
    assert list(EpochBatches(lambda epoch: [epoch] * (epoch + 1), epochs=3)) == [0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("taken", range(9))
def test_with_a_seed_everything_random_follows_from_it_and_the_epoch(taken):
    def draws(batches: EpochBatches, count: int) -> list[Any]:
        # What is drawn beside, as by dropout, and the order.
        return [(batch[0].tolist(), float(torch.rand(())), random.random())
                for _, batch in zip(range(count), batches, strict=False)]  # fmt: skip

    torch.manual_seed(0)
    wanted = draws(EpochBatches(loader(), seed=3), 12)
    torch.manual_seed(1)
    batches = EpochBatches(loader(), seed=3)
    found = draws(batches, taken)
    state, now = batches.state_dict(), generators(CPU)
    seed_everything(7)
    other = EpochBatches(loader(), seed=8)
    other.load_state_dict(state)
    set_generators(now, CPU)
    assert found + draws(other, 12 - taken) == wanted
    assert draws(EpochBatches(loader(), seed=4), 12) != wanted


class Rotated:
    """A source with a state: each epoch goes on from the order of the last one."""

    def __init__(self) -> None:
        self.order = [1, 2, 3]

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        self.order = [*self.order[1:], self.order[0]]
        return iter(self.order)

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = state["order"]


@pytest.mark.parametrize("taken", range(9))
def test_a_source_with_a_state_is_taken_up(taken):
    wanted = list(EpochBatches(Rotated(), epochs=4))
    assert wanted == [2, 3, 1, 3, 1, 2, 1, 2, 3, 2, 3, 1]
    batches = EpochBatches(Rotated(), epochs=4)
    iterator = iter(batches)
    assert [next(iterator) for _ in range(taken)] == wanted[:taken]
    other = EpochBatches(Rotated(), epochs=4)
    other.load_state_dict(batches.state_dict())
    assert list(other) == wanted[taken:]


def test_repeated_batches_are_epochs():
    assert RepeatedBatches is EpochBatches
