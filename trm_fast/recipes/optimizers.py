"""The optimizer of a run and its schedule, from settings; for any model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from trm_fast.ops import FILTERS, Filter
from trm_fast.optim import AdamATan2, GrokFastAdamW, MuGrokfast
from trm_fast.optim.groups import split_params
from trm_fast.optim.schedules import Schedule, warmup_constant, warmup_cosine

Name = Literal["grokfast_adamw", "adam_atan2", "adamw", "mugrokfast"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, gradient filter and learning rates.

    Args:
        name: grokfast_adamw, adam_atan2 (the official one), adamw (torch's), or mugrokfast (Muon
            for the matrices of the blocks, behind the filter).
        lr: learning rate after the warm-up.
        muon_lr: learning rate of the matrices with mugrokfast.
        betas: decay of the two moments per step, each in [0, 1).
        weight_decay: decoupled weight decay, >= 0.
        filter: gradient filter of grokfast_adamw and mugrokfast; none turns it off.
        alpha: decay of the filter's running mean, in [0, 1].
        lamb: weight of what the filter adds, >= 0.
        after_step: the filter begins after so many steps.
        warmup: steps over which the learning rates rise linearly from 0.
        min_ratio: share of the learning rate that a cosine leaves at the last step; 1 means none.

    Raises:
        ValueError: a name is unknown or a number out of range.
    """

    name: Name = "grokfast_adamw"
    lr: float = 1e-3
    muon_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    filter: Filter = "ema"
    alpha: float = 0.98
    lamb: float = 2.0
    after_step: int = 0
    warmup: int = 100
    min_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("name", get_args(Name)), ("filter", FILTERS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"optimizer: {name} must be one of {', '.join(known)}; "
                    f"got {getattr(self, name)!r}"
                )
        if self.warmup < 0:
            raise ValueError(f"optimizer: warmup must be >= 0; got {self.warmup!r}")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"optimizer: min_ratio must be in [0, 1]; got {self.min_ratio!r}")


def keeps_average(config: OptimizerConfig) -> bool:
    """Returns whether the optimizer's step averages the weights as well."""
    return config.name != "adamw"


def make_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    ema: float | None,
    *,
    heads: Sequence[nn.Module] = (),
    matrices: Sequence[nn.Module] = (),
) -> Optimizer:
    """Returns the optimizer of all parameters of a model.

    Args:
        model: whose parameters are stepped.
        config: settings.
        ema: decay of the average of the weights, which the step itself keeps (torch's AdamW keeps
            none), or None.
        heads, matrices: with mugrokfast, what Muon leaves to AdamW, and where its matrices are; as
            for ``trm_fast.optim.groups.split_params``.
    """
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return AdamW(model.parameters(), **common)
    common["weight_ema"] = ema
    if config.name == "adam_atan2":
        return AdamATan2(model.parameters(), **common)
    filtered: dict[str, Any] = {
        "filter": None if config.filter == "none" else config.filter,
        "alpha": config.alpha,
        "lamb": config.lamb,
        "after_step": config.after_step,
    }
    if config.name == "grokfast_adamw":
        return GrokFastAdamW(model.parameters(), **common, **filtered)
    groups = split_params(model, heads=heads, matrices=matrices)
    options: dict[str, Any] = {"muon_lr": config.muon_lr, "adjust_lr_fn": "match_rms_adamw"}
    return MuGrokfast(groups, **options, **common, **filtered)


def make_schedules(
    optimizers: list[Optimizer], config: OptimizerConfig, steps: int
) -> list[LambdaLR]:
    """Returns one schedule per optimizer; the first step has 1 / warmup of the learning rate."""
    return [LambdaLR(optimizer, _schedule(config, steps)) for optimizer in optimizers]


def _schedule(config: OptimizerConfig, steps: int) -> Schedule:
    # Counted from 1, as in the official code, so that no step has a learning rate of 0.
    rise = max(config.warmup - 1, 0)
    start = 1 / max(config.warmup, 1)
    if config.min_ratio == 1.0:
        return warmup_constant(rise, start)
    return warmup_cosine(rise, max(steps, rise + 1), config.min_ratio, start)
