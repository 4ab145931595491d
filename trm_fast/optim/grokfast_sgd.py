"""``GrokFastSGD``: SGD whose gradients pass through the GrokFast filter on their way."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trm_fast.ops import Settings
from trm_fast.optim._adaptive import AdaptiveOptimizer
from trm_fast.optim._plan import Keys
from trm_fast.optim._states import Group


class GrokFastSGD(AdaptiveOptimizer):
    """SGD with GrokFast (Lee et al. 2024, arXiv:2405.20233) in one pass over memory; drop-in for
    ``torch.optim.SGD``.

    With ``lamb=0`` or ``filter=None`` this is ``torch.optim.SGD``. The whole formula is on the page
    ``trm_fast/ops/adaptive_step.py``.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim``; every option below
            except ``backend``, ``state_dtype`` and ``clip_norm`` may differ between groups, and may
            be changed between steps.
        lr: learning rate, >= 0; a tensor of one element is read on its device.
        momentum: decay per step of the momentum, in [0, 1); 0 keeps none.
        dampening: share of the gradient that stays out of the momentum, in [0, 1].
        weight_decay: L2 penalty, added to the filtered gradient, >= 0.
        nesterov: descends along the momentum of the next step; needs momentum and no dampening.
        filter, alpha, lamb, after_step, window, warmup, proj_eps: the gradient filter, as in
            ``GrokFastAdamW``.
        maximize, capturable, differentiable, foreach, fused, backend, weight_ema, state_dtype,
            clip_norm: as in ``GrokFastAdamW``; the momentum is the state "momentum_buffer".

    Raises:
        ValueError: an option is out of range, not finite or unknown.
        RuntimeError: ``fused`` with ``differentiable``, ``foreach`` or unsupported parameters, as
            in torch.
        BackendError: ``backend`` is unknown, or, at a step, cannot run the call.

    Example:
        >>> optimizer = trm_fast.GrokFastSGD(model.parameters(), lr=0.1, momentum=0.9)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        filter: str | None = "ema",
        alpha: float = 0.98,
        lamb: float | Tensor = 2.0,
        after_step: int = 0,
        window: int = 100,
        warmup: bool = True,
        proj_eps: float = 1e-10,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        backend: str | None = None,
        weight_ema: float | None = None,
        state_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "filter": filter,
            "alpha": alpha,
            "lamb": lamb,
            "after_step": after_step,
            "window": window,
            "warmup": warmup,
            "proj_eps": proj_eps,
            "weight_ema": weight_ema,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults, backend, state_dtype, clip_norm)

    def _settings(self, group: Group) -> Settings:
        momentum = check_momentum("GrokFastSGD", group["momentum"])
        if group["nesterov"] and (momentum == 0 or group["dampening"] != 0):
            raise ValueError(
                "GrokFastSGD: nesterov must come with momentum > 0 and dampening 0; got momentum "
                f"{momentum!r} and dampening {group['dampening']!r}"
            )
        return Settings(
            group["lr"],
            momentum,
            weight_decay=group["weight_decay"],
            rule="sgd",
            dampening=group["dampening"],
            nesterov=bool(group["nesterov"]),
            **self._filter_settings(group),
        )

    def _moments_of(self, group: Group) -> Keys:
        return {"exp_avg": "momentum_buffer"} if group["momentum"] != 0 else {}


def check_momentum(owner: str, momentum: Any) -> float:
    """Returns ``momentum``, a number in [0, 1)."""
    if not isinstance(momentum, (int, float)):
        raise TypeError(f"{owner}: momentum must be a number; got {momentum!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"{owner}: momentum must be in [0, 1); got {momentum!r}")
    return momentum
