"""Newton-Schulz orthogonalisation: all singular values of a matrix towards 1, by products alone.

For a matrix X of n rows and m columns with n <= m, and (a, b, c) of each step:

    X <- X / max(||X||_F, eps)
    R <- X X^T ;  X <- a X + (b R + c R^2) X                                         each step

so a singular value s becomes p(s) = s (a + b s^2 + c s^4), while the singular vectors stay. With
n > m the products stand on the other side: R = X^T X, and X (b R + c R^2). Nothing is copied into
another order for that.

The forms differ in how often X itself is touched. A polynomial of R commutes with R, so steps can
be taken on n x n matrices, and X is multiplied once at the end:

    Z <- b R + c R^2
    Q <- Z + a I at first, a Q + Q Z later        Q X is what X has become           each step
    R <- a (a R + R Z) + Z (a R + R Z)            which is (a I + Z) R (a I + Z)

"gram" does this, and computes X <- Q X and R = X X^T anew before the steps called restarts;
without them, rounding errors of R grow until they are the result (``restarts_of``). "standard"
restarts before each step: the formula at the top. "symmetric" is the same, in an
implementation that computes one triangle of every n x n matrix and mirrors it. Multiply-adds for T
steps and k restarts, with triangles (without: 2 n^2 m for a triangle's n^2 m, 2 n^3 for n^3; half
of it is what is written here as one):

    standard, symmetric    T (3 n^2 m + n^3)
    gram                   (k + 1) 3 n^2 m + (4 T - 3 (k + 1)) n^3    fewer wherever m > n

What is computed is p(p(...)) of the singular values over the norm, not the polar factor: how near
it comes is a matter of the coefficients, of the condition of X and of the dtype, and
docs/newton_schulz.md measures it. The result carries no gradient.

Sources: Higham, Functions of Matrices (2008), chapter 8; Muon, K. Jordan 2024, KellerJordan/Muon at
857d1ad; the Gram form, Dao-AILab/gram-newton-schulz at f08f25e.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trm_fast import _native
from trm_fast._autograd import check_not_wrapped
from trm_fast._dispatch import Call, Example, Op
from trm_fast.ops._flops import register_flops
from trm_fast.ops._newton_schulz_forms import METHODS, form_of, has_amx
from trm_fast.ops._newton_schulz_sets import Triple, restarts_of, triples_of
from trm_fast.ops._tensors import overlap

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    coefficients: str | Sequence[Any] = "polar_express",
    method: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
    backend: str | None = None,
) -> Tensor:
    """Returns ``x`` with its singular values moved towards 1; the formula is at the top.

    Args:
        x: matrices [..., n, m] of any strides, float32, bfloat16, float16 or float64; only read.
        steps: number of steps, >= 1.
        coefficients: "polar_express", "keller", "you", "cans", "cubic5", "cubic" or "deepseekv4";
            of a longer set the first ``steps``, of a shorter one the last repeats; or (a, b, c) for
            all steps; or one of them for each step.
        method: "standard", "symmetric", "gram", or "auto", the fastest as measured.
        dtype: of the products; None takes that of ``x``. The norm is always computed in float32 or
            more, and cannot overflow.
        eps: least norm to divide by, > 0. A matrix of zeros stays zero.
        backend: the implementation that must run; None takes the first usable one.

    Returns:
        A new contiguous tensor of the shape and dtype of ``x``, without gradient.

    Raises:
        ValueError: a number is out of range, a name unknown, or x has fewer than two dimensions.
        TypeError: a dtype or layout is not supported.
        BackendError: the named backend cannot run the call.
    """
    owner = "newton_schulz"
    triples = triples_of(coefficients, steps, owner)
    if torch.compiler.is_compiling():
        flat = [number for triple in triples for number in triple]
        arguments = (x.detach(), flat, method, dtype, eps, backend)
        return torch.ops.trm_fast.newton_schulz(*arguments)  # type: ignore[no-any-return]
    _check_matrix(owner, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{owner}: x must be matrices [..., n, m]; got shape {tuple(x.shape)}")
    _check_options(owner, method, dtype, eps)
    with torch.no_grad():
        result = x.resolve_neg().clone(memory_format=torch.contiguous_format)
        matrices = result.view(-1, *x.shape[-2:]).unbind() if x.numel() else ()
        _run(matrices, triples, method, dtype, eps, backend)
    return result


def newton_schulz_(
    matrices: Sequence[Tensor],
    steps: int = 5,
    coefficients: str | Sequence[Any] = "polar_express",
    method: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
    backend: str | None = None,
) -> None:
    """Does ``newton_schulz`` in place on many matrices in one call.

    Each result has the same bits as if its matrix had been alone, except where a library's product
    on a GPU depends on the batch.

    Args:
        matrices: matrices [n, m], of any shapes and strides, all on one device and of one dtype;
            overwritten. Columns side by side in memory save a copy.
        steps: as for ``newton_schulz``, like all that follows.
        coefficients: likewise.
        method: likewise.
        dtype: likewise.
        eps: likewise.
        backend: likewise.

    Raises:
        ValueError: a number is out of range, a name unknown, a tensor is no matrix or on another
            device, or two of them overlap.
        TypeError: a dtype or layout is not supported, or not the same for all.
        BackendError: the named backend cannot run the call.
    """
    owner = "newton_schulz_"
    triples = triples_of(coefficients, steps, owner)
    if torch.compiler.is_compiling():
        flat = [number for triple in triples for number in triple]
        torch.ops.trm_fast.newton_schulz_(list(matrices), flat, method, dtype, eps, backend)
        return
    check_not_wrapped(owner, matrices)
    _check_matrices(owner, matrices)
    _check_options(owner, method, dtype, eps)
    with torch.no_grad():
        given = [matrix for matrix in matrices if matrix.numel()]
        plain = [matrix.resolve_neg() for matrix in given]
        _run(plain, triples, method, dtype, eps, backend)
        _copy_back(given, plain)
    torch.autograd.graph.increment_version(matrices)


def _run(
    matrices: Sequence[Tensor],
    triples: tuple[Triple, ...],
    method: str,
    dtype: torch.dtype | None,
    eps: float,
    backend: str | None,
) -> None:
    """Groups matrices by form, and has each group run."""
    if not matrices:
        return
    stored, device = matrices[0].dtype, matrices[0].device
    dtype = dtype or stored
    # Storage in float64 is the reference's alone; any other is read by all.
    kinds = frozenset({dtype, stored} if stored == torch.float64 else {dtype})
    choice = _op.choose(device.type, kinds, backend)
    restarts = restarts_of(triples, dtype)
    groups: dict[str, list[Tensor]] = {}
    for matrix in matrices:
        form = form_of(method, matrix.shape, choice.backend, device.type)
        groups.setdefault(form, []).append(matrix)
    for form, group in groups.items():
        before = restarts if form == "gram" else tuple(range(1, len(triples)))
        choice.run(group, triples, form, before, dtype, eps)


def _check_options(owner: str, method: str, dtype: torch.dtype | None, eps: float) -> None:
    if method not in METHODS:
        raise ValueError(f"{owner}: method must be one of {', '.join(METHODS)}; got {method!r}")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"{owner}: dtype must be one of {DTYPES} or None; got {dtype!r}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{owner}: eps must be a number; got {eps!r}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"{owner}: eps must be finite and > 0; got {eps!r}")


def _check_matrix(owner: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{owner}: {name} must be a real floating point tensor; got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{owner}: {name} must be a dense tensor; got {x.layout}")


def _check_matrices(owner: str, matrices: Sequence[Tensor]) -> None:
    for index, matrix in enumerate(matrices):
        name, first = f"matrices[{index}]", matrices[0]
        _check_matrix(owner, name, matrix)
        if matrix.dim() != 2:
            raise ValueError(f"{owner}: {name} must be [n, m]; got shape {tuple(matrix.shape)}")
        if matrix.dtype != first.dtype:
            raise TypeError(
                f"{owner}: {name} must be {first.dtype} as matrices[0]; got {matrix.dtype}"
            )
        if matrix.device != first.device:
            raise ValueError(
                f"{owner}: {name} must be on {first.device} as matrices[0]; got {matrix.device}"
            )
    if matrices and matrices[0].device.type != "meta" and overlap(matrices):
        raise ValueError(f"{owner}: matrices must be disjoint in memory; got two that overlap")


def _reference(
    matrices: Sequence[Tensor],
    triples: Sequence[Triple],
    form: str,
    restarts: Sequence[int],
    dtype: torch.dtype,
    eps: float,
) -> None:
    """Whatever the form, ``restarts`` says what is computed."""
    cuts = (0, *restarts, len(triples))
    segments = [triples[i:j] for i, j in pairwise(cuts)]
    for matrix in matrices:
        wide = matrix.size(0) <= matrix.size(1)
        x = _over_norm(matrix, eps).to(dtype)
        for segment in segments:
            r = x @ x.mT if wide else x.mT @ x
            q, alpha = _polynomial(r, segment)
            x = torch.addmm(x, q, x, beta=alpha) if wide else torch.addmm(x, x, q, beta=alpha)
        matrix.copy_(x)


def _over_norm(x: Tensor, eps: float) -> Tensor:
    """Returns ``x / max(||x||_F, eps)``; the largest element goes first, to bound the squares."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    largest = x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    x = x / largest
    return x / torch.maximum(torch.linalg.vector_norm(x), eps / largest)


