"""stablemax_cross_entropy against its formula in float64, on every backend."""

import math

import pytest
import torch

from trm_fast.ops import OPS, TokenLoss, stablemax_cross_entropy

from ..conftest import device_of, skip_unless_usable
from .stablemax_checks import FLOOR, IGNORED, KINDS, U, bound, check_gradient, draw, truth

# numpy, in which Triton's interpreter computes, warns of what is infinite or NaN on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=["reference", "cpp", "triton"])
def backend(request) -> str:
    """There is no CUDA form."""
    skip_unless_usable(request.param)
    return request.param


def run(logits, labels, backend, **options) -> tuple[TokenLoss, torch.Tensor]:
    """Returns what the op returns, and the gradient of the sum of its losses."""
    device = device_of(backend)
    x = logits.detach().to(device).requires_grad_()
    found = stablemax_cross_entropy(x, labels.to(device), backend=backend, **options)
    (gradient,) = torch.autograd.grad(found.loss.sum(), x)
    return TokenLoss(*(value.detach().cpu() for value in found)), gradient.cpu()


def check(logits, labels, backend, kind) -> TokenLoss:
    found, gradient = run(logits, labels, backend, kind=kind)
    loss, true_gradient = truth(logits, labels, kind)
    relative = bound(logits, kind)
    assert found.loss.dtype == torch.float32 and gradient.dtype == logits.dtype
    assert ((found.loss - loss).abs() <= relative * loss + FLOOR).all()
    check_gradient(gradient, true_gradient, relative)
    return found


# Around the number of tokens and of columns that a block takes, in C++ and in Triton.
SHAPES = [(2, 81, 11), (3, 7, 6), (2, 65, 16), (1, 130, 1), (2, 3, 32), (2, 3, 33), (1, 2, 1040)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_the_formula(backend, shape, kind):
    check(*draw(shape), backend, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-30, 0.1, 50.0, 1e4, 1e30])
def test_small_and_large_logits(backend, scale, kind):
    check(*draw((2, 33, 11), scale), backend, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [11, 100])
def test_dtypes(backend, dtype, vocabulary, kind):
    logits, labels = draw((2, 17, vocabulary))
    check(logits.to(dtype), labels, backend, kind)


EXTREMES = [1e4, -1e30, 0.0, -0.0, 3e38, -3e38, 1e-30, -1e-45, 1.0, -1.0, -1e4]


@pytest.mark.parametrize("top", EXTREMES)
def test_extreme_logits_beside_each_other(backend, top):
    """Each of them as the label of a token whose largest logit is ``top``."""
    row = torch.tensor([v for v in EXTREMES if v <= top])
    logits = row.expand(1, len(row), len(row)).contiguous()
    check(logits, torch.arange(len(row))[None], backend, "stablemax")


def test_a_small_loss_is_not_lost(backend):
    """p is 1 - 1e-12, which is 1 in float32; the loss is 1e-12, and its gradient as small."""
    logits = torch.tensor([[[-1e8, 1e4, -1e8]]])
    found = check(logits, torch.tensor([[1]]), backend, "stablemax")
    assert found.loss.item() == pytest.approx(2 / (1e4 * 1e8), rel=1e-3)


def test_a_long_sum_loses_nothing(backend):
    """50256 ratios of 0.74 and one of 1: one after the other in float32 they would be off by far
    more than the few roundings that are allowed here."""
    logits = torch.full((1, 2, 50257), 0.7)
    logits[..., 3] = 1.3
    found, gradient = run(logits, torch.tensor([[0, 3]]), backend)
    low, high = (1 + torch.tensor([0.7, 1.3]).double()).tolist()
    total = 50256 * low + high
    loss = (math.log(total / low) + math.log(total / high)) / 2
    assert found.loss.item() == pytest.approx(loss, rel=4 * U)
    assert gradient[0, 0, 1].item() == pytest.approx(0.5 / total, rel=8 * U)


@pytest.mark.parametrize("kind", KINDS)
def test_each_sequence_has_its_own_gradient(backend, kind):
    logits, labels = draw((3, 9, 11))
    device = device_of(backend)
    x = logits.to(device).requires_grad_()
    found = stablemax_cross_entropy(x, labels.to(device), kind=kind, backend=backend)
    weights = torch.tensor([2.0, 0.0, -0.5])
    (gradient,) = torch.autograd.grad((found.loss * weights.to(device)).sum(), x)
    true = truth(logits, labels, kind)[1] * weights[:, None, None]
    check_gradient(gradient, true, bound(logits, kind))


