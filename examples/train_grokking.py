"""Trains a decoder on x*y mod 97 until it generalises: python examples/train_grokking.py"""

from trm_fast.recipes.grokking import GrokkingConfig, grokking_epochs


def main() -> None:
    config = GrokkingConfig(iterations=3000)
    for found in grokking_epochs(config):
        if found.validation_accuracy >= config.target:
            print(f"{found.validation_accuracy:.1%} at iteration {found.iteration}")
            break


if __name__ == "__main__":
    main()
