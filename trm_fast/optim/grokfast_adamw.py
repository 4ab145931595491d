"""``GrokFastAdamW``: AdamW whose gradients pass through the GrokFast filter on their way."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trm_fast.ops import Settings
from trm_fast.optim._adaptive import AdaptiveOptimizer
from trm_fast.optim._states import Group


class GrokFastAdamW(AdaptiveOptimizer):
    """AdamW with GrokFast (Lee et al. 2024, arXiv:2405.20233) in one pass over memory; drop-in for
    ``torch.optim.AdamW``.

    Each gradient is replaced, on its way into AdamW, by ``grad + lamb * mean``, where ``mean`` is a
    running mean of the gradients that starts at the first one. ``p.grad`` itself is only read. With
    ``lamb=0`` this is ``torch.optim.AdamW``. The whole formula is on the page
    ``trm_fast/ops/adaptive_step.py``.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim``; every option below
            except ``backend``, ``state_dtype`` and ``clip_norm`` may differ between groups, and may
            be changed between steps.
        lr: learning rate, >= 0; a tensor of one element is read on its device.
        betas: decay per step of the first and second moment, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decay of the weights per unit of learning rate, >= 0.
        alpha: decay per step of the running mean, in [0, 1]. The paper advises 0.8 to 0.99.
        lamb: weight of the running mean, >= 0; the paper advises 0.1 to 5. It may be changed
            between steps; 0 lets the gradient pass and keeps the mean up to date.
        filter: "ema" is GrokFast. "ma" is its other form, with the mean of the last ``window``
            gradients (the paper: lamb 5). "projection" amplifies the part of the gradient along the
            mean, tensor by tensor; "cosine_gate" multiplies a tensor's gradient by lamb where its
            cosine with the mean is above 1/2, else divides by it. "highpass" is the opposite of
            GrokFast, ``grad + lamb * (grad - mean)``, which amplifies noise; it exists because some
            published trainers use it. None is no filter, and lets the state of one rest. Changed
            between steps, "ma" and the others, which remember different things, start anew.
        after_step: number of first steps without filter; the mean starts at the first gradient
            behind them ("ma" remembers gradients from the first step on).
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
        state_dtype: torch.bfloat16, or a mapping from "exp_avg", "exp_avg_sq", "grok_exp_avg",
            "grok_ring" and "weight_ema" to a dtype, stores states in 16 bits with stochastic
            rounding; default float32. float64 parameters keep float64.
        window: number of gradients that "ma" averages, >= 1. It keeps all of them: 4 bytes each per
            parameter, or 2 with ``state_dtype={"grok_ring": torch.bfloat16}``. Another number is
            refused while the state "grok_ring" has this one.
        warmup: lets gradients pass "ma" unchanged until its window is full, as the published code
            does; False averages those there are, as the paper's algorithm does.
        proj_eps: "projection" leaves a tensor alone while the squared norm of its mean is not above
            this.
        clip_norm: scales all gradients of a step down to this Euclidean norm, before the filter, as
            ``torch.nn.utils.clip_grad_norm_`` would, without a host sync; ``grad_norm`` then holds
            the norm that was found. None does not clip.
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
        window: int = 100,
        warmup: bool = True,
        proj_eps: float = 1e-10,
        clip_norm: float | None = None,
        normalize_lr: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": pair("GrokFastAdamW", betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "lamb": lamb,
            "filter": filter,
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
            "decoupled_weight_decay": decoupled_weight_decay,
            "normalize_lr": normalize_lr,
        }
        super().__init__(params, defaults, backend, state_dtype, clip_norm)

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
