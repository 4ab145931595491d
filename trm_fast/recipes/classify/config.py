"""Settings of the classifier, and their presets."""

from dataclasses import dataclass
from functools import partial

from trm_fast.ops import FILTERS, Filter
from trm_fast.recipes.settings import require

_require = partial(require, "classify")


@dataclass(frozen=True)
class ClassifyConfig:
    """Trains a recursive classifier on feature vectors of a synthetic task.

    Args:
        epochs: epochs after which the run ends at the latest.
        patience: epochs without a better validation accuracy after which it ends.
        lr: learning rate of AdamW.
        alpha: decay per step of the filter's running mean, in [0, 1].
        lam: strength of the filter, >= 0.
        filter: what happens to the gradient before AdamW: highpass adds lam times gradient minus
            running mean (the opposite of GrokFast), ema adds lam times the running mean (GrokFast),
            none changes nothing; docs/optimizers.md has the formulas of all.
        weight_decay: decoupled weight decay of AdamW, >= 0.
        grad_clip: largest norm of all gradients together, or null for no clipping.
        T: levels of the recursion, from 1 to max_depth.
        n: micro-steps per level.
        max_depth: largest T; the complexity is a share of that at this depth.
        hidden: size of the states.
        dropout: share of gelu's outputs that are zeroed in training, 0 <= dropout < 1.
        halt: train a head that says when to halt; used by predict with early_exit only.
        y_every_step: let y follow each update of z, instead of the last of a level.
        complexity_weight: weight of the penalty for complexity, >= 0.
        num_train: training samples.
        num_val: validation samples.
        batch_size: samples per update; the last batch of an epoch may have fewer.
        input_dim: size of the feature vectors.
        num_classes: number of classes.
        seed: seed of the weights, the samples and the order of the batches.
        device: where to train: auto (cuda if there is one, else cpu) or a torch device.
        out: directory of the run; empty means runs/classify-FILTER-seedSEED.

    Raises:
        ValueError: a value is outside its range or not among its choices.
    """

    epochs: int = 50
    patience: int = 10
    lr: float = 1e-3
    alpha: float = 0.98
    lam: float = 0.1
    filter: Filter = "highpass"
    weight_decay: float = 0.01
    grad_clip: float | None = None
    T: int = 3
    n: int = 6
    max_depth: int = 5
    hidden: int = 256
    dropout: float = 0.0
    halt: bool = False
    y_every_step: bool = True
    complexity_weight: float = 0.01
    num_train: int = 800
    num_val: int = 200
    batch_size: int = 32
    input_dim: int = 128
    num_classes: int = 10
    seed: int = 0
    device: str = "auto"
    out: str = ""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience"):
            require(
                "classify", getattr(self, name) >= 1, f"{name} must be >= 1", getattr(self, name)
            )
        _require(self.seed >= 0, "seed must be >= 0", self.seed)
        require(
            "classify",
            self.filter in FILTERS,
            f"filter must be one of {', '.join(FILTERS)}",
            self.filter,
        )


PRESETS = {"classify": {"default": ClassifyConfig()}}
