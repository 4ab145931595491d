"""Trains a decoder on x*y mod 97 until it generalises: python examples/train_grokking.py"""

from trm_fast.recipes.grokking import GrokkingConfig, grokking_epochs


def main() -> None:
    config = GrokkingConfig(iterations=3000)
    for epoch, found in enumerate(grokking_epochs(config)):
        reached = found.validation_accuracy >= config.target
        if epoch % 10 == 0 or reached:
            print(
                f"iteration {found.iteration}: right are {found.train_accuracy:.1%} in training, "
                f"{found.validation_accuracy:.1%} in validation",
                flush=True,
            )
        if reached:
            break


if __name__ == "__main__":
    main()