@pytest.mark.parametrize("vocabulary", [6, 77])
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
def test_predictions_and_counts(backend, label_dtype, vocabulary):
    logits, labels = draw((4, 19, vocabulary))
    labels[2] = IGNORED
    found, _ = run(logits, labels.to(label_dtype), backend)
    for b in range(4):
        predictions = [row.index(max(row)) for row in logits[b].tolist()]
        pairs = [(p, y) for p, y in zip(predictions, labels[b].tolist(), strict=True) if y >= 0]
        right = sum(p == y for p, y in pairs)
        assert found.predictions[b].tolist() == predictions
        assert (found.correct[b].item(), found.valid[b].item()) == (right, len(pairs))
        assert found.exact[b].item() == (right == len(pairs) > 0)
    assert found.exact.tolist() == [False, True, False, False]
    assert found.loss[2] == 0
    kinds = [torch.int64, torch.int64, torch.int64, torch.bool]
    assert [value.dtype for value in found[1:]] == kinds


@pytest.mark.parametrize("vocabulary", [7, 90])
def test_of_equal_logits_the_first_is_predicted(backend, vocabulary):
    logits = torch.zeros(1, 3, vocabulary)
    logits[0, 1, 0] = -0.0
    logits[0, 2, [4, 6]] = 1.0
    found, _ = run(logits, torch.zeros(1, 3, dtype=torch.int64), backend)
    assert found.predictions.tolist() == [[0, 0, 4]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [11, 50])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_token_that_is_not_finite_makes_its_sequence_nan(backend, value, vocabulary, kind):
    logits, labels = draw((3, 9, vocabulary))
    logits[1, 5, 4] = value
    labels[1, 5] = 4
    found, gradient = run(logits, labels, backend, kind=kind)
    assert found.loss.isnan().tolist() == [False, True, False]
    assert found.predictions[1, 5] == 4
    assert gradient[1, 5].isnan().sum() >= vocabulary - 1 and gradient[1, :5].isfinite().all()
    assert gradient[[0, 2]].isfinite().all()


def test_nan_counts_as_the_largest(backend):
    logits = torch.tensor([[[1.0, math.nan, math.inf, math.nan], [math.inf, 0, math.inf, 0]]])
    found, _ = run(logits, torch.tensor([[0, 1]]), backend)
    assert found.predictions.tolist() == [[1, 0]] and found.loss.isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_logit_of_minus_infinity_is_a_column_that_does_not_exist(backend, kind):
    logits, labels = draw((2, 9, 11))
    labels = labels.clamp(max=9)
    logits[..., 10] = -math.inf
    found, gradient = run(logits, labels, backend, kind=kind)
    fewer, gradient_of_fewer = run(logits[..., :10].contiguous(), labels, backend, kind=kind)
    assert torch.equal(gradient[..., 10], torch.zeros(2, 9))
    relative = bound(logits[..., :10], kind)
    assert torch.allclose(found.loss, fewer.loss, rtol=relative, atol=0)
    assert torch.allclose(gradient[..., :10], gradient_of_fewer, rtol=relative, atol=relative)


@pytest.mark.parametrize("vocabulary", [11, 50])
def test_ignored_tokens_may_hold_anything(backend, vocabulary):
    logits, labels = draw((2, 9, vocabulary))
    expected, gradient = run(logits, labels, backend)
    logits[:, 3] = torch.tensor([math.nan, math.inf] * vocabulary)[:vocabulary]
    found, same = run(logits, labels, backend)
    assert torch.equal(found.loss, expected.loss) and torch.equal(same, gradient)
    assert torch.equal(gradient[:, 3], torch.zeros(2, vocabulary))


def test_any_label_can_be_the_ignored_one(backend):
    logits, labels = draw((2, 9, 5))
    expected, gradient = run(logits, labels, backend)
    labels = labels.clamp(min=-1) + 1  # 0 for what was ignored
    logits = torch.cat([torch.full((2, 9, 1), -math.inf), logits], -1)
    found, wider = run(logits, labels, backend, ignore_index=0)
    assert torch.equal(found.valid, expected.valid) and torch.equal(found.correct, expected.correct)
    assert torch.allclose(found.loss, expected.loss, rtol=64 * U, atol=0)
    assert torch.allclose(wider[..., 1:], gradient, rtol=64 * U, atol=64 * U)


@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 0, 3), (0, 0, 1)], ids=str)
def test_what_is_empty_has_no_loss(backend, shape):
    found, gradient = run(torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.int64), backend)
    assert torch.equal(found.loss, torch.zeros(shape[0])) and not found.exact.any()
    assert not found.valid.any() and gradient.shape == shape


