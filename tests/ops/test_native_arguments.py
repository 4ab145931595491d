"""Native code called below the checks of the pages: what does not fit is an error, and memory that
belongs to others is never touched."""

import pytest
import torch
from torch import Tensor

from trm_fast import ops
from trm_fast.ops._adaptive_settings import Settings, Vocabulary
from trm_fast.ops._adaptive_tensors import COLUMNS
from trm_fast.ops.vector_latent_update import shapes_of
from trm_fast.optim import GrokFastAdamW

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


def latent(backward: bool = False, **changes: object) -> None:
    """A call of a token mixer of one layer for 2 sequences of 3 tokens of 32 features, with
    gradients of one cycle, of which something is replaced."""
    weights = [torch.ones(shape) for shape in ((8, 3), (3, 4), (64, 32), (32, 32))]
    given = {
        "x": torch.ones(2, 3, 32), "y": torch.ones(2, 3, 32), "z": torch.ones(2, 3, 32),
        "weights": weights, "rope": torch.ones(0), "states": torch.ones(4, 2, 3, 32),
        "scales": torch.ones(2, 2, 3), "kept": torch.ones(2, 2, 0, dtype=torch.uint8),
        "heads": 0, "n": 1, "T": 1, "grad_cycles": 1,
        "gradients": list(map(torch.empty_like, weights)),
    } | changes  # fmt: skip
    x, y, z, weights, rope, states, scales, kept, heads, n, T, cycles, gradients = given.values()
    saved = (rope, states, scales, kept)
    if not backward:
        NATIVE.latent_update_forward_(x, y, z, weights, *saved, heads, 1e-5, n, T, cycles)
        return
    out = (torch.empty_like(x), y, z, gradients)
    NATIVE.latent_update_backward_(x, weights, *saved, *out, heads, 1e-5, n, cycles)


def norm(x: Tensor, dim: int = -1, weight: Tensor | None = None, out: Tensor | None = None) -> None:
    rstd = torch.ones(x.shape[:-1])
    out = torch.empty_like(x) if out is None else out
    NATIVE.rms_norm_residual_(x, None, weight, dim, 1e-5, out, None, rstd)


def sums_row(column: int, value: int) -> None:
    """Sums of one gradient, of whose row something is replaced."""
    grad, sums = torch.ones(9), torch.ones(3, dtype=torch.float64)
    row = [grad.data_ptr(), 0, sums.data_ptr(), 9, 0, 0]
    row[column] = value
    NATIVE.filter_sums_rows_(torch.tensor([row]), None)


def step_row(lr: Tensor | None = None, **changes: int) -> None:
    """A step of AdamW with a moving average, of whose row something is replaced."""
    known = Vocabulary.parse(NATIVE._adaptive_step_cpp_knows())
    settings = Settings(1e-3, filter="ma", lamb=2.0)
    tensors = [torch.ones(9) for _ in range(6)]
    ring, counters = torch.ones(4, 9), torch.zeros(2)
    places = [*tensors, ring, torch.zeros(0), *counters]
    row = dict.fromkeys(COLUMNS, 0) | {"size": 9, "window": 4}
    row |= {name: place.data_ptr() for name, place in zip(COLUMNS, places, strict=False)}
    for name, value in changes.items():
        if name in ("count", "grok_count"):
            counters[int(name == "grok_count")] = value
        else:
            row[name] = value
    NATIVE.adaptive_step_rows_(
        torch.tensor([list(row.values())]), None, known.rules["adamw"], known.filters["ma"],
        list(known.read(settings)), lr, *[None] * 5,
    )  # fmt: skip


SAME = torch.ones(2, 3, 32)


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
    "latent scales of another size": (lambda: latent(scales=torch.ones(11)), "that fit"),
    "latent states of another size": (lambda: latent(states=torch.ones(3, 2, 3, 32)), "that fit"),
    "kept of another size": (
        lambda: latent(kept=torch.ones(2, 2, 64, dtype=torch.uint8)),
        "kept must have \\d+ bytes per layer and sample; got 64",
    ),
    "kept of fewer layers": (
        lambda: latent(kept=torch.ones(1, 2, 0, dtype=torch.uint8)),
        "that fit",
    ),
    "heads whose width overflows": (lambda: latent(heads=1 << 60), "that fit"),
    "updates that overflow": (lambda: latent(n=(1 << 63) - 1), "that fit"),
    "cycles that overflow": (
        lambda: latent(
            n=(1 << 32) - 1,
            T=1 << 32,
            grad_cycles=1 << 32,
            states=torch.ones(0),
            scales=torch.ones(0),
            kept=torch.ones(0, 2, 0, dtype=torch.uint8),
        ),
        "that fit",
    ),
    "latent results in one place": (lambda: latent(y=SAME, z=SAME), "memory of its own"),
    "latent result over its input": (lambda: latent(x=SAME, y=SAME), "memory of its own"),
    "latent gradients in one place": (
        lambda: latent(
            True, gradients=[torch.ones(8, 3), torch.ones(3, 4), *[torch.ones(64, 32)] * 2]
        ),
        "that fit",
    ),
    "steps that overflow": (lambda: vectors(steps=(1 << 63) - 1), "that fit"),
    "results in one place": (
        lambda: vectors(**dict.fromkeys("yz", torch.ones(3, 32))),
        "memory of its own",
    ),
    "backward without gradients": (
        lambda: NATIVE.vector_latent_update_backward_(
            torch.ones(3, 32),
            [torch.ones(shape) for shape in shapes_of(32)],
            [1.0],
            1,
            1,
            torch.ones(3, 4, 32),
            torch.ones(0),
            torch.ones(0),
            *[torch.ones(3, 32)] * 3,
            [],
        ),
        "room for those of weights",
    ),
    "norm in place": (lambda: norm(SAME, out=SAME), "memory of its own"),
    "a sum of an unknown dtype": (lambda: sums_row(4, 3), "row 0"),
    "a sum of less than nothing": (lambda: sums_row(3, -1), "row 0"),
    "a sum of nowhere": (lambda: sums_row(0, 0), "row 0"),
    "a sum to nowhere": (lambda: sums_row(2, 0), "row 0"),
    "a step of an unknown dtype": (lambda: step_row(exp_avg_dtype=2), "row 0"),
    "a step without moments": (lambda: step_row(exp_avg=0), "row 0"),
    "a step without a ring": (lambda: step_row(grok_ring=0), "row 0"),
    "a step without a window": (lambda: step_row(window=0), "row 0"),
    "a step without a counter": (lambda: step_row(step=0), "row 0"),
    "a step before the first": (lambda: step_row(count=-1), "finished steps must be"),
    "a slot before the ring": (lambda: step_row(grok_count=-5), "finished steps must be"),
    "a slot that is no number": (lambda: step_row(grok_count=float("nan")), "finished steps"),
    "a rate of nothing": (lambda: step_row(lr=torch.ones(0)), "one float32"),
    "a rate in float64": (lambda: step_row(lr=torch.ones(()).double()), "one float32"),
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
            torch.ones(19, dtype=torch.int64), None, 0, 0, [0.0] * 14, *[None] * 6
        ),
        "columns of int64",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_does_not_fit_is_refused(case):
    call, words = HOSTILE[case]
    with pytest.raises(RuntimeError, match=words):
        call()


