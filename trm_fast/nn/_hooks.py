"""What a fused call must know of modules that it does not call."""

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Returns whether someone waits for calls of a module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