def _polynomial(r: Tensor, segment: Sequence[Triple]) -> tuple[Tensor, float]:
    """Returns Q and alpha: the steps of ``segment`` multiply X by Q + alpha I."""
    first, *later = segment
    a, z = first[0], _quadratic(r, first)
    if not later:
        return z, a  # a I stays outside, where rounding does not reach it
    q = z + a * torch.eye(len(r), dtype=r.dtype, device=r.device)
    for triple in later:
        rz = torch.addmm(r, r, z, beta=a)
        r = torch.addmm(rz, z, rz, beta=a)
        a, z = triple[0], _quadratic(r, triple)
        q = torch.addmm(q, q, z, beta=a)
    return q, 0.0


def _quadratic(r: Tensor, triple: Triple) -> Tensor:
    _, b, c = triple
    return torch.addmm(r, r, r, beta=b, alpha=c) if c else b * r


# One row for each matrix; csrc/newton_schulz/cpu.cpp reads the same columns.
STORAGE = (torch.float32, torch.bfloat16, torch.float16)


def _cpp(
    matrices: Sequence[Tensor],
    triples: Sequence[Triple],
    form: str,
    restarts: Sequence[int],
    dtype: torch.dtype,
    eps: float,
) -> None:
    register_flops()
    places = [_with_columns_side_by_side(matrix) for matrix in matrices]
    rows = [
        (place.data_ptr(), *place.shape, place.stride(0), STORAGE.index(place.dtype))
        for place in places
    ]
    flat = [number for triple in triples for number in triple]
    torch.ops.trm_fast.newton_schulz_rows_(torch.tensor(rows), flat, list(restarts), eps)
    _copy_back(matrices, places)


