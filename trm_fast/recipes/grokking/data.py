"""The equations of a grokking run, and their order."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trm_fast.data.synthetic.modular import modular_equations, split_equations
from trm_fast.recipes.grokking.config import GrokkingConfig
from trm_fast.recipes.grokking.model import Decoder


class PermutedEquations:
    """Equations in batches; each epoch permutes the order of the last one.

    Args:
        equations: tokens [5, count].
        size: equations per batch; the last batch of an epoch is smaller.
        generator: draws the permutations; advanced.
    """

    def __init__(self, equations: Tensor, size: int, generator: torch.Generator) -> None:
        self.equations = equations
        self.size = size
        self.generator = generator
        self.order = torch.arange(equations.shape[1])

    def __len__(self) -> int:
        return -(-self.equations.shape[1] // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        self.order = self.order[torch.randperm(len(self.order), generator=self.generator)]
        batches = self.equations[:, self.order.to(self.equations.device)]
        return iter(batches.split(self.size, dim=1))

    def state_dict(self) -> dict[str, Any]:
        """Returns the order; ``EpochBatches`` knows the generator."""
        return {"order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the order of a ``state_dict``."""
        self.order = state["order"]


def model_and_data(
    config: GrokkingConfig, device: torch.device
) -> tuple[Decoder, Tensor, Tensor, torch.Generator]:
    """Builds the model, both halves of the data and the generator that shuffles the batches."""
    equations = modular_equations(config.prime, config.operation)
    generator = torch.Generator()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # not those of GPUs
        model = Decoder(config.prime + 2)
        # The published code draws weights, split and batches from one stream, in this order.
        generator.set_state(torch.get_rng_state())
    train, validation = split_equations(equations, generator)
    return model.to(device), train.to(device), validation.to(device), generator
