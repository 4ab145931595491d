"""Embeddings: of tokens, of positions, and of puzzles, of which a batch sees a few rows."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from trm_fast.nn._init import check_sizes, truncated_normal_


class TokenEmbedding(nn.Module):
    """A table of vectors, which starts with variance 1 / width.

    Rows are looked up in the dtype of the table and then cast, so that the gradients of equal
    tokens are added up in that dtype.

    Args:
        vocabulary: number of ids.
        width: features of each.

    Raises:
        ValueError: a size is not a whole number >= 1.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        check_sizes("TokenEmbedding", vocabulary=vocabulary, width=width)
        self.vocabulary, self.width = vocabulary, width
        self.table = nn.Parameter(torch.empty(vocabulary, width))
        truncated_normal_(self.table, width**-0.5)

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the vectors of ids.

        Args:
            ids: [...], int64 or int32, each in [0, vocabulary).
            dtype: of the result; None means that of the table.

        Returns:
            [..., width].

        Raises:
            ValueError: on the CPU, an id is out of range.
        """
        check_ids("TokenEmbedding", "ids", ids, self.vocabulary)
        return embedding(ids, self.table).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.vocabulary}, {self.width}"


class LearnedPositions(nn.Module):
    """Adds a trained vector to each position: ``(x + table) / sqrt(2)``.

    Args:
        length: number of positions.
        width: features of each.

    Raises:
        ValueError: a size is not a whole number >= 1.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        check_sizes("LearnedPositions", length=length, width=width)
        self.table = nn.Parameter(torch.empty(length, width))
        truncated_normal_(self.table, width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum for x [batch, length, width], in its dtype."""
        out: Tensor = 0.5**0.5 * (x + self.table.to(x.dtype))
        return out


class SparsePuzzleEmbedding(nn.Module):
    """A table of vectors, one for each puzzle, which starts at 0 and is no parameter.

    In training the rows of a batch are a small leaf, and as soon as that has its gradient, it is
    added to ``table.grad`` as a tensor that is sparse in its rows. So the step costs what a batch
    has, however long the table is, and nothing waits for a GPU:

        optimizer = SparseSignSGD([embedding.table], lr=1e-2, weight_decay=0.1)

    steps the rows that the batches since ``optimizer.zero_grad()`` have seen, and no others. A
    compiled call writes into one leaf again and again: there, each call needs its backward pass
    before the next one, and ``prepare`` before the first.

    Args:
        puzzles: number of ids.
        width: features of each.

    Raises:
        ValueError: a size is not a whole number >= 1.
    """

    table: Tensor

    def __init__(self, puzzles: int, width: int) -> None:
        super().__init__()
        check_sizes("SparsePuzzleEmbedding", puzzles=puzzles, width=width)
        self.puzzles, self.width = puzzles, width
        self.register_buffer("table", torch.zeros(puzzles, width))
        self._leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the rows of ids [batch], int64 or int32, as [batch, width] in the table's dtype.

        Raises:
            ValueError: on the CPU, an id is out of range.
        """
        check_ids("SparsePuzzleEmbedding", "ids", ids, self.puzzles)
        found = embedding(ids, self.table)
        if not (self.training and torch.is_grad_enabled()):
            return found
        # A graph cannot make a leaf, and writes into one that is there.
        if torch.compiler.is_compiling() and ids.shape[0] in self._leaves:
            kept, rows = self._leaves[ids.shape[0]]
            with torch.no_grad():
                kept.copy_(ids)
                rows.copy_(found)
            return rows
        return self._new_leaf(ids.clone(), found)

    def prepare(self, batch: int) -> None:
        """Makes the leaf of compiled calls for a batch size, unless it is there."""
        table = self.table
        if batch in self._leaves:
            rows = self._leaves[batch][1]
            if (rows.device, rows.dtype) == (table.device, table.dtype):
                return
        with torch.inference_mode(False):
            ids = torch.zeros(batch, dtype=torch.int64, device=table.device)
            self._leaves[batch] = ids, self._new_leaf(ids, table.new_zeros(batch, self.width))

    def _new_leaf(self, ids: Tensor, rows: Tensor) -> Tensor:
        rows.requires_grad_().register_post_accumulate_grad_hook(partial(self._hand_over, ids))
        return rows

    @torch.no_grad()
    def _hand_over(self, ids: Tensor, rows: Tensor) -> None:
        """Moves the gradient of a leaf to the table."""
        if rows.grad is None:
            return
        shape = (self.puzzles, self.width)
        # Without a check of the ids, for which a GPU would be waited for.
        grad = torch.sparse_coo_tensor(ids.clone()[None], rows.grad, shape, check_invariants=False)
        rows.grad = None
        self.table.grad = grad if self.table.grad is None else self.table.grad + grad

    def __getstate__(self) -> dict[str, Any]:
        # Their hooks are for this table; a copy makes its own.
        return {**self.__dict__, "_leaves": {}}

    def extra_repr(self) -> str:
        return f"{self.puzzles}, {self.width}"


def check_ids(owner: str, name: str, ids: Tensor, count: int) -> None:
    """Raises an error that names the first id out of range; only on the CPU, where looking costs no
    wait, and not while a graph is made."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{owner}: {name} must be int64 or int32; got {ids.dtype}")
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return
    outside = (ids < 0) | (ids >= count)
    if outside.any():
        place = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{owner}: {name} must be in [0, {count}); got {ids[tuple(place)].item()} at {place}"
        )
