"""Whether a module has hooks: a fused call does not call the modules it stands for."""

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Returns whether a module has hooks that a call of it would run."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
