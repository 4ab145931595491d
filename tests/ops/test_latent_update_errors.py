"""What latent_update refuses, in these words, and when it falls back."""

import re

import pytest
import torch

import trm_fast
from trm_fast import _dispatch
from trm_fast.ops import OPS, Network, latent_update

from ..conftest import skip_unless_usable
from .latent_update_checks import Case, assert_equal, make, run, skip_unless_runs

X = torch.ones(2, 3, 32)
MLP, ATTENTION = Network("mlp_t"), Network("attention", heads=2)
MIX = [torch.ones(8, 3), torch.ones(3, 4), torch.ones(128, 32), torch.ones(32, 64)]
HEADS = [torch.ones(96, 32), torch.ones(32, 32), *MIX[2:]]


def changed(weights: list, index: int, weight) -> list:
    return [*weights[:index], weight, *weights[index + 1 :]]


WRONG = {
    "no tensor": (TypeError, (X, [1.0], X, MIX, MLP), {}, "y must be a tensor; got list"),
    "integers": (
        TypeError, (X.long(), X, X, MIX, MLP), {},
        "x must be a real floating point tensor; got torch.int64",
    ),
    "complex": (
        TypeError, (X, X, X.cfloat(), MIX, MLP), {},
        "z must be a real floating point tensor; got torch.complex64",
    ),
    "elsewhere": (
        ValueError, (X, X, X.to("meta"), MIX, MLP), {}, "z must be on cpu as x; got meta",
    ),
    "flat": (
        ValueError, (X[0], X[0], X[0], MIX, MLP), {},
        "x, y and z must be [batch, length, width] alike; got x (3, 32) and x (3, 32)",
    ),
    "another batch": (
        ValueError, (X, X[:1], X, MIX, MLP), {},
        "x, y and z must be [batch, length, width] alike; got y (1, 3, 32) and x (2, 3, 32)",
    ),
    "no network": (
        TypeError, (X, X, X, MIX, "mlp_t"), {}, "network must be a Network; got str",
    ),
    "another mixer": (
        ValueError, (X, X, X, MIX, Network("mlp")), {},
        "mixer must be 'mlp_t' or 'attention'; got 'mlp'",
    ),
    "no weights": (
        ValueError, (X, X, X, [], MLP), {},
        "weights must be 4 for each layer, one layer or more; got 0",
    ),
    "half a layer": (
        ValueError, (X, X, X, MIX + MIX[:2], MLP), {},
        "weights must be 4 for each layer, one layer or more; got 6",
    ),
    "no heads": (
        ValueError, (X, X, X, HEADS, Network("attention", heads=0)), {},
        "heads must divide width 32 into even parts; got 0",
    ),
    "three heads": (
        ValueError, (X, X, X, HEADS, Network("attention", heads=3)), {},
        "heads must divide width 32 into even parts; got 3",
    ),
    "odd heads": (
        ValueError, (X, X, X, HEADS, Network("attention", heads=32)), {},
        "heads must divide width 32 into even parts; got 32",
    ),
    "a weight of numbers": (
        TypeError, (X, X, X, changed(MIX, 2, [1.0]), MLP), {},
        "weights[2] must be a tensor; got list",
    ),
    "a weight of integers": (
        TypeError, (X, X, X, changed(MIX, 2, MIX[2].long()), MLP), {},
        "weights[2] must be a real floating point tensor; got torch.int64",
    ),
    "a weight elsewhere": (
        ValueError, (X, X, X, changed(MIX, 3, MIX[3].to("meta")), MLP), {},
        "weights[3] must be on cpu as x; got meta",
    ),
    "a mixer of another length": (
        ValueError, (X, X, X, changed(MIX, 0, torch.ones(8, 4)), MLP), {},
        "weights[0] must be (8, 3); got (8, 4)",
    ),
    "another length in the second layer": (
        ValueError, (X, X, X, MIX + changed(MIX, 1, torch.ones(4, 4)), MLP), {},
        "weights[5] must be (3, 4); got (4, 4)",
    ),
    "no up rows": (
        ValueError, (X, X, X, changed(MIX, 2, torch.ones(64, 32)), MLP), {},
        "weights[2] must be (128, 32); got (64, 32)",
    ),
    "a vector": (
        ValueError, (X, X, X, changed(MIX, 2, torch.ones(128)), MLP), {},
        "weights[2] must be (128, 32); got (128,)",
    ),
    "a last scalar": (
        ValueError, (X, X, X, changed(MIX, 3, torch.ones(())), MLP), {},
        "weights[2] must be (0, 32); got (128, 32)",
    ),
    "a turned projection": (
        ValueError, (X, X, X, changed(HEADS, 0, HEADS[0].T), ATTENTION), {},
        "weights[0] must be (96, 32); got (32, 96)",
    ),
    "an output of a part": (
        ValueError, (X, X, X, changed(HEADS, 1, HEADS[1][:16]), ATTENTION), {},
        "weights[1] must be (32, 32); got (16, 32)",
    ),
    "n in words": (TypeError, (X, X, X, MIX, MLP), {"n": "6"}, "n must be a whole number; got '6'"),
    "half a cycle": (
        TypeError, (X, X, X, MIX, MLP), {"T": 2.0}, "T must be a whole number; got 2.0",
    ),
    "yes to gradients": (
        TypeError, (X, X, X, MIX, MLP), {"grad_cycles": True},
        "grad_cycles must be a whole number; got True",
    ),
    "no n": (ValueError, (X, X, X, MIX, MLP), {"n": 0}, "n and T must be >= 1; got n=0, T=3"),
    "no T": (ValueError, (X, X, X, MIX, MLP), {"T": 0}, "n and T must be >= 1; got n=6, T=0"),
    "too many gradients": (
        ValueError, (X, X, X, MIX, MLP), {"grad_cycles": 4}, "grad_cycles must be 0 to T=3; got 4",
    ),
    "fewer than none": (
        ValueError, (X, X, X, MIX, MLP), {"grad_cycles": -1},
        "grad_cycles must be 0 to T=3; got -1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_in_these_words(name):
    error, args, options, message = WRONG[name]
    with pytest.raises(error, match=f"^{re.escape('latent_update: ' + message)}$"):
        latent_update(*args, **options)


@pytest.mark.parametrize("name", ["eps", "theta", "heads"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), "1", True])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_numbers_of_the_network_are_checked_alike(backend, name, value):
    """Each backend refuses what the others refuse."""
    skip_unless_runs(backend)
    network = Network(**{"mixer": "attention", "heads": 2, name: value})
    with pytest.raises((TypeError, ValueError), match=f"^latent_update: {name} must be"):
        latent_update(X, X, X, HEADS, network, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("where", ["x", "weights[0]"])
def test_sparse_tensors_are_refused(backend, where):
    skip_unless_runs(backend)
    x = X.to_sparse() if where == "x" else X
    weights = MIX if where == "x" else changed(MIX, 0, MIX[0].to_sparse())
    message = f"latent_update: {where} must be a dense tensor; got torch.sparse_coo"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        latent_update(x, X, X, weights, MLP, backend=backend)


CANNOT = {
    "width": (
        Case(width=40),
        "needs width and inner in multiples of 32; got 40 and 32",
    ),
    "inner": (
        Case("attention", width=64, inner=40, heads=2),
        "needs width and inner in multiples of 32; got 64 and 40",
    ),
    "odd mixer": (
        Case(mix=33),
        "needs an even inner width of the token mixer; got 33",
    ),
    "no mixer": (
        Case(mix=0),
        "needs an even inner width of the token mixer; got 0",
    ),
    "head dim": (
        Case("attention", width=96, heads=4),
        "needs a head dim in multiples of 16; got 24",
    ),
}


@pytest.mark.parametrize("name", CANNOT)
def test_sizes_that_cpp_cannot_run_fall_back(name):
    skip_unless_runs("cpp")
    case, reason = CANNOT[name]
    inputs = make(case)
    assert_equal(run(inputs, case, None), run(inputs, case, "reference"))
    fallbacks = trm_fast.backends()["latent_update"]["fallbacks"]
    assert fallbacks == {"cpu float32 ran on reference": f"cpp: {reason}"}


@pytest.mark.parametrize("name", CANNOT)
def test_sizes_that_a_named_cpp_cannot_run_are_an_error(name):
    skip_unless_runs("cpp")
    case, reason = CANNOT[name]
    message = f"latent_update: the named backend 'cpp' cannot run: {reason}"
    with pytest.raises(trm_fast.BackendError, match=f"^{re.escape(message)}$"):
        run(make(case), case, "cpp")
    with (
        trm_fast.use_backend("cpp"),
        pytest.raises(trm_fast.BackendError, match=f"^{re.escape(message)}$"),
    ):
        run(make(case), case, None)


@pytest.mark.parametrize("name", CANNOT)
def test_strict_mode_does_not_fall_back(name, monkeypatch):
    skip_unless_runs("cpp")
    case, reason = CANNOT[name]
    monkeypatch.setattr(_dispatch, "_strict", True)
    message = f"latent_update: TRM_FAST_STRICT=1 and cpp cannot run: {reason}"
    with pytest.raises(trm_fast.BackendError, match=f"^{re.escape(message)}$"):
        run(make(case), case, None)
    run(make(Case()), Case(), None)  # which cpp can run
    run(make(case), case, "reference")


@pytest.mark.parametrize("index", [1, 3])
def test_layers_of_different_widths_do_not_run_on_cpp(index):
    """Its memory has the sizes of the first layer."""
    skip_unless_runs("cpp")
    case = Case(layers=2)
    inputs = make(case)
    other = make(case._replace(inner=64) if index == 3 else case._replace(mix=36)).weights
    first = index - 1
    weights = [
        *inputs.weights[: 4 + first],
        *other[first : index + 1],
        *inputs.weights[5 + index :],
    ]
    mixed = inputs._replace(weights=weights)
    assert_equal(run(mixed, case, None), run(mixed, case, "reference"))
    message = "the named backend 'cpp' cannot run: needs weights of the same shapes in all layers"
    with pytest.raises(trm_fast.BackendError, match=f"^latent_update: {message}$"):
        run(mixed, case, "cpp")


@pytest.mark.parametrize(("backend", "dtype", "reason"), [
    ("cuda", torch.float32, "latent_update has no cuda implementation"),
    ("triton", torch.float64, "computes in float32; got float64, which runs on the reference"),
    ("cpp", torch.float64, "runs float32 and bfloat16; got float64, which runs on the reference"),
    ("cpp", torch.float16, "runs float32 and bfloat16; got float16, which runs on the reference"),
])  # fmt: skip
def test_a_named_backend_that_cannot_run_is_an_error(backend, dtype, reason):
    if backend != "cuda":
        skip_unless_usable(backend)
    message = f"latent_update: the named backend {backend!r} cannot run: {reason}"
    with pytest.raises(trm_fast.BackendError, match=f"^{re.escape(message)}$"):
        latent_update(X.to(dtype), X, X, MIX, MLP, backend=backend)


def test_dtypes_that_cpp_cannot_run_fall_back():
    skip_unless_runs("cpp")
    run(make(Case(), torch.float16), Case(), None)
    run(make(Case(), torch.float64), Case(), None)
    fallbacks = trm_fast.backends()["latent_update"]["fallbacks"]
    assert set(fallbacks) == {"cpu float16 ran on reference", "cpu float64 ran on reference"}
    assert all("runs float32 and bfloat16; got" in reason for reason in fallbacks.values())


def test_a_cpu_without_the_instructions_falls_back(monkeypatch):
    skip_unless_runs("cpp")

    class Native:
        """The namespace of the native ops on another CPU."""

        @staticmethod
        def latent_update_cpu_ready(bfloat16: bool) -> bool:
            return False

    monkeypatch.setattr(torch.ops, "trm_fast", Native)
    for dtype, name in ((torch.float32, "AVX-512"), (torch.bfloat16, "AVX512-BF16")):
        found = OPS["latent_update"].reason("cpp", "cpu", frozenset({dtype}))
        assert found == f"needs a CPU with {name}"


def test_native_code_refuses_sizes_that_do_not_fit():
    """A wrong size would be read or written outside of the tensor."""
    skip_unless_runs("cpp")
    call = torch.ops.trm_fast.latent_update_forward_
    empty = torch.empty(0)
    states, scales = torch.empty(0, 2, 3, 32), torch.empty(0, 2, 3)
    kept = torch.empty(0, 2, 0, dtype=torch.uint8)
    rest = (empty, states, scales, kept, 0, 1e-5, 1, 1)
    call(X, X.clone(), X.clone(), MIX, *rest, 0)
    for args in (
        (X, X[:1].clone(), X.clone(), MIX, *rest, 0),
        (X, X.clone().double(), X.clone(), MIX, *rest, 0),
        (X, X.mT.contiguous().mT, X.clone(), MIX, *rest, 0),
        (X, X.clone(), X.clone(), changed(MIX, 0, MIX[0][:, :2].contiguous()), *rest, 0),
        (X, X.clone(), X.clone(), MIX[:3], *rest, 0),
        (X, X.clone(), X.clone(), changed(MIX, 2, MIX[2].double()), *rest, 0),
        (X, X.clone(), X.clone(), MIX, *rest, 1),
    ):
        with pytest.raises(RuntimeError, match="latent_update: needs"):
            call(*args)


@pytest.fixture
def unknown_mixer(monkeypatch) -> Network:
    """A mixer that the page lists, and nothing else has heard of."""
    import importlib

    from trm_fast.ops import _latent_arguments

    page = importlib.import_module("trm_fast.ops.latent_update")
    mixers = (*_latent_arguments.MIXERS, "scan")
    monkeypatch.setattr(_latent_arguments, "MIXERS", mixers)
    monkeypatch.setitem(page._KNOWN, "reference", mixers)
    monkeypatch.setattr(_latent_arguments, "_shapes", lambda x, network, layer: layer.shapes)
    return Network("scan")


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_a_backend_refuses_a_mixer_that_it_does_not_know(backend, unknown_mixer):
    skip_unless_usable(backend)
    with pytest.raises(trm_fast.BackendError, match=f"{backend} does not know mixer 'scan'"):
        latent_update(X, X, X, MIX, unknown_mixer, backend=backend)


def test_no_mixer_stands_for_another_one(unknown_mixer):
    with pytest.raises(ValueError, match="latent_update: there is no form of mixer 'scan'"):
        latent_update(X, X, X, MIX, unknown_mixer)