VIEWS = {
    "without the first positions": lambda x: torch.cat([x[:, :2], x], 1)[:, 2:],
    "every second sequence": lambda x: x.repeat_interleave(2, 0)[::2],
    "columns first": lambda x: x.movedim(2, 0).contiguous().movedim(0, 2),
    "length first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "negative bit": lambda x: torch._neg_view(-x),
    "one sequence for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(backend, view):
    logits, labels = draw((3, 9, 11))
    device = device_of(backend)
    x = logits.to(device).requires_grad_()
    viewed = VIEWS[view](x)
    found = stablemax_cross_entropy(viewed, labels.to(device), backend=backend)
    gradient = torch.autograd.grad(found.loss.sum(), viewed)[0].cpu()
    plain, expected = run(viewed.detach().cpu().clone(), labels, backend)
    assert torch.equal(found.loss.detach().cpu(), plain.loss)
    assert torch.equal(gradient, expected)


def test_labels_of_any_stride(backend):
    logits, labels = draw((3, 9, 11))
    apart = labels.repeat_interleave(3, 1)[:, ::3]
    assert torch.equal(run(logits, apart, backend)[0].loss, run(logits, labels, backend)[0].loss)


def test_inputs_stay_as_they_are(backend):
    logits, labels = draw((2, 9, 11))
    before = logits.clone(), labels.clone()
    run(logits, labels, backend)
    assert torch.equal(logits, before[0]) and torch.equal(labels, before[1])


def test_a_call_repeats_to_the_last_bit(backend):
    logits, labels = draw((5, 81, 11))
    found, gradient = run(logits, labels, backend)
    again, same = run(logits, labels, backend)
    alone, own = run(logits[3:4], labels[3:4], backend)
    assert torch.equal(found.loss, again.loss) and torch.equal(gradient, same)
    if backend != "reference":  # whose sums are torch's
        assert torch.equal(found.loss[3:4], alone.loss) and torch.equal(gradient[3:4], own)


@pytest.mark.parametrize("shape", [(40, 81, 11), (1, 100, 700)], ids=str)
def test_the_number_of_threads_changes_nothing(shape):
    if OPS["stablemax_cross_entropy"].reason("cpp", "cpu", frozenset({torch.float32})):
        pytest.skip("needs the C++ library")
    logits, labels = draw(shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, gradient = run(logits, labels, "cpp")
        torch.set_num_threads(3)
        many, same = run(logits, labels, "cpp")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.loss, many.loss) and torch.equal(gradient, same)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    logits, labels = draw((2, 5, 4))

    def loss(x):
        return stablemax_cross_entropy(x, labels, kind=kind).loss

    assert loss(logits.double()).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, logits.double().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_exact(kind):
    logits, labels = (tensor for tensor in draw((2, 33, 11)))
    found, gradient = run(logits.double(), labels, "reference", kind=kind)
    loss, true = truth(logits, labels, kind)
    relative = bound(logits, kind) * 2.0**-29
    assert ((found.loss - loss).abs() <= relative * loss).all()
    assert ((gradient - true).abs() <= relative * true.abs().amax(-1, keepdim=True)).all()


def test_at_zero_stablemax_has_one_slope(backend):
    """1 from either side; of -0.0 too."""
    logits = torch.tensor([[[0.0, -0.0, 1.0]]])
    check(logits, torch.tensor([[1]]), backend, "stablemax")


def test_kinds_differ():
    logits, labels = draw((2, 9, 11))
    stablemax, softmax = (stablemax_cross_entropy(logits, labels, kind=kind) for kind in KINDS)
    assert not torch.allclose(stablemax.loss, softmax.loss, rtol=0.1)
    expected = torch.nn.functional.cross_entropy(logits[0], labels[0])
    assert torch.allclose(softmax.loss[0], expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(), (7,), (33, 32), (0, 3), (2, 9, 4), (3, 0)], ids=str)
def test_the_examples_of_the_op_keep_their_tolerance(backend, shape, dtype):
    """What ``trm-fast doctor`` runs on the machines of users."""
    op, device = OPS["stablemax_cross_entropy"], device_of(backend)
    if dtype == torch.float64 and backend != "reference":
        assert "runs on the reference" in op.reason(backend, device.type, frozenset({dtype}))
        return
    for name, example in op.examples(shape, dtype, device).items():
        errors = example.errors(backend)
        assert errors.keys() == example.tolerance.keys()
        assert all(errors[key] <= example.tolerance[key] for key in errors), (name, errors)
