"""``GrokFastSGD``: SGD whose gradients pass through the GrokFast filter on their way."""

from typing import Any

from torch import Tensor

from trm_fast.ops import Settings
from trm_fast.optim._adaptive import AdaptiveOptimizer
from trm_fast.optim._states import Group, Keys
from trm_fast.optim.options import StepOptions, Unpack, split, with_options


class GrokFastSGD(AdaptiveOptimizer):
    """SGD with GrokFast (Lee et al. 2024, arXiv:2405.20233) in one pass over memory; drop-in for
    ``torch.optim.SGD``.

    With ``lamb=0`` or ``filter=None`` this is ``torch.optim.SGD``. The whole formula is on the page
    ``trm_fast/ops/adaptive_step.py``.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim``; every option below
            may differ between groups, and be changed between steps.
        lr: learning rate, >= 0; a tensor of one element is read on its device.
        momentum: decay per step of the momentum, in [0, 1); 0 keeps none.
        dampening: share of the gradient that stays out of the momentum, in [0, 1].
        weight_decay: L2 penalty, added to the filtered gradient, >= 0.
        nesterov: descends along the momentum of the next step; needs momentum and no dampening.
        filter: gradient filter, as in ``GrokFastAdamW``.
        differentiable: lets autograd see the step; runs the reference.
        options: those of ``trm_fast.optim.StepOptions``; the momentum is the state
            "momentum_buffer".

    Raises:
        ValueError: an option is out of range or not finite, or a filter unknown.
        TypeError: an option is unknown, or no number.
        RuntimeError: ``fused`` with ``differentiable``, ``foreach`` or unsupported parameters, as
            in torch.
        BackendError: ``backend`` is unknown, or, at a step, cannot run the call.

    Example:
        >>> optimizer = trm_fast.GrokFastSGD(model.parameters(), lr=0.1, momentum=0.9)
    """

    @with_options(StepOptions)
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
        differentiable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "filter": filter,
            "differentiable": differentiable,
        }
        of_groups, whole = split(options)
        super().__init__(params, defaults | of_groups, **whole)

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
