"""``AdamATan2``: Adam with decoupled weight decay whose division is an arctangent."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trm_fast.ops import Settings
from trm_fast.optim._adaptive import AdaptiveOptimizer
from trm_fast.optim._states import Group
from trm_fast.optim.grokfast_adamw import pair


class AdamATan2(AdaptiveOptimizer):
    """AdamW with ``atan2(m, sqrt(v))`` in place of ``m / (sqrt(v) + eps)`` (Everett et al. 2024,
    arXiv:2407.05872), in one pass over memory; drop-in for the package ``adam_atan2`` on any
    machine.

    No eps, and no update is larger than ``lr * pi / 2``, bias correction aside. Official TRM and
    HRM train with ``AdamATan2(params, lr=0, betas=(0.9, 0.95), weight_decay=...)`` and a scheduler
    that sets the learning rate before each step. The whole formula is on the page
    ``trm_fast/ops/adaptive_step.py``.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim``; every option below
            except ``backend``, ``state_dtype`` and ``clip_norm`` may differ between groups, and may
            be changed between steps.
        lr: learning rate, >= 0; a tensor of one element is read on its device.
        betas: decay per step of the first and second moment, each in [0, 1).
        weight_decay: decay of the weights per unit of learning rate, >= 0.
        filter, alpha, lamb, after_step, window, warmup, proj_eps: gradient filter in front, as in
            ``GrokFastAdamW``; by default there is none.
        maximize, capturable, differentiable, foreach, fused, backend, weight_ema, state_dtype,
            clip_norm: as in ``GrokFastAdamW``.

    Raises:
        ValueError: an option is out of range, not finite or unknown.
        RuntimeError: ``fused`` with ``differentiable``, ``foreach`` or unsupported parameters, as
            in torch.
        BackendError: ``backend`` is unknown, or, at a step, cannot run the call.

    Example:
        >>> optimizer = trm_fast.AdamATan2(
        ...     model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1.0, weight_ema=0.999
        ... )
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        weight_decay: float | Tensor = 1e-2,
        *,
        filter: str | None = None,
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
            "betas": pair("AdamATan2", betas),
            "weight_decay": weight_decay,
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
        beta1, beta2 = pair("AdamATan2", group["betas"])
        return Settings(
            group["lr"],
            beta1,
            beta2,
            weight_decay=group["weight_decay"],
            rule="atan2",
            **self._filter_settings(group),
        )
