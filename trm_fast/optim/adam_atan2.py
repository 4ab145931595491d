"""``AdamATan2``: Adam with decoupled weight decay whose division is an arctangent."""

from typing import Any

from torch import Tensor

from trm_fast.ops import Settings
from trm_fast.optim._adaptive import AdaptiveOptimizer
from trm_fast.optim._states import Group
from trm_fast.optim.grokfast_adamw import pair
from trm_fast.optim.options import StepOptions, Unpack, split, with_options


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
            may differ between groups, and be changed between steps.
        lr: learning rate, >= 0; a tensor of one element is read on its device.
        betas: decay per step of the first and second moment, each in [0, 1).
        weight_decay: decay of the weights per unit of learning rate, >= 0.
        filter: gradient filter in front, as in ``GrokFastAdamW``; by default there is none.
        differentiable: lets autograd see the step; runs the reference.
        options: those of ``trm_fast.optim.StepOptions``.

    Raises:
        ValueError: an option is out of range or not finite, or a filter unknown.
        TypeError: an option is unknown, or no number.
        RuntimeError: ``fused`` with ``differentiable``, ``foreach`` or unsupported parameters, as
            in torch.
        BackendError: ``backend`` is unknown, or, at a step, cannot run the call.

    Example:
        >>> optimizer = trm_fast.AdamATan2(
        ...     model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1.0, weight_ema=0.999
        ... )
    """

    @with_options(StepOptions)
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        weight_decay: float | Tensor = 1e-2,
        *,
        filter: str | None = None,
        differentiable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": pair("AdamATan2", betas),
            "weight_decay": weight_decay,
            "filter": filter,
            "differentiable": differentiable,
        }
        of_groups, whole = split(options)
        super().__init__(params, defaults | of_groups, **whole)

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
