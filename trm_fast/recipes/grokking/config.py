"""Settings of the grokking experiment, and their presets."""

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from trm_fast.data.synthetic.modular import Operation
from trm_fast.ops import FILTERS, Filter
from trm_fast.recipes.settings import require

Inner = Literal["adam", "adamw", "muon"]

_require = partial(require, "grokking")


@dataclass(frozen=True)
class GrokkingConfig:
    """Settings of one run; the defaults are the published Grokfast row.

    Args:
        prime: modulus of the equations, a prime number.
        operation: what is learned: x*y, x/y, x+y or x-y, modulo the prime.
        optimizer: adam adds the weight decay to the gradient (L2), adamw shrinks the weights by it,
            muon orthogonalises the update of the matrices in the layers and leaves embeddings,
            head, norms and biases to adamw.
        filter: what happens to the gradient before the optimizer: ema adds lamb times its running
            mean (GrokFast), ma adds lamb times the mean of the last window gradients (GrokFast-MA),
            none changes nothing; docs/optimizers.md has the formulas of all.
        alpha: decay of the running mean per iteration, in [0, 1].
        lamb: weight of what the filter adds, >= 0, no unit; unused without a filter.
        window: gradients that ma averages, >= 1; until there are so many, none is changed.
        lr: learning rate after the warm-up; with muon that of embeddings, head, norms and biases.
        muon_lr: learning rate of the matrices that muon updates; it scales their updates to the
            size that adamw's usually have, so the two rates compare.
        betas: decay of the two Adam moments per iteration, each in [0, 1).
        weight_decay: strength of the weight decay, >= 0.
        warmup: iterations over which lr rises linearly from 0; the first one has lr 0.
        batch: equations per iteration; the last batch of an epoch is smaller.
        seed: seed of the initial weights, the split and the batches.
        iterations: number of weight updates after which the run ends at the latest.
        target: validation accuracy to be reached, in [0, 1].
        stop_at_target: end the run at the first evaluation that reaches the target.
        device: where to train: auto (cuda if there is one, else cpu) or a torch device.
        log_every: iterations between two lines of progress when the output is not a terminal.
        save_every: epochs between two checkpoints.
        plot: draw accuracy.png; needs matplotlib.
        out: directory of the run; empty means runs/grokking-OPTIMIZER-FILTER-seedSEED.

    Raises:
        ValueError: a value is outside its range or not among its choices.
    """

    prime: int = 97
    operation: Operation = "x*y"
    optimizer: Inner = "adam"
    filter: Filter = "ema"
    alpha: float = 0.98
    lamb: float = 2.0
    window: int = 100
    lr: float = 1e-3
    muon_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.005
    warmup: int = 10
    batch: int = 512
    seed: int = 0
    iterations: int = 300_000
    target: float = 0.95
    stop_at_target: bool = True
    device: str = "auto"
    log_every: int = 100
    save_every: int = 10
    plot: bool = True
    out: str = ""

    def __post_init__(self) -> None:
        for name in ("warmup", "seed"):
            require(
                "grokking", getattr(self, name) >= 0, f"{name} must be >= 0", getattr(self, name)
            )
        for name in ("window", "batch", "iterations", "log_every", "save_every"):
            require(
                "grokking", getattr(self, name) >= 1, f"{name} must be >= 1", getattr(self, name)
            )
        _require(0 <= self.target <= 1, "target must be in [0, 1]", self.target)
        for name, choices in (("optimizer", get_args(Inner)), ("filter", FILTERS)):
            value = getattr(self, name)
            require(
                "grokking", value in choices, f"{name} must be one of {', '.join(choices)}", value
            )


PRESETS = {"grokking": {"official": GrokkingConfig()}}
