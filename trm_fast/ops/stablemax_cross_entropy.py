"""Cross-entropy of stablemax or softmax per sequence, with predictions and their correctness.

For each token with logits v_1 ... v_V and label y:

    s(v)   = v + 1 for v >= 0;  1 / (1 - v) for v < 0              "stablemax"
    s(v)   = exp(v)                                                "softmax"
    p_k    = s(v_k) / (s(v_1) + ... + s(v_V))
    loss   = mean of -log p_y over the valid tokens of a sequence; 0 if there is none

    dloss/dv_k = (p_k - [k = y]) / max(valid, 1) * h(v_k)
    h(v)       = 1 / (1 + |v|) for "stablemax", 1 for "softmax"

A token is valid if its label is not ignore_index; an ignored one has gradient 0, whatever its
logits are. Nothing is lost beside float64: stablemax is softmax of log s(v) = +-log(1 + |v|), and
with top the largest logit, at the lowest index if there are several,

    others    = sum over k != top of s(v_k) / s(v_top)
    -log p_y  = log(s(v_top) / s(v_y)) + log1p(others)
    1 - p_top = others / (1 + others)

are sums and quotients of positive numbers: neither a small loss nor a small gradient cancels, and
no logit overflows. A largest logit that is not finite (NaN counts as larger than all) makes
``others``, and with it loss and gradient, NaN.

Bytes: forward reads the logits once and writes 12 per token, backward reads them once and writes
their gradient; a vocabulary that does not fit the cache is read twice forward.

Sources: stablemax, Prieto et al. 2025, arXiv:2501.04697; the mean per sequence and ignored labels,
SamsungSAILMontreal/TinyRecursiveModels at e7b6871, which computes them in float64.
"""

from collections.abc import Callable, Sequence
from math import nan, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_fast import _native
from trm_fast._autograd import is_transformed, once_differentiable
from trm_fast._dispatch import Call, Example, Op, named_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32)
KINDS = ("stablemax", "softmax")


class TokenLoss(NamedTuple):
    """What ``stablemax_cross_entropy`` returns; only ``loss`` carries a gradient.

    Args:
        loss: mean over the valid labels of each sequence, [batch], float32, or float64 for float64
            logits.
        predictions: index of the largest logit, the lowest if there are several, [batch, length],
            int64.
        correct: number of valid labels that are predicted right, [batch], int64.
        valid: number of valid labels, [batch], int64.
        exact: whether there are valid labels and all of them are predicted right, [batch], bool.
    """

    loss: Tensor
    predictions: Tensor
    correct: Tensor
    valid: Tensor
    exact: Tensor


def stablemax_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    kind: str = "stablemax",
    backend: str | None = None,
) -> TokenLoss:
    """Returns the loss of each sequence and what was predicted; the formula is at the top.

    Args:
        logits: [batch, length, vocabulary] of any strides, float32, bfloat16, float16 or float64,
            vocabulary >= 1.
        labels: [batch, length], int64 or int32, each in [0, vocabulary) or ``ignore_index``.
        ignore_index: label of the tokens that do not count.
        kind: "stablemax" or "softmax".
        backend: the implementation that must run; None takes the first usable one, and inside
            torch.compile the reference, which the compiler fuses.

    Returns:
        A ``TokenLoss``. On a GPU, inside torch.compile and inside torch.func labels are not looked
        at by the host: one out of range makes the loss of its sequence, and the gradient of its
        token, NaN.

    Raises:
        ValueError: a shape or name is wrong, or, on the CPU, a label is out of range.
        TypeError: a dtype is not supported.
        BackendError: the named backend cannot run the call.
    """
    _check(logits, labels, ignore_index, kind)
    stablemax = kind == "stablemax"
    named = backend or named_backend()
    if torch.compiler.is_compiling() and named in (None, "reference"):
        return _reference(logits, labels, ignore_index, stablemax)
    choice = _op.choose(logits.device.type, frozenset({logits.dtype}), backend)
    if choice.backend != "cpp":  # which finds them on its way
        _check_labels(labels, logits.shape[-1], ignore_index)
    return choice.run(logits, labels, ignore_index, stablemax)  # type: ignore[no-any-return]


