"""``GrokFastAdamW``: AdamW whose gradients pass through the GrokFast filter on their way."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trm_fast.ops.adaptive_step import Settings
from trm_fast.optim._adaptive import AdaptiveOptimizer, Group


class GrokFastAdamW(AdaptiveOptimizer):
    """AdamW with GrokFast (Lee et al. 2024, arXiv:2405.20233) in one pass over memory; drop-in for
    ``torch.optim.AdamW``.

    Each gradient is replaced, on its way into AdamW, by ``grad + lamb * mean``, where ``mean`` is a
    running mean of the gradients that starts at the first one. ``p.grad`` itself is only read. With
    ``lamb=0`` this is ``torch.optim.AdamW``. The whole formula is on the page
    ``trm_fast/ops/adaptive_step.py``.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim``; every option below
            except ``backend`` and ``state_dtype`` may differ between groups, and may be changed
            between steps.
        lr: learning rate, >= 0; a tensor of one element is read on its device.
        betas: decay per step of the first and second moment, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decay of the weights per unit of learning rate, >= 0.
        alpha: decay per step of the running mean, in [0, 1]. The paper advises 0.8 to 0.99.
        lamb: weight of the running mean, >= 0; the paper advises 0.1 to 5.
        filter: "ema" is GrokFast. "highpass" is its opposite, ``grad + lamb * (grad - mean)``,
            which amplifies noise; it exists because some published trainers use it. None is no
            filter.
        after_step: number of first steps without filter; the mean starts at the first gradient
            behind them.
        maximize: ascends instead; negates the gradient before the filter.
        capturable: allows a step inside a CUDA graph. A replay reads ``lr``, ``weight_decay`` and
            ``lamb`` again only where they are tensors on the device; numbers are burnt in.
        differentiable: lets autograd see the step; runs the reference.
        foreach: accepted for ``torch.optim``'s sake; all tensors of a group always take their step
            together.
        fused: True refuses parameters that a fused kernel could not take, as in torch; False runs
            the reference.
        backend: "reference", "cpp", "cuda" or "triton" must run; None takes the first usable one.
        weight_ema: decay per step of an average of the weights, in [0, 1], kept in
            ``state[p]["weight_ema"]``; it starts at the weights before the first step. None keeps
            none.
        decoupled_weight_decay: False adds ``weight_decay * param`` to the filtered gradient, which
            makes it Adam.
        state_dtype: torch.bfloat16, or a mapping from "exp_avg", "exp_avg_sq", "grok_exp_avg" and
            "weight_ema" to a dtype, stores states in 16 bits with stochastic rounding; default
            float32. float64 parameters keep float64.
        normalize_lr: divides the learning rate by ``1 + lamb`` at each step (filter "ema" only), so
            that the slow part moves the weights as fast as without filter; ``group["lr"]`` still
            shows the number given.

    Raises:
        ValueError: an option is out of range, not finite or unknown.
        RuntimeError: ``fused`` with ``differentiable``, ``foreach`` or unsupported parameters, as
            in torch.
        BackendError: ``backend`` is unknown, or, at a step, cannot run the call.

    Example:
        >>> optimizer = trm_fast.GrokFastAdamW(model.parameters(), lr=1e-3)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        *,
        alpha: float = 0.98,
        lamb: float | Tensor = 2.0,
        filter: str | None = "ema",
        after_step: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        backend: str | None = None,
        weight_ema: float | None = None,
        decoupled_weight_decay: bool = True,
        state_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        normalize_lr: bool = False,
    ) -> None:
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if differentiable and backend not in (None, "reference"):
            raise ValueError(
                f"GrokFastAdamW: backend must be 'reference' with differentiable; got {backend!r}"
            )
        defaults = {
            "lr": lr,
            "betas": _pair(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "lamb": lamb,
            "filter": filter,
            "after_step": after_step,
            "weight_ema": weight_ema,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "foreach": foreach,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "normalize_lr": normalize_lr,
        }
        super().__init__(params, defaults, backend, state_dtype)

    def _settings(self, group: Group) -> Settings:
        beta1, beta2 = _pair(group["betas"])
        filter, weight_ema = group["filter"], group["weight_ema"]
        if filter not in ("ema", "highpass", None):
            raise ValueError(
                f"GrokFastAdamW: filter must be 'ema', 'highpass' or None; got {filter!r}"
            )
        settings = Settings(
            group["lr"],
            beta1,
            beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            rule="adamw" if group["decoupled_weight_decay"] else "adam",
            filter="none" if filter is None else filter,
            alpha=group["alpha"],
            lamb=group["lamb"],
            after_step=group["after_step"],
            maximize=group["maximize"],
            weight_ema=0.0 if weight_ema is None else weight_ema,
            owner="GrokFastAdamW",
        )
        if group["normalize_lr"] and filter == "ema":
            settings.lr = settings.lr / (1 + settings.lamb)
        return settings


def _pair(betas: Any) -> tuple[float, float]:
    """Returns two decays as numbers; tensors of one element are read once, here."""
    pair = tuple(betas) if isinstance(betas, (tuple, list)) else ()
    if len(pair) != 2:
        raise ValueError(f"GrokFastAdamW: betas must be two numbers in [0, 1); got {betas!r}")
    beta1, beta2 = (beta.item() if isinstance(beta, Tensor) else beta for beta in pair)
    for index, beta in enumerate((beta1, beta2)):
        if not isinstance(beta, (int, float)):
            raise TypeError(f"GrokFastAdamW: betas[{index}] must be a number; got {beta!r}")
        if not 0 <= beta < 1:
            raise ValueError(f"GrokFastAdamW: betas[{index}] must be in [0, 1); got {beta!r}")
    return beta1, beta2