def _with_columns_side_by_side(matrix: Tensor) -> Tensor:
    """Returns the matrix, its transpose, with which the iteration commutes, or a copy."""
    if matrix.stride(1) == 1 or matrix.size(1) == 1:
        return matrix
    return matrix.mT if matrix.stride(0) == 1 or matrix.size(0) == 1 else matrix.contiguous()


def _copy_back(matrices: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    for matrix, place in zip(matrices, places, strict=True):
        if place.data_ptr() != matrix.data_ptr():
            matrix.copy_(place)


def _refuses(backend: str, call: Call) -> str | None:
    if backend == "reference":
        return None
    if torch.float64 in call.dtypes:
        return "runs float32, bfloat16 and float16; got float64, which runs on the reference"
    if backend == "cpp" and call.dtypes != {torch.bfloat16}:
        return f"multiplies in bfloat16 only; got {', '.join(sorted(map(str, call.dtypes)))}"
    if backend == "cpp" and not torch.ops.trm_fast.newton_schulz_cpu_ready():
        return "needs a CPU with AVX512-BF16"
    return None


# What torch.compile and other users of the dispatcher see.
_OPTIONS = "float[] coefficients, str method, ScalarType? dtype, float eps, str? backend=None"
_native.LIBRARY.define(f"newton_schulz(Tensor x, {_OPTIONS}) -> Tensor")
_native.LIBRARY.define(f"newton_schulz_(Tensor(a!)[] matrices, {_OPTIONS}) -> ()")
# What native code implements.
_native.LIBRARY.define(
    "newton_schulz_rows_(Tensor table, float[] coefficients, int[] restarts, float eps) -> ()"
)
_native.LIBRARY.define("newton_schulz_cpu_ready() -> bool")


def _unflattened(flat: Sequence[float]) -> list[Triple]:
    if len(flat) % 3:
        raise ValueError(f"newton_schulz: coefficients must be a, b, c of each step; got {flat}")
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]


