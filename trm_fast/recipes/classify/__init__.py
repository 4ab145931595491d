"""A recursive classifier on feature vectors, trained through a gradient filter.

    features -> recursion -> logits -> loss -> gradients -> filter -> AdamW

The parts have the names and arguments of the system that the recipe implements, and are made of the
shared ones: ``nn.Recursion`` on ``nn.VectorNet``, which run as the op ``vector_latent_update``;
``GrokFastAdamW``, which filters while it steps; ``train.Trainer``.

The default filter, ``highpass``, is the opposite of GrokFast: it damps nothing and amplifies the
fast part of the gradients. ``filter="ema"`` is the published one. See docs/recipes/classify.md.

Example:
    >>> data = TRMDataModule(num_train=800, num_val=200, batch_size=32)
    >>> model = TinyRecursiveModel(input_dim=128, hidden_dim=256, output_dim=10, max_depth=5)
    >>> trainer = TRMTrainer(model, data.train_dataloader(), data.val_dataloader())
    >>> summary = trainer.fit(num_epochs=50, patience=10, checkpoint_dir="checkpoints")
"""

from typing import TYPE_CHECKING

from trm_fast._lazy import exports

if TYPE_CHECKING:
    from trm_fast.recipes.classify.config import PRESETS as PRESETS
    from trm_fast.recipes.classify.config import ClassifyConfig as ClassifyConfig
    from trm_fast.recipes.classify.data import (
        SyntheticRecursiveDataset as SyntheticRecursiveDataset,
    )
    from trm_fast.recipes.classify.data import TRMDataModule as TRMDataModule
    from trm_fast.recipes.classify.loss import TRMLoss as TRMLoss
    from trm_fast.recipes.classify.model import Prediction as Prediction
    from trm_fast.recipes.classify.model import TinyRecursiveModel as TinyRecursiveModel
    from trm_fast.recipes.classify.optimizer import GrokFastOptimizer as GrokFastOptimizer
    from trm_fast.recipes.classify.report import finish as finish
    from trm_fast.recipes.classify.trainer import TRMTrainer as TRMTrainer
    from trm_fast.recipes.classify.trainer import build as build

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "config": ("PRESETS", "ClassifyConfig"),
        "data": ("SyntheticRecursiveDataset", "TRMDataModule"),
        "loss": ("TRMLoss",),
        "model": ("Prediction", "TinyRecursiveModel"),
        "optimizer": ("GrokFastOptimizer",),
        "report": ("finish",),
        "trainer": ("TRMTrainer", "build"),
    },
)
