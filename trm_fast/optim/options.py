"""The options that the optimizers have in common, each declared once: name, type, default, meaning.

An optimizer takes them as keywords: ``**options: Unpack[StepOptions]``, completed and checked by
``with_options``. CONTRIBUTING.md says what a new one needs.
"""

import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any, ParamSpec, TypedDict, get_type_hints

import torch
from torch import Tensor

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
else:
    from typing_extensions import Unpack as Unpack

Arguments = ParamSpec("Arguments")


# Annotated[type, default]
class FilterOptions(TypedDict, total=False):
    """Options of the gradient filter; what each filter does is on the page
    ``trm_fast/ops/_adaptive_filters.py``.

    Each may differ between groups, and be changed between steps.

    Args:
        alpha: decay per step of the running mean, in [0, 1]. The paper advises 0.8 to 0.99.
        lamb: weight of the running mean, >= 0; the paper advises 0.1 to 5. It may be changed
            between steps; 0 lets the gradient pass and keeps the mean up to date.
        after_step: number of first steps without filter; the mean starts at the first gradient
            behind them ("ma" remembers gradients from the first step on).
        window: number of gradients that "ma" averages, >= 1. It keeps all of them: 4 bytes each per
            parameter, or 2 with ``state_dtype={"grok_ring": torch.bfloat16}``. Another number is
            refused while the state "grok_ring" has this one.
        warmup: lets gradients pass "ma" unchanged until its window is full, as the published code
            does; False averages those there are, as the paper's algorithm does.
        proj_eps: "projection" leaves a tensor alone while the squared norm of its mean is not above
            this.
    """

    alpha: Annotated[float, 0.98]
    lamb: Annotated[float | Tensor, 2.0]
    after_step: Annotated[int, 0]
    window: Annotated[int, 100]
    warmup: Annotated[bool, True]
    proj_eps: Annotated[float, 1e-10]


class StepOptions(FilterOptions, total=False):
    """Options of every optimizer that filters while it steps: those of ``FilterOptions``, and more.

    All except ``backend``, ``state_dtype`` and ``clip_norm`` may differ between groups, and be
    changed between steps.

    Args:
        maximize: ascends instead; negates the gradient before the filter.
        capturable: allows a step inside a CUDA graph. A replay reads ``lr``, ``weight_decay`` and
            ``lamb`` again only where they are tensors on the device; numbers are burnt in.
        foreach: accepted for ``torch.optim``'s sake; all tensors of a group always take their step
            together.
        fused: True refuses parameters that a fused kernel could not take, as in torch; False runs
            the reference.
        backend: "reference", "cpp", "cuda" or "triton" must run; None takes the first usable one.
        weight_ema: decay per step of an average of the weights, in [0, 1], kept in
            ``state[p]["weight_ema"]``; it starts at the weights before the first step. None keeps
            none.
        state_dtype: torch.bfloat16, or a mapping from "exp_avg", "exp_avg_sq", "momentum_buffer",
            "grok_exp_avg", "grok_ring" and "weight_ema" to a dtype, stores states in 16 bits with
            stochastic rounding; default float32. float64 parameters keep float64.
        clip_norm: scales all gradients of a step down to this Euclidean norm, before the filter, as
            ``torch.nn.utils.clip_grad_norm_`` would, without a host sync; ``grad_norm`` then holds
            the norm that was found. None does not clip.
    """

    maximize: Annotated[bool, False]
    capturable: Annotated[bool, False]
    foreach: Annotated[bool | None, None]
    fused: Annotated[bool | None, None]
    backend: Annotated[str | None, None]
    weight_ema: Annotated[float | None, None]
    state_dtype: Annotated[torch.dtype | Mapping[str, torch.dtype] | None, None]
    clip_norm: Annotated[float | None, None]


# Options that belong to the optimizer as a whole and not to its groups.
WHOLE = ("backend", "state_dtype", "clip_norm")


def _declared(kind: Any) -> dict[str, Parameter]:
    """Returns the options of a TypedDict as parameters, in its order."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=hint.__metadata__[0],
            annotation=hint.__origin__,
        )
        for name, hint in hints.items()
    }


FILTER_OPTIONS = tuple(_declared(FilterOptions))


def with_options(
    kind: Any, **defaults: Any
) -> Callable[[Callable[Arguments, None]], Callable[Arguments, None]]:
    """Completes the ``**options`` of an ``__init__`` and refuses unknown ones.

    Inside, ``options`` has a value for every name; ``inspect.signature`` shows names and defaults.

    Args:
        kind: ``FilterOptions`` or ``StepOptions``.
        defaults: of options whose default is another one in this class.
    """
    declared = _declared(kind)
    declared |= {name: declared[name].replace(default=value) for name, value in defaults.items()}

    def completed(init: Callable[Arguments, None]) -> Callable[Arguments, None]:
        own = [p for p in signature(init).parameters.values() if p.kind != Parameter.VAR_KEYWORD]
        known = dict.fromkeys([*(p.name for p in own[1:]), *declared])

        @wraps(init)
        def wrapped(*arguments: Arguments.args, **options: Arguments.kwargs) -> None:
            unknown = [name for name in options if name not in known]
            if unknown:
                owner = type(arguments[0]).__name__
                near = get_close_matches(unknown[0], known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(
                    f"{owner}: options must be among {', '.join(known)}; got {unknown[0]!r}{hint}"
                )
            missing = {n: p.default for n, p in declared.items() if n not in options}
            init(*arguments, **missing, **options)

        wrapped.__signature__ = signature(init).replace(  # type: ignore[attr-defined]
            parameters=[*own, *declared.values()]
        )
        return wrapped

    return completed


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of groups, and those of the optimizer as a whole."""
    groups = {name: value for name, value in options.items() if name not in WHOLE}
    return groups, {name: options[name] for name in WHOLE}
