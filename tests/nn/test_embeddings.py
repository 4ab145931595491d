"""Embeddings and heads: values, gradients, and the table of which a batch sees a few rows."""

import copy
import io

import pytest
import torch

from trm_fast.nn import (
    LearnedPositions,
    PooledHalt,
    QTokenHalt,
    SparsePuzzleEmbedding,
    TokenEmbedding,
)
from trm_fast.optim import SparseSignSGD

from .checks import DOUBLE, SINGLE


def filled(puzzles: int = 6, width: int = 4) -> SparsePuzzleEmbedding:
    layer = SparsePuzzleEmbedding(puzzles, width)
    layer.table.copy_(torch.randn(puzzles, width, generator=torch.Generator().manual_seed(0)))
    return layer


def test_tokens_are_looked_up_and_start_with_variance_one_by_width():
    torch.manual_seed(0)
    layer = TokenEmbedding(2000, 64)
    ids = torch.tensor([[3, 0], [1999, 3]])
    assert torch.equal(layer(ids), layer.table[ids])
    assert torch.equal(layer(ids, torch.bfloat16), layer.table[ids].bfloat16())
    assert abs(layer.table.std().item() * 8 - 1) < 4 / (2 * 2000 * 64) ** 0.5


def test_gradients_of_equal_tokens_are_added_up_in_the_dtype_of_the_table():
    layer, ids = TokenEmbedding(2, 1), torch.ones(1, 1000, dtype=torch.int32)
    layer(ids, torch.bfloat16).sum().backward()
    assert layer.table.grad[1].item() == 1000  # in bfloat16 the sum would stop at 256


def test_learned_positions_are_added_and_scaled():
    layer, x = LearnedPositions(3, 4).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    difference = layer(x) - (x + layer.table) / 2**0.5
    assert difference.abs().max() <= 4 * DOUBLE * x.abs().max()


def test_puzzle_rows_are_those_of_the_table():
    layer, ids = filled(), torch.tensor([5, 0, 5])
    assert torch.equal(layer(ids), layer.table[ids])
    assert layer(ids).requires_grad and not layer.eval()(ids).requires_grad
    assert not [*layer.parameters()] and [*layer.state_dict()] == ["table"]
    assert SparsePuzzleEmbedding(2, 3).table.abs().max() == 0


def test_the_table_has_the_gradient_of_the_rows_as_a_sparse_one():
    layer, ids = filled(), torch.tensor([5, 0, 5])
    weights = torch.arange(12.0).view(3, 4)
    (layer(ids) * weights).sum().backward()
    truth = torch.zeros(6, 4).index_add_(0, ids, weights)
    assert layer.table.grad.is_sparse and torch.equal(layer.table.grad.to_dense(), truth)
    # A second pass, of other ids, adds to it.
    other = torch.tensor([1, 5, 0])
    (layer(other) * weights).sum().backward()
    assert torch.equal(layer.table.grad.to_dense(), truth.index_add_(0, other, weights))


def test_each_call_has_its_gradient_whenever_its_backward_pass_comes():
    layer = filled()
    first, second = layer(torch.tensor([1, 2])), layer(torch.tensor([2, 3]))
    (first.sum() + 10 * second.sum()).backward()
    rows = torch.tensor([0.0, 1, 11, 10, 0, 0])
    assert torch.equal(layer.table.grad.to_dense(), rows[:, None].expand(6, 4))


def test_a_call_does_not_look_at_ids_that_change_afterwards():
    layer, ids = filled(), torch.tensor([1, 2])
    rows = layer(ids)
    ids.fill_(5)
    rows.sum().backward()
    assert layer.table.grad.to_dense()[5].abs().max() == 0


