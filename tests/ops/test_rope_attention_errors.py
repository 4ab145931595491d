"""What rope_attention refuses, and in which words."""

import pytest
import torch

from trm_fast import BackendError
from trm_fast.ops import rope_attention

X = torch.zeros(2, 5, 4, 8)
SHAPES = (
    "rope_attention: q must be [batch, length, heads, dim] and k and v [batch, length, kv_heads, "
    "dim], heads a multiple of kv_heads, none of heads and dim 0; got "
)


def refused(kind: type[Exception], q=X, k=X, v=X, **options) -> str:
    with pytest.raises(kind) as caught:
        rope_attention(q, k, v, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 5, 8), (2, 5, 8), (2, 5, 8)),
        ((2, 5, 4, 8), (2, 5, 3, 8), (2, 5, 3, 8)),
        ((2, 5, 4, 8), (2, 6, 4, 8), (2, 6, 4, 8)),
        ((2, 5, 4, 8), (1, 5, 4, 8), (1, 5, 4, 8)),
        ((2, 5, 4, 8), (2, 5, 4, 6), (2, 5, 4, 6)),
        ((2, 5, 4, 8), (2, 5, 4, 8), (2, 5, 2, 8)),
        ((2, 5, 4, 8), (2, 5, 0, 8), (2, 5, 0, 8)),
        ((2, 5, 0, 8), (2, 5, 1, 8), (2, 5, 1, 8)),
        ((2, 5, 4, 0), (2, 5, 4, 0), (2, 5, 4, 0)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(q, k, v):
    message = refused(ValueError, *map(torch.zeros, (q, k, v)))
    assert message == f"{SHAPES}{q}, {k} and {v}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"q": [1.0]}, "q must be a tensor; got list"),
        ({"k": X.int()}, "k must be a real floating point tensor; got torch.int32"),
        (
            {"v": X.double()},
            "q, k and v must have one dtype; got torch.float32, torch.float32 and torch.float64",
        ),
        ({"causal": 1}, "causal must be a bool; got 1"),
        ({"window": 2.0}, "window must be a whole number or None; got 2.0"),
        ({"window": True}, "window must be a whole number or None; got True"),
        ({"theta": "1"}, "theta must be a number or None; got '1'"),
        ({"scale": True}, "scale must be a number or None; got True"),
        ({"padding": torch.ones(2, 5)}, "padding must be a bool tensor; got torch.float32"),
        ({"padding": [True]}, "padding must be a bool tensor; got list"),
    ],
    ids=str,
)
def test_types_that_are_not_taken(given, message):
    assert refused(TypeError, **given) == f"rope_attention: {message}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 0}, "window must be >= 1; got 0"),
        ({"theta": 0.0}, "theta must be finite and > 0; got 0.0"),
        ({"theta": float("inf")}, "theta must be finite and > 0; got inf"),
        ({"scale": -1.0}, "scale must be finite and > 0; got -1.0"),
        ({"scale": float("nan")}, "scale must be finite and > 0; got nan"),
        ({"k": X.to("meta")}, "k must be on cpu as q; got meta"),
        (
            {"padding": torch.ones(2, 4, dtype=torch.bool)},
            "padding must be (2, 5) on cpu as q; got (2, 4) on cpu",
        ),
        (
            {"padding": torch.ones(2, 5, dtype=torch.bool, device="meta")},
            "padding must be (2, 5) on cpu as q; got (2, 5) on meta",
        ),
    ],
    ids=str,
)
def test_values_that_are_out_of_range(given, message):
    assert refused(ValueError, **given) == f"rope_attention: {message}"


def test_a_head_of_odd_dimension_cannot_be_rotated():
    x = torch.zeros(2, 5, 4, 7)
    message = "rope_attention: dim must be even to be rotated (theta=None does not); got 7"
    assert refused(ValueError, x, x, x) == message
    assert rope_attention(x, x, x, theta=None).shape == (2, 5, 28)


@pytest.mark.parametrize("backend", ["cpp", "cuda"])
def test_a_backend_that_there_is_not(backend):
    assert refused(BackendError, backend=backend) == (
        f"rope_attention: the named backend '{backend}' cannot run: rope_attention has no "
        f"{backend} implementation"
    )


def test_triton_leaves_float64_to_the_reference():
    x = X.double()
    with pytest.raises(BackendError, match=r"which runs on the reference|CUDA"):
        rope_attention(x, x, x, backend="triton")
