"""What a fused call would pass over in the modules that it stands for: hooks and other code."""

from itertools import chain

from torch import nn
from torch.nn.modules import module as torch_module

# Hooks of every module of the process.
_FORWARD = torch_module._global_forward_hooks
_BEFORE = torch_module._global_forward_pre_hooks
_BACKWARD = torch_module._global_backward_hooks
_BEFORE_BACKWARD = torch_module._global_backward_pre_hooks


def is_hooked(module: nn.Module) -> bool:
    """Returns whether a call of a module runs hooks, or a ``forward`` of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        # Written out, as this is asked of every module of a network in every call.
        or ((_FORWARD or _BEFORE or _BACKWARD or _BEFORE_BACKWARD) and _has_global_hooks())
    )


def _has_global_hooks() -> bool:
    """Returns whether there are hooks but for torch's own, such as its counter of FLOPs sets, which
    only note the names of modules."""
    hooks = chain(*(each.values() for each in (_FORWARD, _BEFORE, _BACKWARD, _BEFORE_BACKWARD)))
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks)


def overrides(module: nn.Module, base: type[nn.Module], *names: str) -> str | None:
    """Returns the first of these methods that are not those of ``base``, in a class derived from it
    or set on the module itself; None if all are."""
    kind = type(module)
    for name in names:
        if name in module.__dict__ or (
            kind is not base and getattr(kind, name, None) is not getattr(base, name, None)
        ):
            return name
    return None