def test_sign_descent_steps_the_rows_of_the_batch_alone():
    layer, ids = filled(), torch.tensor([5, 0, 5])
    before = layer.table.clone()
    optimizer = SparseSignSGD([layer.table], lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (layer(ids) * torch.tensor([[1.0], [-2.0], [2.0]])).sum().backward()
        optimizer.step()
    truth = before.clone()
    for _ in range(2):
        truth[[0, 5]] = truth[[0, 5]] * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[-1.0], [1.0]])
    assert torch.equal(layer.table[1:5], before[1:5])
    assert (layer.table - truth).abs().max() <= 6 * SINGLE * truth.abs().max()


def test_batches_may_differ_in_size():
    layer = filled()
    for ids in (torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 4, 4])):
        layer(ids).sum().backward()
    counts = torch.tensor([0.0, 1, 1, 1, 3, 0])
    assert torch.equal(layer.table.grad.to_dense(), counts[:, None].expand(6, 4))


def test_copies_have_gradients_of_their_own():
    layer, ids = filled(), torch.tensor([1, 2])
    layer.prepare(2)
    layer(ids)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(layer), torch.load(saved, weights_only=False)):
        copied.prepare(2)
        for rows in (copied(ids), copied._leaves[2][1]):
            rows.sum().backward()
            assert layer.table.grad is None and copied.table.grad is not None
            copied.table.grad = None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_call_has_the_same_gradient(compiled):
    torch._dynamo.reset()
    layer, counts = filled(), torch.tensor([0.0, 1, 2, 1, 0, 2])
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    for ids in (torch.tensor([1, 2]), torch.tensor([2, 3]), torch.tensor([5, 5])):
        layer.prepare(2)
        run(ids).sum().backward()
    assert torch.equal(layer.table.grad.to_dense(), counts[:, None].expand(6, 4))


def test_the_leaf_of_compiled_calls_follows_batch_size_and_dtype():
    layer = filled()
    leaves = []
    for batch in (2, 3, 2):
        layer.prepare(batch)
        leaves.append(layer._leaves[batch][1])
    assert leaves[0] is leaves[2] and leaves[1].shape == (3, 4)
    layer.double().prepare(3)
    assert layer._leaves[3][1].dtype == layer(torch.tensor([1])).dtype == torch.float64


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (TokenEmbedding(5, 2), "TokenEmbedding"),
        (SparsePuzzleEmbedding(5, 2), "SparsePuzzleEmbedding"),
    ],
)
@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_id_out_of_range_is_named_with_its_place(layer, name, wrong):
    with pytest.raises(ValueError) as error:
        layer(torch.tensor([0, 4, wrong, 9]))
    assert str(error.value) == f"{name}: ids must be in [0, 5); got {wrong} at [2]"
    with pytest.raises(TypeError) as error:
        layer(torch.zeros(2))
    assert str(error.value) == f"{name}: ids must be int64 or int32; got torch.float32"


def test_the_halting_token_is_the_first():
    head, y = QTokenHalt(4), torch.randn(3, 5, 4)
    assert torch.equal(head(y), torch.full((3, 2), -5.0))
    head.weight.data.normal_()
    truth = y[:, 0].double() @ head.weight.double().T - 5
    assert (head(y) - truth).abs().max() <= 6 * SINGLE * truth.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(y.bfloat16()), head(y.bfloat16().float()))
    assert head(y.bfloat16()).dtype == torch.float32


def test_the_pooled_head_reads_the_mean_of_real_tokens():
    head, y = PooledHalt(4), torch.randn(3, 5, 4)
    head.weight.data.normal_()
    padding = torch.ones(3, 5, dtype=torch.bool)
    padding[1, 2:], padding[2] = False, False
    means = torch.stack((y[0].mean(0), y[1, :2].mean(0), torch.zeros(4))).double()
    truth = means @ head.weight.double().T - 5
    y[2] = torch.nan  # what is padding does not matter
    assert (head(y, padding) - truth).abs().max() <= 12 * SINGLE * truth.abs().max()
    assert torch.equal(head(y[:1]), head(y[:1], padding[:1]))