def _from_dispatcher(
    x: Tensor,
    coefficients: Sequence[float],
    method: str,
    dtype: torch.dtype | None,
    eps: float,
    backend: str | None = None,
) -> Tensor:
    triples = _unflattened(coefficients)
    return newton_schulz(x, len(triples), triples, method, dtype=dtype, eps=eps, backend=backend)


def _from_dispatcher_(
    matrices: Sequence[Tensor],
    coefficients: Sequence[float],
    method: str,
    dtype: torch.dtype | None,
    eps: float,
    backend: str | None = None,
) -> None:
    triples = _unflattened(coefficients)
    newton_schulz_(matrices, len(triples), triples, method, dtype=dtype, eps=eps, backend=backend)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_native.LIBRARY.impl("newton_schulz", _from_dispatcher, "CompositeExplicitAutograd")
_native.LIBRARY.impl("newton_schulz_", _from_dispatcher_, "CompositeExplicitAutograd")
_native.register_fake("newton_schulz", _fake)
_native.register_fake("newton_schulz_")


def _examples(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Example]:
    shape = (1, 1, *shape)[-max(2, len(shape)) :]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    # Well conditioned, so that rounding is seen and not what an ill-posed question makes of it.
    x = (noise + 2 * sum(shape[-2:]) ** 0.5 * torch.eye(*shape[-2:])).to(device, dtype)
    return {method: _example(x, method) for method in METHODS}


def _example(x: Tensor, method: str) -> Example:
    def prepare(
        backend: str, real: torch.dtype | None
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        written = {"x": x.to(real or x.dtype, copy=True)}
        matrices = written["x"].view(-1, *x.shape[-2:]).unbind() if x.numel() else []
        return lambda: newton_schulz_(matrices, 5, "you", method, backend=backend), written

    # Each step rounds four matrices, and the slopes of these polynomials enlarge it hardly; sums in
    # float32 of up to 1000 products add to it.
    tolerance = 8 * torch.finfo(x.dtype).eps + 64 * torch.finfo(torch.float32).eps
    return Example(prepare, {"x": tolerance})


_op = Op(
    name="newton_schulz",
    implementations={
        "reference": _reference,
        "cpp": _cpp,
        "triton": "trm_fast.kernels.newton_schulz:newton_schulz_",
    },
    refuses=_refuses,
    examples=_examples,
    order={
        # By the rates of the instructions, not measured: AMX multiplies bfloat16 several times as
        # fast as AVX-512, and torch's library uses it.
        "cpu": ("reference", "cpp") if has_amx() else ("cpp", "reference"),
        "cuda": ("triton", "reference"),
    },
    slower="that of torch.optim.Muon took 1.4 to 4.0 times as long where measured",
)
