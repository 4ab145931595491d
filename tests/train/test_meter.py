"""Means of metrics over intervals."""

import math

import pytest
import torch

from trm_fast.train.meter import Meter

CPU = torch.device("cpu")


def test_a_mean_is_the_sum_of_sums_over_the_sum_of_counts():
    meter = Meter(CPU)
    meter.add({"a": (6.0, 3), "b": (torch.tensor(1.0), torch.tensor(2))})
    meter.add({"a": (torch.tensor(4.0), 1.0), "b": (0, 0)})
    meter.add({"b": (torch.tensor(True), 2)})
    assert meter.means() == {"a": 2.5, "b": 0.5}
    meter.clear()
    meter.add({"a": (1.0, 1)})
    assert meter.means() == {"a": 1.0}


@pytest.mark.parametrize(
    ("metrics", "got"),
    [
        ({"good": (1.0, 1), "a": 0.5}, "'a': 0.5"),
        ({"a": (1.0, 2.0, 3.0)}, "'a': (1.0, 2.0, 3.0)"),
        ({"a": (1.0, None)}, "'a': (1.0, None)"),
        ({"a": "ab"}, "'a': 'ab'"),
        ({"a": (torch.ones(2), 2)}, "'a': (tensor([1., 1.]), 2)"),
        (None, "NoneType"),
    ],
)
def test_a_metric_that_is_no_sum_and_count_is_named(metrics, got):
    meter = Meter(CPU)
    with pytest.raises(TypeError) as error:
        meter.add(metrics)
    assert str(error.value).startswith("Trainer: metrics must give for each name a pair, a sum and")
    assert str(error.value).endswith(f"; got {got}")
    assert meter.means() == {}


def test_where_nothing_was_counted_the_mean_is_nan():
    meter = Meter(CPU)
    meter.add({"a": (0.0, 0.0)})
    meter.add({})
    assert math.isnan(meter.means()["a"]) and list(meter.means()) == ["a"]


def test_sums_are_in_double_precision():
    meter = Meter(CPU)
    # In float32, 2^24 + 1 is 2^24.
    meter.add({"a": (torch.tensor(2.0**24), 1)})
    for _ in range(8):
        meter.add({"a": (torch.tensor(1.0), 0)})
    assert meter.means()["a"] == 2.0**24 + 8


def test_an_interval_goes_on_where_it_was():
    whole, part = Meter(CPU), Meter(CPU)
    for value in (0.1, 0.2):
        whole.add({"a": (value, 1), "c": (value, 3)})
        part.add({"a": (value, 1), "c": (value, 3)})
    other = Meter(CPU)
    other.load_state_dict(part.state_dict())
    for meter in (whole, other):
        meter.add({"a": (0.3, 1)})
    assert whole.means() == other.means()
    assert other.means()["a"] == pytest.approx(0.2) and part.means()["a"] == pytest.approx(0.15)


def test_no_graph_is_kept():
    meter = Meter(CPU)
    value = torch.ones((), requires_grad=True)
    meter.add({"a": (value * 2, 1)})
    assert not any(total.requires_grad for total in meter.totals.values())


class Three:
    """Three processes that have counted the same, but for names that only others have."""

    size = 3

    def __init__(self, *others: str) -> None:
        self.others = others
        self.sizes: list[tuple[int, ...]] = []

    def gather(self, keys):
        return [keys, [*keys, *self.others], keys]

    def add_up(self, tensor):
        self.sizes.append(tuple(tensor.shape))
        tensor.mul_(3)


def test_processes_are_added_up():
    meter = Meter(CPU)
    meter.add({"a": (1.0, 1)})
    meter.add({"a": (4.0, 1), "b": (6.0, 4)})
    assert meter.means(Three()) == {"a": 2.5, "b": 1.5}
    assert meter.means() == {"a": 2.5, "b": 1.5}  # the sums here are as they were


def test_what_only_other_processes_have_counted_is_exchanged_too():
    meter, world = Meter(CPU), Three("b", "c\0d")
    meter.add({"a": (1.0, 1)})
    found = meter.means(world)
    assert found["a"] == 1.0 and list(found) == ["a", "b", "c", "d"]
    # One exchange for each key, in the same order everywhere.
    assert world.sizes == [(1, 2), (1, 2), (2, 2)]
