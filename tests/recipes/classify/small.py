"""A small classifier with its data, and a trainer of both."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from trm_fast.recipes.classify import (
    TinyRecursiveModel,
    TRMTrainer,
)

KEYS = {
    "epoch", "model_state_dict", "optimizer_state_dict", "metrics", "best_val_acc", "best_epoch",
    "train_history", "val_history", "hyperparameters",
}  # fmt: skip


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    return TinyRecursiveModel(8, 32, 4, **options)


def small_data(count=70, batch=16):
    """A last batch of 6, and a class that a linear map can tell."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(count, 8, generator=generator)
    data = TensorDataset(features, features[:, :4].argmax(1))
    return DataLoader(data, batch, shuffle=True), DataLoader(data, batch)


def small(seed=0, model=None, **options):
    train, val = small_data()
    options = {"T": 2, "n": 2, "lr": 1e-2, "device": "cpu", **options}
    return TRMTrainer(model or small_model(seed), train, val, **options)


def states(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]
