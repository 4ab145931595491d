"""The questions that pages ask about the memory of tensors, against lists of addresses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trm_fast.ops._tensors import in_order_of, is_dense, overlap, same_order


def addresses(tensor: Tensor) -> list[int]:
    """Where each element lies, in the order of indices."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    places = torch.arange(size).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    start = tensor.untyped_storage().data_ptr()
    return [start + tensor.element_size() * place for place in places.flatten().tolist()]


def rank(values: list[int]) -> list[int]:
    order = sorted(values)
    return [order.index(value) for value in values]


@st.composite
def views(draw: st.DrawFn, memory: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Any strided view, also with gaps, overlaps and stride 0."""
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    strides = tuple(draw(st.integers(0, 12)) for _ in shape)
    return memory.as_strided(shape, strides, draw(st.integers(0, 20)))


@st.composite
def dense_views(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    order = draw(st.permutations(range(len(shape))))
    memory = torch.arange(64.0)[: torch.Size(shape).numel()]
    turned = memory.view([shape[d] for d in order])
    return turned.permute([order.index(d) for d in range(len(shape))])


MEMORY = torch.arange(128.0)


@given(views(MEMORY))
def test_is_dense_means_every_place_of_one_piece_once(view):
    places = sorted(addresses(view))
    piece = list(range(places[0], places[0] + 4 * len(places), 4)) if places else []
    assert is_dense(view) == (places == piece)


@pytest.mark.parametrize("make", [
    lambda: torch.zeros(()), lambda: torch.zeros(0, 3), lambda: torch.zeros(2, 3).t(),
    lambda: torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    lambda: torch.zeros(1, 7)[:, 3:4],
    lambda: torch.zeros(9)[2:5], lambda: torch.zeros(4, 1, 3).transpose(0, 2),
])  # fmt: skip
def test_dense(make):
    assert is_dense(make())


@pytest.mark.parametrize("make", [
    lambda: torch.zeros(2, 3)[:, :2], lambda: torch.zeros(6)[::2], lambda: torch.zeros(1).expand(3),
    lambda: torch.zeros(3, 1).expand(3, 3), lambda: torch.zeros(4).as_strided((2, 2), (1, 1)),
])  # fmt: skip
def test_not_dense(make):
    assert not is_dense(make())


@given(st.data())
def test_same_order_of_dense_tensors_means_equal_ranks_of_addresses(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    one, other = data.draw(dense_views(shape)), data.draw(dense_views(shape))
    assert same_order(one, other) == (rank(addresses(one)) == rank(addresses(other)))


def test_same_order_tells_gaps_from_none():
    assert not same_order(torch.zeros(4, 6)[:, :3], torch.zeros(4, 3))


@given(st.data())
def test_in_order_of_keeps_the_values_in_the_order_of_a_dense_other(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    tensor = data.draw(views(MEMORY, shape))
    other = data.draw(dense_views(shape))
    result = in_order_of(tensor, other)
    assert torch.equal(result, tensor)
    assert is_dense(result) and same_order(result, other)


@given(st.data())
def test_in_order_of_is_contiguous_where_the_other_has_gaps(data):
    shape = tuple(data.draw(st.lists(st.integers(2, 3), min_size=1, max_size=3)))
    tensor = data.draw(dense_views(shape))
    other = torch.zeros([2 * n for n in shape])[tuple(slice(n) for n in shape)][..., ::1]
    other = other if not other.is_contiguous() else torch.zeros(2 * shape[0])[::2]
    result = in_order_of(tensor, other)
    assert torch.equal(result, tensor) and result.is_contiguous()


def test_in_order_of_copies_nothing_that_lies_right():
    tensor = torch.zeros(2, 3).t()
    assert in_order_of(tensor, torch.zeros(2, 3).t()) is tensor


def test_in_order_of_keeps_the_dtype():
    result = in_order_of(torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(2, 3).t())
    assert result.dtype == torch.bfloat16 and result.stride() == (1, 3)


def shares(written: list[Tensor], read: list[Tensor]) -> bool:
    """Whether a place of a written tensor is met again; read tensors may share among themselves."""
    taken = [place for tensor in written for place in addresses(tensor)]
    met = {place for tensor in read for place in addresses(tensor)}
    return len(taken) != len(set(taken)) or bool(met & {*taken})


@st.composite
def pieces(draw: st.DrawFn) -> Tensor:
    start = draw(st.integers(0, 120))
    return MEMORY[start : start + draw(st.integers(0, 12))]


@given(st.lists(pieces(), max_size=4), st.lists(pieces(), max_size=4))
def test_overlap_of_pieces_means_a_shared_place(written, read):
    assert overlap(written, read) == shares(written, read)


@given(st.lists(views(MEMORY), min_size=1, max_size=3), st.lists(views(MEMORY), max_size=2))
def test_overlap_finds_every_shared_place_of_strided_views(written, read):
    if shares(written, read):
        assert overlap(written, read)


def test_interleaved_columns_do_not_overlap():
    matrix = torch.zeros(4, 6)
    assert not overlap([matrix[:, :3], matrix[:, 3:]])


def test_a_tensor_that_repeats_an_element_overlaps_itself():
    assert overlap([torch.zeros(1).expand(3)])


def test_neighbours_do_not_overlap():
    memory = torch.zeros(10)
    assert not overlap([memory[:5], memory[5:]])


def test_read_tensors_may_share():
    read = torch.zeros(10)
    assert not overlap([torch.zeros(3)], [read, read[2:5], read])


def test_a_written_tensor_may_not_share_with_a_read_one_that_began_long_before():
    memory = torch.zeros(20)
    assert overlap([memory[10:12]], [memory, memory[1:3], memory[4:5]])


def test_empty_tensors_never_overlap():
    empty = torch.zeros(10)[5:5]
    assert not overlap([empty, empty, torch.zeros(10)], [empty])
