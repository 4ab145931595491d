"""The published grokking experiment; see ``trm_fast.recipes.grokking.trainer``."""

from typing import TYPE_CHECKING

from trm_fast._lazy import exports

if TYPE_CHECKING:
    from trm_fast.recipes.grokking.config import PRESETS as PRESETS
    from trm_fast.recipes.grokking.config import GrokkingConfig as GrokkingConfig
    from trm_fast.recipes.grokking.data import PermutedEquations as PermutedEquations
    from trm_fast.recipes.grokking.report import Evaluation as Evaluation
    from trm_fast.recipes.grokking.report import evaluations as evaluations
    from trm_fast.recipes.grokking.report import finish as finish
    from trm_fast.recipes.grokking.trainer import build as build
    from trm_fast.recipes.grokking.trainer import grokking_epochs as grokking_epochs

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "config": ("PRESETS", "GrokkingConfig"),
        "data": ("PermutedEquations",),
        "report": ("Evaluation", "evaluations", "finish"),
        "trainer": ("build", "grokking_epochs"),
    },
)