def _check(logits: Tensor, labels: Tensor, ignore_index: int, kind: str) -> None:
    owner = "stablemax_cross_entropy"
    for name, tensor, dtypes in (("logits", logits, DTYPES), ("labels", labels, LABEL_DTYPES)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{owner}: {name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in dtypes or tensor.layout != torch.strided:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(
                f"{owner}: {name} must be dense and one of {kinds}; got {tensor.layout} "
                f"{tensor.dtype}"
            )
    if logits.dim() != 3 or logits.shape[2] == 0:
        raise ValueError(
            f"{owner}: logits must be [batch, length, vocabulary >= 1]; got {tuple(logits.shape)}"
        )
    if labels.shape != logits.shape[:2] or labels.device != logits.device:
        raise ValueError(
            f"{owner}: labels must be {tuple(logits.shape[:2])} on {logits.device} as the logits; "
            f"got {tuple(labels.shape)} on {labels.device}"
        )
    if kind not in KINDS:
        raise ValueError(f"{owner}: kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{owner}: ignore_index must be an int; got {ignore_index!r}")


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Names the first label out of range; only on the CPU, where looking costs no wait."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or is_transformed():
        return
    outside = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if outside.any():
        place = outside.nonzero()[0].tolist()
        raise ValueError(
            f"stablemax_cross_entropy: labels must be in [0, {vocabulary}) or {ignore_index} "
            f"(ignore_index); got {labels[tuple(place)].item()} at {place}"
        )


def _log_stablemax(x: Tensor) -> Tensor:
    """Returns log s(x); neither branch sees what belongs to the other, where it would be NaN."""
    return torch.where(x < 0, -torch.log1p(-x.clamp(max=0)), torch.log1p(x.clamp(min=0)))


def _reference(logits: Tensor, labels: Tensor, ignore_index: int, stablemax: bool) -> TokenLoss:
    predictions = logits.detach().argmax(-1)
    is_valid = labels != ignore_index
    is_known = (labels >= 0) & (labels < logits.shape[-1]) | ~is_valid
    right = (predictions == labels) & is_valid
    correct, valid = right.sum(-1), is_valid.sum(-1)

    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    x = x.masked_fill(~is_valid[..., None], 0.0)
    scores = _log_stablemax(x) if stablemax else x
    place = predictions[..., None]
    top = scores.gather(-1, place)
    ratios = torch.exp(scores - top).scatter(-1, place, 0.0)
    # Added and not filled in, so that the gradient is NaN too.
    others = ratios.sum(-1) + (top - top)[..., 0] + torch.where(is_known, 0.0, nan)
    target = labels.long().clamp(0, logits.shape[-1] - 1)[..., None]
    # Without the zero the gradient of a token that is right would be 1 - 1 plus what it is.
    behind = (top - scores.gather(-1, target)).masked_fill(target == place, 0.0)[..., 0]
    token = (behind + torch.log1p(others)).masked_fill(~is_valid, 0.0)
    loss = token.sum(-1) / valid.clamp(min=1)
    return TokenLoss(loss, predictions, correct, valid, (correct == valid) & (valid > 0))


Kernels = tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]  # forward and backward


class _StablemaxCrossEntropy(torch.autograd.Function):
    """The loss by a pair of kernels; backward reads the logits again and ``others`` per token."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        stablemax: bool,
        kernels: Kernels,
    ) -> tuple[Tensor, ...]:
        forward, ctx.backward_kernel = kernels
        ctx.options = (ignore_index, stablemax)
        *outputs, others = forward(logits, labels, ignore_index, stablemax)
        _, predictions, correct, valid, exact = outputs
        ctx.save_for_backward(logits, labels, predictions, others, valid)
        ctx.mark_non_differentiable(predictions, correct, valid, exact)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable("stablemax_cross_entropy")
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        found = ctx.backward_kernel(grad.contiguous(), *ctx.saved_tensors, *ctx.options)
        return found, None, None, None, None


def _fused(
    logits: Tensor, labels: Tensor, ignore_index: int, stablemax: bool, kernels: Kernels
) -> TokenLoss:
    # Any stride between sequences will do, as of logits without their first positions.
    logits = logits.resolve_neg()
    if logits.stride()[1:] != (logits.shape[2], 1):
        logits = logits.contiguous()
    labels = labels.long().contiguous()
    if logits.requires_grad and torch.is_grad_enabled():
        return TokenLoss(
            *_StablemaxCrossEntropy.apply(logits, labels, ignore_index, stablemax, kernels)
        )
    return TokenLoss(*kernels[0](logits, labels, ignore_index, stablemax)[:5])


_native.LIBRARY.define(
    "stablemax_cross_entropy_forward(Tensor logits, Tensor labels, int ignore_index, "
    "bool stablemax) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_native.LIBRARY.define(
    "stablemax_cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, "
    "Tensor predictions, Tensor others, Tensor valid, int ignore_index, bool stablemax) -> Tensor"
)


def _fake_forward(logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, ...]:
    def make(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    batch, tokens = logits.shape[:1], logits.shape[:2]
    loss, others = make(batch, torch.float32), make(tokens, torch.float32)
    predictions, outside = make(tokens, torch.int64), make((), torch.bool)
    correct, valid = make(batch, torch.int64), make(batch, torch.int64)
    return loss, predictions, correct, valid, make(batch, torch.bool), others, outside


def _fake_backward(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_native.register_fake("stablemax_cross_entropy_forward", _fake_forward)
_native.register_fake("stablemax_cross_entropy_backward", _fake_backward)


def _cpp_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, stablemax: bool
) -> tuple[Tensor, ...]:
    op = torch.ops.trm_fast.stablemax_cross_entropy_forward.default
    *outputs, outside = op(logits, labels, ignore_index, stablemax)
    if not torch.compiler.is_compiling() and outside.item():
        _check_labels(labels, logits.shape[2], ignore_index)
    return tuple(outputs)


def _cpp_backward(*arguments: Any) -> Tensor:
    op = torch.ops.trm_fast.stablemax_cross_entropy_backward.default
    return op(*arguments)  # type: ignore[no-any-return]


def _cpp(logits: Tensor, labels: Tensor, ignore_index: int, stablemax: bool) -> TokenLoss:
    return _fused(logits, labels, ignore_index, stablemax, (_cpp_forward, _cpp_backward))


def _triton(logits: Tensor, labels: Tensor, ignore_index: int, stablemax: bool) -> TokenLoss:
    from trm_fast.kernels.stablemax_cross_entropy import backward, forward

    return _fused(logits, labels, ignore_index, stablemax, (forward, backward))


def _refuses(backend: str, call: Call) -> str | None:
    if backend != "reference" and torch.float64 in call.dtypes:
        return "runs float32, bfloat16 and float16; got float64, which runs on the reference"
    return None


def _examples(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Example]:
    """Of any shape, the last size is the vocabulary and the one before it the length."""
    shape = (1, 1, *shape)
    batch, length, vocabulary = prod(shape[:-2]), shape[-2], max(shape[-1], 1)
    generator = torch.Generator().manual_seed(0)
    drawn = 4 * torch.randn((batch, length, vocabulary), generator=generator)
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    labels[:, ::5] = -100
    return {kind: _example(drawn.to(device, dtype), labels.to(device), kind) for kind in KINDS}


def _example(drawn: Tensor, labels: Tensor, kind: str) -> Example:
    def prepare(
        backend: str, real: torch.dtype | None
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        logits = drawn.to(real or drawn.dtype, copy=True).requires_grad_()
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        written = {
            "loss": torch.empty(labels.shape[:1], dtype=exact, device=labels.device),
            "predictions": torch.empty_like(labels),
            "gradient": torch.empty_like(logits, requires_grad=False),
        }

        def call() -> None:
            found = stablemax_cross_entropy(logits, labels, kind=kind, backend=backend)
            (gradient,) = torch.autograd.grad(found.loss.sum(), logits)
            written["loss"].copy_(found.loss.detach())
            written["predictions"].copy_(found.predictions)
            written["gradient"].copy_(gradient)

        return call, written

    single = torch.finfo(torch.float32).eps
    # Some ten roundings in float32, of exponents up to 40 for "softmax"; the gradient is rounded
    # once more.
    tolerance = {"loss": 64 * single, "predictions": 0.0}
    tolerance["gradient"] = 64 * single + torch.finfo(drawn.dtype).eps
    return Example(prepare, tolerance)


_op = Op(
    name="stablemax_cross_entropy",
    implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
    refuses=_refuses,
    examples=_examples,
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
