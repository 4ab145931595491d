"""``GrokFastAdamW``: AdamW whose gradients pass through the GrokFast filter on their way."""

from typing import Any

from torch import Tensor

from trm_fast.ops import Settings
from trm_fast.optim._adaptive import AdaptiveOptimizer
from trm_fast.optim._states import Group
from trm_fast.optim.options import StepOptions, Unpack, split, with_options


class GrokFastAdamW(AdaptiveOptimizer):
    """AdamW with GrokFast (Lee et al. 2024, arXiv:2405.20233) in one pass over memory; drop-in for
    ``torch.optim.AdamW``.

    Each gradient is replaced, on its way into AdamW, by ``grad + lamb * mean``, where ``mean`` is a
    running mean of the gradients that starts at the first one. ``p.grad`` itself is only read. With
    ``lamb=0`` this is ``torch.optim.AdamW``. The whole formula is on the page
    ``trm_fast/ops/adaptive_step.py``.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim``; every option below
            may differ between groups, and be changed between steps.
        lr: learning rate, >= 0; a tensor of one element is read on its device.
        betas: decay per step of the first and second moment, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decay of the weights per unit of learning rate, >= 0.
        filter: "ema" is GrokFast. "ma" is its other form, with the mean of the last ``window``
            gradients (the paper: lamb 5). "projection" amplifies the part of the gradient along the
            mean, tensor by tensor; "cosine_gate" multiplies a tensor's gradient by lamb where its
            cosine with the mean is above 1/2, else divides by it. "highpass" is the opposite of
            GrokFast, ``grad + lamb * (grad - mean)``, which amplifies noise; it exists because some
            published trainers use it. None is no filter, and lets the state of one rest. Changed
            between steps, "ma" and the others, which remember different things, start anew.
        differentiable: lets autograd see the step; runs the reference.
        decoupled_weight_decay: False adds ``weight_decay * param`` to the filtered gradient, which
            makes it Adam.
        normalize_lr: divides the learning rate by ``1 + lamb`` at each step (filter "ema" only), so
            that the slow part moves the weights as fast as without filter; ``group["lr"]`` still
            shows the number given.
        options: ``alpha``, the decay of the mean (the paper: 0.8 to 0.99), ``lamb``, its weight
            (0.1 to 5), and all others of ``trm_fast.optim.StepOptions``.

    Raises:
        ValueError: an option is out of range or not finite, or a filter unknown.
        TypeError: an option is unknown, or no number.
        RuntimeError: ``fused`` with ``differentiable``, ``foreach`` or unsupported parameters, as
            in torch.
        BackendError: ``backend`` is unknown, or, at a step, cannot run the call.

    Example:
        >>> optimizer = trm_fast.GrokFastAdamW(model.parameters(), lr=1e-3)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()
    """

    @with_options(StepOptions)
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        *,
        filter: str | None = "ema",
        differentiable: bool = False,
        decoupled_weight_decay: bool = True,
        normalize_lr: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": pair("GrokFastAdamW", betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "filter": filter,
            "differentiable": differentiable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "normalize_lr": normalize_lr,
        }
        of_groups, whole = split(options)
        super().__init__(params, defaults | of_groups, **whole)

    def _settings(self, group: Group) -> Settings:
        beta1, beta2 = pair("GrokFastAdamW", group["betas"])
        settings = Settings(
            group["lr"],
            beta1,
            beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            rule="adamw" if group["decoupled_weight_decay"] else "adam",
            **self._filter_settings(group),
        )
        if group["normalize_lr"] and group["filter"] == "ema":
            settings.lr = settings.lr / (1 + settings.lamb)
        return settings


def pair(owner: str, betas: Any) -> tuple[float, float]:
    """Returns two decays as numbers; tensors of one element are read once, here."""
    both = tuple(betas) if isinstance(betas, (tuple, list)) else ()
    if len(both) != 2:
        raise ValueError(f"{owner}: betas must be two numbers in [0, 1); got {betas!r}")
    beta1, beta2 = (beta.item() if isinstance(beta, Tensor) else beta for beta in both)
    for index, beta in enumerate((beta1, beta2)):
        if not isinstance(beta, (int, float)):
            raise TypeError(f"{owner}: betas[{index}] must be a number; got {beta!r}")
        if not 0 <= beta < 1:
            raise ValueError(f"{owner}: betas[{index}] must be in [0, 1); got {beta!r}")
    return beta1, beta2
