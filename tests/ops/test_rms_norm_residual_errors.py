"""What rms_norm_residual refuses, in these words, before anything runs."""

import re

import pytest
import torch

import trm_fast
from trm_fast.ops import rms_norm_residual

X = torch.ones(2, 3, 4)
NO = "rms_norm_residual: "
WRONG = {
    "no tensor": (TypeError, ([1.0],), {}, "x must be a tensor; got list"),
    "integers": (
        TypeError, (X.long(),), {}, "x must be a real floating point tensor; got torch.int64",
    ),
    "sparse": (
        TypeError, (X.to_sparse(),), {}, "x must be a dense tensor; got torch.sparse_coo",
    ),
    "complex residual": (
        TypeError, (X, X.cfloat()), {},
        "residual must be a real floating point tensor; got torch.complex64",
    ),
    "residual elsewhere": (
        ValueError, (X, X.to("meta")), {}, "residual must be on cpu as x; got meta",
    ),
    "no residual": (TypeError, (X, 1.0), {}, "residual must be a tensor; got float"),
    "another shape": (
        ValueError, (X, X[:, :1]), {}, "residual must be (2, 3, 4) as x; got (2, 1, 4)",
    ),
    "weight of the length": (
        ValueError, (X, X, torch.ones(3)), {}, "weight must be (4,), the size of dim -1; got (3,)",
    ),
    "weight of the features": (
        ValueError, (X, X, torch.ones(4)), {"dim": -2},
        "weight must be (3,), the size of dim -2; got (4,)",
    ),
    "positive dim": (ValueError, (X,), {"dim": 2}, "dim must be -1 or -2; got 2"),
    "no dim": (ValueError, (X,), {"dim": True}, "dim must be -1 or -2; got True"),
    "vector": (
        ValueError, (X[0, 0],), {"dim": -2},
        "x must have 2 dimensions or more for dim -2; got shape (4,)",
    ),
    "scalar": (
        ValueError, (X[0, 0, 0],), {}, "x must have 1 dimensions or more for dim -1; got shape ()",
    ),
    "eps of zero": (ValueError, (X,), {"eps": 0.0}, "eps must be finite and > 0; got 0.0"),
    "infinite eps": (
        ValueError, (X,), {"eps": float("inf")}, "eps must be finite and > 0; got inf",
    ),
    "eps in words": (TypeError, (X,), {"eps": "1e-5"}, "eps must be a number; got '1e-5'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_in_these_words(name):
    error, args, options, message = WRONG[name]
    with pytest.raises(error, match=f"^{re.escape(NO + message)}$"):
        rms_norm_residual(*args, **options)


@pytest.mark.parametrize(("backend", "dtype", "reason"), [
    ("cuda", torch.float32, "rms_norm_residual has no cuda implementation"),
    ("triton", torch.float64, "computes in float32; got float64, which runs on the reference"),
    ("cpp", torch.float16, "runs float32 and bfloat16; got float16, which runs on the reference"),
])  # fmt: skip
def test_a_named_backend_that_cannot_run_is_an_error(backend, dtype, reason):
    from ..conftest import skip_unless_usable

    if backend != "cuda":
        skip_unless_usable(backend)
    message = f"rms_norm_residual: the named backend {backend!r} cannot run: {reason}"
    with pytest.raises(trm_fast.BackendError, match=f"^{re.escape(message)}$"):
        rms_norm_residual(X.to(dtype), backend=backend)


def test_native_code_refuses_sizes_that_do_not_fit():
    from ..conftest import skip_unless_usable

    skip_unless_usable("cpp")
    call = torch.ops.trm_fast.rms_norm_residual_
    with pytest.raises(RuntimeError, match="needs contiguous float32 or bfloat16 tensors of fit"):
        call(X, None, None, -1, 1e-5, torch.empty_like(X), None, torch.empty(5))
    with pytest.raises(RuntimeError, match="needs contiguous float32 or bfloat16 tensors of fit"):
        call(X, X[:1], None, -1, 1e-5, torch.empty_like(X), None, torch.empty(6))
