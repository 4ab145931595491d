"""Native code called below the checks of the pages: what does not fit is an error, and memory that
belongs to others is never touched."""

import pytest
import torch
from torch import Tensor

from trm_fast import ops
from trm_fast.ops.vector_latent_update import shapes_of

from ..conftest import skip_unless_usable

NATIVE = torch.ops.trm_fast


@pytest.fixture(autouse=True)
def cpp():
    skip_unless_usable("cpp")


def loss(**changes: Tensor) -> None:
    """The backward pass of the loss for 2 sequences of 3 tokens, of which something is replaced."""
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    given = {
        "grad": torch.ones(2),
        "logits": torch.randn(2, 3, 5),
        "labels": tokens,
        "predictions": tokens,
        "others": torch.ones(2, 3),
        "valid": torch.tensor([3, 3]),
    }
    NATIVE.stablemax_cross_entropy_backward(*(given | changes).values(), -100, True)


def vectors(backward: bool = False, **changes: object) -> None:
    """A call for 3 rows of 32, with gradients of one round, of which something is replaced."""
    given = {
        "x": torch.ones(3, 32), "y": torch.ones(3, 32), "z": torch.ones(3, 32),
        "weights": [torch.ones(shape) for shape in shapes_of(32)], "scales": [1.0], "steps": 1,
        "grad_rounds": 1, "states": torch.ones(3, 4, 32), "kept": torch.ones(0),
        "norms": torch.ones(0),
    } | changes  # fmt: skip
    x, y, z, weights, scales, steps, rounds, *saved = given.values()
    if not backward:
        NATIVE.vector_latent_update_forward_(x, y, z, weights, scales, steps, rounds, *saved)
        return
    gradients = [torch.empty_like(weight) for weight in weights]
    counts, out = (scales, steps, rounds), (torch.empty_like(x), y, z, gradients)
    NATIVE.vector_latent_update_backward_(x, weights, *counts, *saved, *out)


def norm(x: Tensor, dim: int = -1, weight: Tensor | None = None) -> None:
    rstd = torch.ones(x.shape[:-1])
    NATIVE.rms_norm_residual_(x, None, weight, dim, 1e-5, torch.empty_like(x), None, rstd)


FIT = "needs what its forward pass has given"
HOSTILE = {
    "logits of whole numbers": (
        lambda: NATIVE.stablemax_cross_entropy_forward(
            torch.ones(2, 3, 5, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int64), 0, True
        ),
        "logits must be float32",
    ),
    "too few labels": (
        lambda: NATIVE.stablemax_cross_entropy_forward(
            torch.ones(2, 3, 5), torch.zeros(2, 1, dtype=torch.int64), 0, True
        ),
        "labels must be contiguous int64",
    ),
    "labels of 32 bits": (
        lambda: NATIVE.stablemax_cross_entropy_forward(
            torch.ones(2, 3, 5), torch.zeros(2, 3, dtype=torch.int32), 0, True
        ),
        "labels must be contiguous int64",
    ),
    "no vocabulary": (
        lambda: NATIVE.stablemax_cross_entropy_forward(
            torch.ones(2, 3, 0), torch.zeros(2, 3, dtype=torch.int64), 0, True
        ),
        "vocabulary must not be empty",
    ),
    "gradient of another size": (lambda: loss(grad=torch.ones(1)), FIT),
    "gradient in float64": (lambda: loss(grad=torch.ones(2).double()), FIT),
    "prediction out of range": (lambda: loss(predictions=torch.full((2, 3), 1 << 40)), FIT),
    "transposed labels": (lambda: loss(labels=torch.zeros(3, 2, dtype=torch.int64).T), FIT),
    "sums of another size": (lambda: loss(others=torch.ones(2)), FIT),
    "states of another size": (lambda: vectors(y=torch.ones(2, 32)), "that fit"),
    "transposed states": (lambda: vectors(x=torch.ones(32, 3).T), "that fit"),
    "states of whole numbers": (lambda: vectors(x=torch.ones(3, 32).int()), "that fit"),
    "states of one dimension": (lambda: vectors(x=torch.ones(32)), "that fit"),
    "no weights": (lambda: vectors(weights=[]), "that fit"),
    "weights of another size": (lambda: vectors(weights=[torch.ones(1)] * 12), "that fit"),
    "no steps": (lambda: vectors(steps=0), "that fit"),
    "more rounds with gradients": (lambda: vectors(grad_rounds=2), "that fit"),
    "too little room": (lambda: vectors(states=torch.ones(1)), "that fit"),
    "norms without the rest": (lambda: vectors(norms=torch.ones(9)), "that fit"),
    "backward of nothing": (lambda: vectors(backward=True, grad_rounds=0), "rounds with gradients"),
    "backward without room": (lambda: vectors(backward=True, states=torch.ones(4)), "that fit"),
    "norm over no dimension": (lambda: norm(torch.ones(3), -2), "dim must be -1 or -2"),
    "norm over another": (lambda: norm(torch.ones(3, 4), 1), "dim must be -1 or -2"),
    "weight with gaps": (
        lambda: norm(torch.ones(3, 4), weight=torch.ones(8)[::2]),
        "fitting sizes",
    ),
    "table of floats": (
        lambda: NATIVE.filter_sums_rows_(torch.ones(1, 6), None),
        "columns of int64",
    ),
    "table with gaps": (
        lambda: NATIVE.filter_sums_rows_(torch.ones(12, 2, dtype=torch.int64)[:6].T, None),
        "columns of int64",
    ),
    "table of one dimension": (
        lambda: NATIVE.adaptive_step_rows_(
            torch.ones(19, dtype=torch.int64), None, 0, 0, [0.0], *[None] * 6
        ),
        "columns of int64",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_does_not_fit_is_refused(case):
    call, words = HOSTILE[case]
    with pytest.raises(RuntimeError, match=words):
        call()


@pytest.mark.parametrize("restarts", [[0], [5], [-1], [3, 2]])
def test_restarts_of_newton_schulz_lie_between_steps(restarts):
    if reason := ops.OPS["newton_schulz"].reason("cpp", "cpu", frozenset({torch.bfloat16})):
        pytest.skip(reason)
    table = torch.ones(0, 5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="restarts between steps"):
        NATIVE.newton_schulz_rows_(table, [1.0] * 15, restarts, 1e-7)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)])
def test_the_loss_of_nothing_takes_any_strides(shape):
    logits = torch.ones(*shape[:1], *shape[:0:-1]).mT.requires_grad_()
    labels = torch.zeros(shape[:2], dtype=torch.int64)
    found = ops.stablemax_cross_entropy(logits, labels, backend="cpp")
    found.loss.sum().backward()
    assert found.loss.tolist() == [0.0] * shape[0] and logits.grad.shape == shape


def test_calls_that_fit_run():
    loss()
    vectors()
    vectors(backward=True)
    norm(torch.ones(3, 4), weight=torch.ones(4))