@pytest.mark.parametrize("grads", [[], [torch.ones(3)], [torch.ones(10_000)] * 2])
def test_gradients_of_later_steps_have_the_sizes_that_were_checked(grads):
    first, states = [torch.ones(10_000)], ops.States(steps=[torch.zeros(())])
    step = ops.AdaptiveStep([torch.ones(10_000)], first, states, backend="cpp")
    with pytest.raises(ValueError, match=r"grads(\[0\])? must be"):
        step(grads, Settings(1e-3, rule="sgd"))
    with pytest.raises(ValueError, match="grads must be of the sizes"):
        ops.FilterSums(first, backend="cpp")(grads)


def test_a_gradient_whose_data_were_replaced_is_refused():
    param = torch.nn.Parameter(torch.ones(10_000))
    optimizer = GrokFastAdamW([param])
    param.grad = torch.ones(10_000)
    optimizer.step()
    param.grad.data, before = torch.ones(3), param.detach().clone()
    with pytest.raises(ValueError, match=r"grads\[0\] must be \(10000,\)"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("restarts", [[0], [5], [-1], [3, 2]])
def test_restarts_of_newton_schulz_lie_between_steps(restarts):
    if reason := ops.OPS["newton_schulz"].reason("cpp", "cpu", frozenset({torch.bfloat16})):
        pytest.skip(reason)
    table = torch.ones(0, 5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="restarts between steps"):
        NATIVE.newton_schulz_rows_(table, [1.0] * 15, restarts, 1e-7)


@pytest.mark.parametrize(
    "row",
    [(0, 3, 3, 3, 0), (4, -1, 3, 3, 0), (4, 3, 3, 2, 0), (4, 3, 3, 3, 3), (4, 3, 1 << 62, 3, 0)],
)
def test_a_matrix_of_newton_schulz_has_an_address_and_sizes(row):
    if reason := ops.OPS["newton_schulz"].reason("cpp", "cpu", frozenset({torch.bfloat16})):
        pytest.skip(reason)
    with pytest.raises(RuntimeError, match="a row of the table"):
        NATIVE.newton_schulz_rows_(torch.tensor([row]), [1.0] * 15, [], 1e-7)


MIXED = {
    "norm": lambda x: norm(x, out=x.to("meta")),
    "loss": lambda x: NATIVE.stablemax_cross_entropy_forward(
        x, torch.zeros(2, 3, dtype=torch.int64, device="meta"), 0, True
    ),
    "vectors": lambda x: vectors(y=torch.ones(3, 32, device="meta")),
    "latent": lambda x: latent(z=x.to("meta")),
    "sums": lambda x: NATIVE.filter_sums([x], [x.to("meta")], None),
    "matrices": lambda x: NATIVE.newton_schulz_(
        [x[0], x[0].to("meta")], [1.0] * 3, "auto", None, 1e-7
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_tensor_without_values_among_others_is_refused(name):
    with pytest.raises(ValueError, match="must be on one device; got cpu and meta"):
        MIXED[name](torch.ones(2, 3, 32))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: NATIVE.newton_schulz(SAME, [1.0] * 4, "auto", None, 1e-7), "a, b, c of each step"),
        (lambda: NATIVE.rotary_tables(3, 7, 1e4, torch.float32, torch.device("cpu")), "dim even"),
        (lambda: NATIVE.rotary_tables(3, 4, 0.0, torch.float32, torch.device("cpu")), "theta must"),
    ],
)
def test_operators_in_python_refuse_numbers_that_do_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call()


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
    latent()
    latent(backward=True)
    sums_row(3, 9)
    step_row()
    norm(torch.ones(3, 4), weight=torch.ones(4))
