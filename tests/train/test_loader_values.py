"""What the objects of a loader may hold and change: saved and taken back, or told by a warning."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from trm_fast.train import EpochBatches
from trm_fast.train._loader_parts import _MOST
from trm_fast.train._loader_values import MOST, UnsavableError, decoded, encoded


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 10**30, 0.5, "text", [1, [2.0, "a"]], (1, 2), {"a": {1: None}},
        np.float32(0.1), np.int8(-3), np.bool_(True), np.arange(6).reshape(2, 3)[:, ::2],
        np.float16([1, 2]), torch.arange(4), torch.ones(2, dtype=torch.bfloat16),
    ],
    ids=repr,
)  # fmt: skip
def test_a_value_comes_back_with_its_kind(value):
    found = decoded(encoded(value))
    assert type(found) is type(value)
    if isinstance(value, torch.Tensor):
        assert found.dtype == value.dtype and torch.equal(found, value)
    elif isinstance(value, (np.ndarray, np.generic)):
        assert found.dtype == value.dtype and np.array_equal(found, value)
    else:
        assert found == value


@pytest.mark.parametrize(
    "value",
    [
        {1, 2}, b"bytes", np.array(["a", "b"]), np.array([None], object), np.zeros(2, ">i4"),
        np.datetime64("2020-01-01"), torch.eye(2).to_sparse(), torch.zeros(2, device="meta"),
        torch.nn.Parameter(torch.zeros(2)), ["x" * (MOST // 4)] * 5, torch.zeros(MOST // 4 + 1),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_a_checkpoint_cannot_hold_is_refused(value):
    with pytest.raises(UnsavableError):
        encoded(value)


class Holding(Dataset):
    """Changes what it holds with the first example of an epoch."""

    def __init__(self, held: Any, change: Any) -> None:
        self.held, self.change = held, change

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        if index == 0:
            self.change(self.held)
        return index


def write(held: Any) -> None:
    held[len(held) // 2 + 1] += 1


def resumed(held: Any, change: Any, copy: Any) -> Any:
    """What a data set holds after an epoch, a checkpoint and a resume."""
    first = EpochBatches(DataLoader(Holding(copy(held), change)), epochs=2)
    rows = iter(first)
    next(rows), next(rows), next(rows)
    second = EpochBatches(DataLoader(Holding(copy(held), change)), epochs=2)
    second.load_state_dict(first.state_dict())
    next(iter(second))
    return second.source.dataset.held


def test_one_changed_number_of_a_long_array_comes_back():
    found = resumed(np.zeros(5001), write, np.copy)
    assert found.sum() == 2 and found[2501] == 2
    found = resumed(torch.zeros(5001), write, torch.clone)
    assert found.sum() == 2 and found[2501] == 2


@pytest.mark.parametrize("held", [np.array(["a", "b", "c"]), np.array([{}, 1, None], object)])
def test_an_array_that_cannot_be_saved_and_changes_is_told(held):
    def turn(held: Any) -> None:
        held[:] = np.roll(held, 1)

    batches = EpochBatches(DataLoader(Holding(held, turn)), epochs=2)
    list(batches)
    with pytest.warns(UserWarning, match=r"dataset\.held"):
        batches.state_dict()


def test_a_data_set_may_hold_a_sparse_tensor():
    data = Holding(torch.eye(3).to_sparse(), lambda held: None)
    assert len(list(EpochBatches(DataLoader(data), epochs=1))) == 2


class Knowing(Sampler):
    """Says its state, which it then shuffles in place."""

    def __init__(self) -> None:
        self.order = list(range(6))

    def __iter__(self):
        self.order.append(self.order.pop(0))
        return iter(list(self.order))

    def __len__(self) -> int:
        return 6

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = state["order"]


def test_the_state_of_a_sampler_is_that_of_the_moment():
    def make() -> EpochBatches:
        return EpochBatches(DataLoader(range(6), sampler=Knowing(), batch_size=1), epochs=2)

    first = make()
    rows = iter(first)
    next(rows), next(rows)
    second = make()
    second.load_state_dict(first.state_dict())
    assert [int(row) for row in second] == [int(row) for row in rows]


def test_a_search_that_ends_before_all_is_seen_says_so():
    data = Holding([[[] for _ in range(900)] for _ in range(_MOST // 900 + 1)], lambda held: None)
    with pytest.warns(UserWarning, match=f"only the first {_MOST} objects"):
        EpochBatches(DataLoader(data))
