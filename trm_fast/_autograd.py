"""What fused forms owe to autograd: a fused form knows first derivatives in reverse mode alone.

Whatever else is asked for is answered by the reference, which is plain torch, or refused by name.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trm_fast._compiler import constant_result
from trm_fast._errors import BackendError

Backward = Callable[..., Any]
_levels_of_functorch = torch._C._functorch.peek_interpreter_stack
_is_wrapper = torch._C._functorch.is_functorch_wrapped_tensor


@constant_result  # guarded by the compiler itself
def is_transformed() -> bool:
    """Returns whether torch rewrites what runs: inside ``torch.func`` and forward-mode levels.

    There tensors may be wrappers whose memory, gradients and tangents only torch's own operators
    follow. ``torch.autograd.forward_ad`` opens a level of its own, and ``torch.func.jvp`` both.
    """
    return _levels_of_functorch() is not None or forward_ad._current_level >= 0


def check_not_wrapped(op: str, tensors: Iterable[Tensor]) -> None:
    """Raises for an op that writes to memory by address, where a tensor is a wrapper without any.

    Raises:
        BackendError: a tensor belongs to a transform of torch.func.
    """
    if _levels_of_functorch() is not None and any(map(_is_wrapper, tensors)):
        raise BackendError(
            f"{op}: must be called outside of torch.func, as it overwrites memory by address; got "
            "tensors of a transform: call it on the results, behind vmap or grad"
        )


def once_differentiable(op: str) -> Callable[[Backward], Backward]:
    """Marks the backward pass of a fused form of ``op`` as one without a derivative.

    torch's mark of the same name gives gradients of gradients up in silence where the incoming
    gradient is a constant, as in a gradient penalty on ``out.sum()``.
    """

    def mark(backward: Backward) -> Backward:
        @wraps(backward)
        def run(ctx: Any, *grads: Tensor | None) -> Any:
            with torch.no_grad():
                found = backward(ctx, *grads)
            # The compiler traces no second derivative, and says so itself.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return found
            results = found if isinstance(found, tuple) else (found,)
            kept = _RefusesBackward.apply(op, *map(_leaf, results))
            return kept if isinstance(found, tuple) else kept[0]

        return run

    return mark


def _leaf(result: Tensor | None) -> Tensor | None:
    return None if result is None else result.detach().requires_grad_()


class _RefusesBackward(torch.autograd.Function):
    """Lets gradients through that must not be differentiated."""

    @staticmethod
    def forward(ctx: Any, op: str, *results: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return tuple(None if result is None else result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise BackendError(
            f"{ctx.op}: gradients of gradients need the reference, as fused forms have first "
            'derivatives only; give backend="reference", or run forward and backward inside '
            'trm_fast.use_backend("reference")'
        )
