"""``MuGrokfast``: Muon for hidden matrices and AdamW for the rest, behind one gradient filter."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from trm_fast.ops import Settings
from trm_fast.ops._newton_schulz_sets import KELLER
from trm_fast.optim._states import Group, State
from trm_fast.optim.grokfast_adamw import pair
from trm_fast.optim.muon import Coefficients, Muon
from trm_fast.optim.options import StepOptions, Unpack, with_options

ALGORITHMS = ("muon", "adamw")


class Preset(NamedTuple):
    """The settings of one phase of a published training plan.

    Args:
        muon_lr: learning rate of the hidden matrices.
        lr: learning rate of the rest.
        lamb: weight of the filter's mean.
        qk_clip: largest attention logit, for ``QKClip``.
        kl_coefficient: weight of a divergence from a reference model, a matter of the loss.
        straight_through: whether the phase trains quantised weights, a matter of the model.
    """

    muon_lr: float
    lr: float
    lamb: float
    qk_clip: float
    kl_coefficient: float = 0.0
    straight_through: bool = False

    def options(self) -> dict[str, float]:
        """Returns what ``MuGrokfast`` takes of it."""
        return {"muon_lr": self.muon_lr, "lr": self.lr, "lamb": self.lamb}


PRESETS: Mapping[int, Preset] = {
    1: Preset(1e-3, 1e-3, 0.3, 30.0),
    3: Preset(5e-4, 5e-4, 0.1, 25.0, 0.1),
    5: Preset(1e-3, 1e-3, 2.0, 30.0, straight_through=True),
    6: Preset(1e-4, 1e-4, 0.2, 30.0),
    7: Preset(5e-4, 5e-4, 0.15, 28.0, 0.05),
}


class MuGrokfast(Muon):
    """Muon for groups with ``algorithm="muon"``, AdamW for those with ``algorithm="adamw"``, both
    along gradients that went through the GrokFast filter.

    ``split_params(model, heads=...)`` makes the groups. A Newton-Schulz result does not depend on
    the length of what it is given, so for hidden matrices a filter changes only the direction of
    the update. ``QKClip`` belongs behind this optimizer where attention logits grow. The defaults
    are those of ``PRESETS[1]``; of another phase: ``MuGrokfast(groups, **PRESETS[5].options())``.

    Args:
        params: groups, each with the key "algorithm"; every option below may differ between groups,
            and be changed between steps. A group without "lr" of its own gets ``muon_lr`` or
            ``lr``, under the key "lr".
        lr: learning rate of the groups with AdamW, >= 0.
        muon_lr: learning rate of the groups with Muon, >= 0.
        betas: of AdamW: decay per step of the first and second moment, each in [0, 1).
        weight_decay: decay of the weights per unit of learning rate, of both, >= 0.
        momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn, row_splits, batch_dims,
            ns_method, ns_dtype: as in ``Muon``; ``adamw_eps`` is the eps of AdamW.
        filter: the gradient filter of both, as in ``GrokFastAdamW``.
        options: those of ``trm_fast.optim.StepOptions``; ``lamb`` is 0.3 by default.

    Raises:
        ValueError: an option is out of range or not finite, a filter unknown, a group does not say
            its algorithm, or a parameter does not suit it.
        TypeError: a parameter for Muon is complex, or an option unknown or no number.
        BackendError: ``backend`` is unknown, or, at a step, cannot run the call.

    Example:
        >>> groups = trm_fast.optim.split_params(model, heads=[model.lm_head])
        >>> optimizer = trm_fast.MuGrokfast(groups, muon_lr=0.02, lr=1e-3, lamb=0.3)
    """

    @with_options(StepOptions, lamb=0.3)
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        muon_lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float | Tensor = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = KELLER,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw_eps: float = 1e-8,
        row_splits: int | Sequence[int] = 1,
        batch_dims: int = 0,
        ns_method: str = "auto",
        ns_dtype: torch.dtype | None = torch.bfloat16,
        filter: str | None = "ema",
        **options: Unpack[StepOptions],
    ) -> None:
        self._rates = {"muon": muon_lr, "adamw": lr}
        self._more_defaults = {"betas": pair("MuGrokfast", betas), "adamw_eps": adamw_eps}
        super().__init__(
            params, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps,
            adjust_lr_fn, row_splits=row_splits, batch_dims=batch_dims, ns_method=ns_method,
            ns_dtype=ns_dtype, filter=filter, **options,
        )  # fmt: skip

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group with the key "algorithm"; see ``Muon.add_param_group``."""
        algorithm = param_group.get("algorithm") if isinstance(param_group, dict) else None
        if algorithm not in ALGORITHMS:
            raise ValueError(
                "MuGrokfast: each group must say its algorithm, 'muon' or 'adamw'; got "
                f"{algorithm!r}: make the groups with split_params(model, heads=...)"
            )
        super().add_param_group({"lr": self._rates[algorithm], **param_group})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer; see ``Muon.load_state_dict``.

        Raises:
            ValueError: also if a group says another algorithm than the one it has here; nothing is
                loaded then.
        """
        handle = self.register_load_state_dict_pre_hook(_check_algorithms)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _orthogonalises(self, group: Group) -> bool:
        return bool(group["algorithm"] == "muon")

    def _settings(self, group: Group) -> Settings:
        if self._orthogonalises(group):
            return super()._settings(group)
        beta1, beta2 = pair("MuGrokfast", group["betas"])
        return Settings(
            group["lr"],
            beta1,
            beta2,
            eps=group["adamw_eps"],
            weight_decay=group["weight_decay"],
            **self._filter_settings(group),
        )

    def __getstate__(self) -> State:
        return super().__getstate__() | {"_rates": self._rates}


def _check_algorithms(optimizer: Optimizer, state_dict: Group) -> None:
    pairs = zip(state_dict["param_groups"], optimizer.param_groups, strict=False)
    for position, (loaded, ours) in enumerate(pairs):
        if loaded.get("algorithm") != ours["algorithm"]:
            raise ValueError(
                f"MuGrokfast: the algorithm of group {position} must be {ours['algorithm']!r} in "
                f"the state dict, as it is here; got {loaded.get('algorithm')!r}"
            )
