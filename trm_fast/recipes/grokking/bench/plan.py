"""The rows of the grokking benchmark: an optimizer, its weight decay, and what meets the gradient.

Rows are compared at equal weight decay, since weight decay alone moves the moment of grokking by
more than most filters do. A filter that adds ``lamb`` times a mean also makes slow gradients
``1 + lamb`` times as large, so the rows lr3 and lr6 show what a larger learning rate does alone.
This file imports no torch, so that the help of the command can list the rows.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Family(NamedTuple):
    """What the rows of one panel of the figure share.

    Args:
        label: how reports call the optimizer.
        fields: settings of the recipe.
    """

    label: str
    fields: dict[str, Any]

    @property
    def weight_decay(self) -> float:
        """Strength of the weight decay."""
        decay: float = self.fields["weight_decay"]
        return decay


class Variant(NamedTuple):
    """What the rows of one colour of the figure share.

    Args:
        label: how reports call it.
        fields: settings of the recipe.
        lr_factor: factor of the learning rates.
    """

    label: str
    fields: dict[str, Any]
    lr_factor: float = 1.0


_OPTIMIZERS = {"adam": "Adam (L2)", "adamw": "AdamW", "muon": "Muon, AdamW for the rest"}
_DECAYS = {"adam": (0.0, 0.005, 0.01, 1.0), "adamw": (0.005, 0.01, 1.0), "muon": (0.0, 0.1, 1.0)}

# Without weight decay adam and adamw are the same, so that row stands under adam only.
FAMILIES = {
    f"{name}-wd{decay:g}": Family(label, {"optimizer": name, "weight_decay": decay})
    for name, label in _OPTIMIZERS.items()
    for decay in _DECAYS[name]
}

PLAIN = "plain"
VARIANTS = {
    PLAIN: Variant("none", {"filter": "none"}),
    "lr3": Variant("none, lr x 3", {"filter": "none"}, lr_factor=3.0),
    "lr6": Variant("none, lr x 6", {"filter": "none"}, lr_factor=6.0),
    "ema": Variant("ema, alpha 0.98, lamb 2", {"filter": "ema", "alpha": 0.98, "lamb": 2.0}),
    "ma": Variant("ma, window 100, lamb 5", {"filter": "ma", "window": 100, "lamb": 5.0}),
    "highpass": Variant(
        "highpass, alpha 0.98, lamb 0.1", {"filter": "highpass", "alpha": 0.98, "lamb": 0.1}
    ),
    "highpass2": Variant(
        "highpass, alpha 0.98, lamb 2", {"filter": "highpass", "alpha": 0.98, "lamb": 2.0}
    ),
    "projection": Variant(
        "projection, alpha 0.98, lamb 2", {"filter": "projection", "alpha": 0.98, "lamb": 2.0}
    ),
    "cosine_gate": Variant(
        "cosine_gate, alpha 0.98, lamb 2", {"filter": "cosine_gate", "alpha": 0.98, "lamb": 2.0}
    ),
}


class Row(NamedTuple):
    """One line of the table.

    Args:
        family: key of ``FAMILIES``.
        variant: key of ``VARIANTS``.
    """

    family: str
    variant: str

    @property
    def name(self) -> str:
        """What ``--rows`` and the files call it."""
        return f"{self.family}-{self.variant}"

    def fields(self, lr: float, muon_lr: float) -> dict[str, Any]:
        """Returns the settings of the recipe, given its learning rates."""
        factor = VARIANTS[self.variant].lr_factor
        rates = {"lr": lr * factor, "muon_lr": muon_lr * factor}
        return {**FAMILIES[self.family].fields, **VARIANTS[self.variant].fields, **rates}


ROWS = {row.name: row for row in (Row(f, v) for f in FAMILIES for v in VARIANTS)}

# What the question needs: each filter at the weight decay of the paper (Adam, L2) and at one that
# groks by itself (AdamW), both beside no filter; Muon with and without; and no weight decay at all.
DEFAULT = (
    "adam-wd0-plain",
    "adam-wd0-ema",
    "adam-wd0.005-*",
    "adamw-wd1-*",
    "muon-wd1-plain",
    "muon-wd1-lr3",
    "muon-wd1-ema",
)


def select_rows(patterns: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of all rows that match a pattern, pattern by pattern, each name once.

    Args:
        patterns: names of rows, with * for any text.

    Raises:
        ValueError: a pattern matches no row.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        names = [name for name in ROWS if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(
                "bench grokking: --rows must name rows OPTIMIZER-wdDECAY-VARIANT, with * for any "
                f"text; got {pattern!r}, which matches none (--help lists them)"
            )
        found |= dict.fromkeys(names)
    return tuple(found)
