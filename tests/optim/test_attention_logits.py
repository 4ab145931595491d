"""max_logits against the attention logits, written again head by head in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trm_fast.ops import _attention_logits as attention_logits
from trm_fast.optim.attention_logits import max_logits

from .qk_checks import DIM, EPS, randn, true_max

MASKS: dict[str, Tensor | None] = {
    "no_mask": None,
    "keys": torch.tensor([True, True, False, True, False, True, True]),
    "pairs": randn(3, 1, 5, 7, seed=3) > 0,
    "heads": randn(1, 4, 1, 7, seed=4) > 0,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("chunk", [1, 60, 1 << 24])
def test_max_logits_is_the_largest_unmasked_product(
    monkeypatch: pytest.MonkeyPatch, mask: str, kv_heads: int, causal: bool, chunk: int
) -> None:
    monkeypatch.setattr(attention_logits, "_CHUNK", chunk)
    q, k = randn(3, 4, 5, DIM, seed=1), randn(3, kv_heads, 7, DIM, seed=2)
    truth = true_max(q, k, DIM**-0.5, MASKS[mask], causal)
    # A product of DIM terms has DIM + 2 roundings, at most at the size of all terms together.
    bound = (DIM + 2) * torch.finfo(torch.float64).eps * q.abs().max() * k.abs().max() * DIM
    assert ((max_logits(q, k, mask=MASKS[mask], causal=causal) - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_max_logits_of_16_bit_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    q, k = randn(2, 4, 9, 32, seed=1).to(dtype), randn(2, 4, 9, 32, seed=2).to(dtype)
    truth = true_max(q.double(), k.double(), 0.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = max_logits(q, k, scale=0.5)
    assert found.dtype == torch.float32
    # 32 products of numbers below 4 and their sums, each rounded once.
    assert (found.double() - truth).abs().max() <= 34 * EPS * 16 * 32 * 0.5


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_chunks_of_max_logits_hold_no_more_than_their_limit(
    monkeypatch: pytest.MonkeyPatch, causal: bool
) -> None:
    sizes = []
    products = attention_logits._masked_products

    def recorded(*args: Any) -> Tensor:
        sizes.append(products(*args).numel())
        return products(*args)

    monkeypatch.setattr(attention_logits, "_CHUNK", 100)
    monkeypatch.setattr(attention_logits, "_masked_products", recorded)
    max_logits(randn(5, 2, 12, 4), randn(5, 2, 12, 4), causal=causal)
    assert max(sizes) <= 100 and len(sizes) > 5
    assert sum(sizes) <= 5 * 2 * 12 * 12


def test_additive_mask_hides_where_it_is_infinite_and_is_not_counted_in() -> None:
    q, k = randn(2, 2, 3, DIM, seed=1), randn(2, 2, 4, DIM, seed=2)
    allowed = randn(3, 4, seed=3) > 0
    mask = torch.where(allowed, 100.0, -torch.inf)
    assert torch.equal(max_logits(q, k, mask=mask), max_logits(q, k, mask=allowed))


def test_head_without_an_unmasked_pair_has_minus_infinity() -> None:
    q, k = randn(2, 2, 3, DIM), randn(2, 2, 3, DIM)
    mask = torch.tensor([True, False]).view(1, 2, 1, 1)
    assert max_logits(q, k, mask=mask).isneginf().tolist() == [False, True]


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)], ids=str)
def test_max_logits_of_nothing_is_minus_infinity(shape: tuple[int, ...]) -> None:
    assert max_logits(torch.ones(shape), torch.ones(shape)).isneginf().all()


def test_nan_shows_unless_it_is_masked() -> None:
    q, k = randn(1, 2, 3, DIM), randn(1, 2, 3, DIM)
    q[0, 1, 2, 0] = torch.nan
    hidden = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    hidden[0, 1, 2] = False
    assert max_logits(q, k).isnan().tolist() == [False, True]
    assert max_logits(q, k, mask=hidden).isfinite().all()


@pytest.mark.parametrize(
    ("q", "k", "options", "text"),
    [
        ((2, 4, 3, 8), (2, 3, 3, 8), {}, r"heads a multiple of kv_heads; got \(2, 4, 3, 8\) and"),
        ((2, 4, 3, 8), (2, 4, 3, 6), {}, "q must be"),
        ((4, 3, 8), (4, 3, 8), {}, "q must be"),
        ((2, 4, 3, 8), (2, 4, 3, 8), {"scale": -1.0}, "scale must be finite and > 0; got -1.0"),
        ((2, 4, 3, 8), (2, 4, 3, 8), {"mask": torch.ones(3, 3).int()}, "mask must be boolean or"),
    ],
    ids=["heads", "dim", "no_batch", "scale", "mask"],
)
def test_max_logits_refuses(q: Any, k: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"max_logits: .*{text}"):
        max_logits(torch.ones(q), torch.ones(k), **options)
