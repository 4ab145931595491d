"""Trains the recursive classifier on the synthetic task: python examples/train_classify.py"""

import torch

from trm_fast.recipes.classify import TinyRecursiveModel, TRMDataModule, TRMTrainer


def main() -> None:
    torch.manual_seed(0)
    model = TinyRecursiveModel(input_dim=128, hidden_dim=256, output_dim=10, max_depth=5)
    data = TRMDataModule(num_train=800, num_val=200, batch_size=32)
    trainer = TRMTrainer(
        model=model,
        train_loader=data.train_dataloader(),
        val_loader=data.val_dataloader(),
        lr=1e-3,
        alpha=0.98,
        lambda_=0.1,
        T=3,
        n=6,
    )
    summary = trainer.fit(num_epochs=50, patience=10, checkpoint_dir="checkpoints")
    print(f"Best accuracy: {summary['best_val_acc']:.2f}%  epoch {summary['best_epoch'] + 1}")


if __name__ == "__main__":
    main()
