"""What newton_schulz refuses, in which words."""

import pytest
import torch

from trm_fast import BackendError
from trm_fast.ops import newton_schulz, newton_schulz_
from trm_fast.ops._newton_schulz_forms import METHODS

X = torch.ones(3, 4)
WRONG = {
    "no tensor": (([[1.0]],), TypeError, "x must be a tensor; got list"),
    "ints": ((X.int(),), TypeError, "x must be a real floating point tensor; got torch.int32"),
    "complex": ((X.cfloat(),), TypeError, "real floating point tensor; got torch.complex64"),
    "sparse": ((X.to_sparse(),), TypeError, "x must be a dense tensor; got torch.sparse_coo"),
    "one dimension": ((X[0],), ValueError, r"x must be matrices \[..., n, m\]; got shape \(4,\)"),
    "steps 0": ((X, 0), ValueError, "steps must be >= 1; got 0"),
    "steps 2.0": ((X, 2.0), TypeError, "steps must be an int; got 2.0"),
    "steps True": ((X, True), TypeError, "steps must be an int; got True"),
    "misspelt set": ((X, 5, "kellr"), ValueError, "got 'kellr'; did you mean 'keller'?"),
    "unknown set": ((X, 5, "?"), ValueError, "coefficients must be one of polar_express, keller"),
    "four triples": ((X, 5, [(1.0, 1.0, 1.0)] * 4), ValueError, "or 5 of them; got 4"),
    "no triples": ((X, 5, []), ValueError, "or 5 of them; got 0"),
    "a pair": ((X, 1, [(1.0, 1.0)]), ValueError, r"got \(1.0, 1.0\)"),
    "a name as number": ((X, 1, [("a", "b", "c")]), TypeError, r"got \('a', 'b', 'c'\)"),
    "a number": ((X, 5, 1.5), TypeError, "coefficients must be a name, one .*; got 1.5"),
    "not finite": ((X, 5, (1.0, float("nan"), 0.0)), ValueError, "finite; got"),
    "method": ((X, 5, "keller", "fast"), ValueError, "method must be one of auto, standard"),
}
OPTIONS = {
    "dtype": ({"dtype": torch.int8}, TypeError, "dtype must be one of .*; got torch.int8"),
    "eps 0": ({"eps": 0.0}, ValueError, "eps must be finite and > 0; got 0.0"),
    "eps < 0": ({"eps": -1.0}, ValueError, "eps must be finite and > 0; got -1.0"),
    "eps inf": ({"eps": float("inf")}, ValueError, "eps must be finite and > 0; got inf"),
    "eps nan": ({"eps": float("nan")}, ValueError, "eps must be finite and > 0; got nan"),
    "eps text": ({"eps": "1"}, TypeError, "eps must be a number; got '1'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(case):
    arguments, kind, words = WRONG[case]
    with pytest.raises(kind, match=f"newton_schulz: .*{words.replace('?', '[?]')}"):
        newton_schulz(*arguments)


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_options_are_refused(case):
    options, kind, words = OPTIONS[case]
    with pytest.raises(kind, match=f"newton_schulz: {words}"):
        newton_schulz(X, **options)
    with pytest.raises(kind, match=f"newton_schulz_: {words}"):
        newton_schulz_([X.clone()], **options)


LISTS = {
    "a batch": ([X, X[None]], ValueError, r"matrices\[1\] must be \[n, m\]; got shape \(1, 3, 4\)"),
    "a vector": ([X[0]], ValueError, r"matrices\[0\] must be \[n, m\]; got shape \(4,\)"),
    "ints": ([X, X.int()], TypeError, r"matrices\[1\] must be a real floating point tensor"),
    "mixed": ([X, X.double()], TypeError, r"\[1\] must be torch.float32 as matrices\[0\]"),
    "devices": ([X, X.to("meta")], ValueError, r"matrices\[1\] must be on cpu .*; got meta"),
    "twice": ([X, X], ValueError, "disjoint in memory; got two that overlap"),
    "overlapping": ([X[:2], X[1:]], ValueError, "disjoint in memory; got two that overlap"),
    "expanded": ([X[:1].expand(3, 4)], ValueError, "disjoint in memory; got two that overlap"),
}


@pytest.mark.parametrize("case", LISTS)
def test_wrong_lists_are_refused_and_nothing_is_written(case):
    matrices, kind, words = LISTS[case]
    with pytest.raises(kind, match=f"newton_schulz_: .*{words}"):
        newton_schulz_(matrices)
    assert torch.equal(X, torch.ones(3, 4))


def test_neighbours_within_one_tensor_are_no_overlap():
    whole = torch.eye(6, 4).bfloat16()
    newton_schulz_([whole[:3], whole[3:]])
    assert whole.isfinite().all()


def test_an_empty_list_is_no_work():
    newton_schulz_([])


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_float64_runs_on_the_reference_alone(backend):
    with pytest.raises(BackendError, match=f"newton_schulz: the named backend '{backend}' cannot"):
        newton_schulz(X.double(), backend=backend)
    assert newton_schulz(X.double(), dtype=torch.bfloat16).dtype == torch.float64


def test_cpp_multiplies_in_bfloat16_only():
    with pytest.raises(BackendError, match="'cpp' cannot run: "):
        newton_schulz(X, backend="cpp")


def test_no_gradient_is_recorded():
    x = torch.ones(3, 4, requires_grad=True)
    assert not newton_schulz(x).requires_grad


def test_a_written_matrix_is_not_taken_for_what_autograd_has_saved():
    weight = torch.eye(3, 4).bfloat16()
    x = torch.ones(4, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = (weight @ x).sum()
    newton_schulz_([weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_that_requires_grad_may_be_written(method):
    x = torch.nn.Parameter(torch.eye(3, 4))
    newton_schulz_([x], method=method)
    assert x.requires_grad and x.is_leaf
