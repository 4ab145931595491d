"""What stablemax_cross_entropy refuses, in which words."""

import re

import pytest
import torch

from trm_fast import BackendError
from trm_fast.ops import stablemax_cross_entropy

from ..conftest import device_of, skip_unless_usable

LOGITS = torch.zeros(2, 3, 4)
LABELS = torch.zeros(2, 3, dtype=torch.int64)
WRONG = {
    "no tensor": (([[[0.0]]], LABELS), TypeError, "logits must be a tensor; got list"),
    "labels no tensor": ((LOGITS, [[0]]), TypeError, "labels must be a tensor; got list"),
    "int logits": (
        (LOGITS.int(), LABELS),
        TypeError,
        "logits must be dense and one of float32, bfloat16, float16, float64; got torch.strided "
        "torch.int32",
    ),
    "sparse logits": (
        (LOGITS.to_sparse(), LABELS),
        TypeError,
        "logits must be dense and one of float32, bfloat16, float16, float64; got "
        "torch.sparse_coo torch.float32",
    ),
    "float labels": (
        (LOGITS, LABELS.float()),
        TypeError,
        "labels must be dense and one of int64, int32; got torch.strided torch.float32",
    ),
    "two dimensions": (
        (LOGITS[0], LABELS[0]),
        ValueError,
        "logits must be [batch, length, vocabulary >= 1]; got (3, 4)",
    ),
    "no vocabulary": (
        (LOGITS[..., :0], LABELS),
        ValueError,
        "logits must be [batch, length, vocabulary >= 1]; got (2, 3, 0)",
    ),
    "too few labels": (
        (LOGITS, LABELS[:1]),
        ValueError,
        "labels must be (2, 3) on cpu as the logits; got (1, 3) on cpu",
    ),
    "labels elsewhere": (
        (LOGITS, LABELS.to("meta")),
        ValueError,
        "labels must be (2, 3) on cpu as the logits; got (2, 3) on meta",
    ),
}
OPTIONS = {
    "kind": ({"kind": "max"}, ValueError, "kind must be one of stablemax, softmax; got 'max'"),
    "ignore None": ({"ignore_index": None}, TypeError, "ignore_index must be an int; got None"),
    "ignore True": ({"ignore_index": True}, TypeError, "ignore_index must be an int; got True"),
}


@pytest.fixture(scope="module", params=["reference", "cpp", "triton"])
def backend(request) -> str:
    """There is no CUDA form."""
    skip_unless_usable(request.param)
    return request.param


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(case):
    arguments, kind, words = WRONG[case]
    with pytest.raises(kind, match=f"^{re.escape(f'stablemax_cross_entropy: {words}')}$"):
        stablemax_cross_entropy(*arguments)


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_options_are_refused(case):
    options, kind, words = OPTIONS[case]
    with pytest.raises(kind, match=f"^{re.escape(f'stablemax_cross_entropy: {words}')}$"):
        stablemax_cross_entropy(LOGITS, LABELS, **options)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("label", [4, -1, 2**40])
def test_a_label_out_of_range_is_named(backend, label, needs_grad):
    """By the host only where it need not wait: on a GPU its sequence has the loss NaN."""
    device = device_of(backend)
    labels = LABELS.clone()
    labels[1, 2] = label
    logits = LOGITS.to(device, copy=True).requires_grad_(needs_grad)
    if device.type != "cpu":
        found = stablemax_cross_entropy(logits, labels.to(device), backend=backend)
        assert found.loss.isnan().tolist() == [False, True]
        return
    words = (
        "stablemax_cross_entropy: labels must be in [0, 4) or -100 (ignore_index); got "
        f"{label} at [1, 2]"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        stablemax_cross_entropy(logits, labels, backend=backend)


def test_a_label_out_of_range_is_ignored_if_it_is_the_ignored_one(backend):
    device = device_of(backend)
    labels = torch.full((2, 3), 9, device=device)
    found = stablemax_cross_entropy(LOGITS.to(device), labels, ignore_index=9, backend=backend)
    assert found.loss.tolist() == [0, 0] and found.valid.tolist() == [0, 0]


def test_labels_of_32_bits_are_refused_alike(backend):
    if device_of(backend).type != "cpu":
        pytest.skip("a GPU makes it NaN, which is tested above")
    labels = LABELS.int()
    labels[0, 1] = -7
    with pytest.raises(ValueError, match=re.escape("got -7 at [0, 1]")):
        stablemax_cross_entropy(LOGITS, labels, backend=backend)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_float64_runs_on_the_reference_alone(backend):
    with pytest.raises(BackendError, match=f"the named backend '{backend}' cannot"):
        stablemax_cross_entropy(LOGITS.double(), LABELS, backend=backend)
    assert stablemax_cross_entropy(LOGITS.double(), LABELS).loss.dtype == torch.float64


def test_only_the_loss_carries_a_gradient(backend):
    device = device_of(backend)
    logits = LOGITS.to(device, copy=True).requires_grad_()
    found = stablemax_cross_entropy(logits, LABELS.to(device), backend=backend)
    assert [value.requires_grad for value in found] == [True, False, False, False, False]
    with torch.no_grad():
        found = stablemax_cross_entropy(logits, LABELS.to(device), backend=backend)
    assert not found.loss.requires_grad


def test_logits_written_before_the_backward_are_noticed(backend):
    device = device_of(backend)
    logits = LOGITS.to(device, copy=True).requires_grad_() * 1
    loss = stablemax_cross_entropy(logits, LABELS.to(device), backend=backend).loss.sum()
    if backend == "reference":
        # It saves what it computed, which the caller cannot write to.
        expected = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        logits.data.fill_(1.0)
        assert torch.equal(torch.autograd.grad(loss, logits)[0], expected)
        return
    logits.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
