"""The equations of a grokking run, and their order."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trm_fast.data.synthetic.modular import modular_equations, split_equations
from trm_fast.recipes.grokking.config import GrokkingConfig
from trm_fast.recipes.grokking.model import Decoder


class EpochBatches:
    """Equations in batches, without end; each epoch permutes the order of the last one.

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
        self.position = self.per_epoch

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-self.equations.shape[1] // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            if self.position == self.per_epoch:
                permutation = torch.randperm(len(self.order), generator=self.generator)
                self.order, self.position = self.order[permutation], 0
            batches = self.equations[:, self.order.to(self.equations.device)]
            for batch in batches.split(self.size, dim=1)[self.position :]:
                self.position += 1
                yield batch

    def describe(self) -> str:
        """Names the last batch."""
        return f"batch {self.position} of {self.per_epoch} of an epoch"

    def state_dict(self) -> dict[str, Any]:
        """Returns order, place in it, and the state of the generator."""
        return {
            "order": self.order,
            "position": self.position,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the place of a ``state_dict``."""
        self.order, self.position = state["order"], state["position"]
        self.generator.set_state(state["generator"])


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
