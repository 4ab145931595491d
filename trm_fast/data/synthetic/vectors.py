"""Feature vectors whose class shows only to a model that undoes a recurrence.

For classes k with Gaussian prototypes c_k ~ N(0, 1) and A = 1.5 times a random orthogonal matrix:

    h_0 = c_k,    h_{j+1} = tanh(A h_j)
    sample = s h_d + noise * N(0, 1),    label k,

with k, a depth d from 1 to ``depths`` and a sign s = +-1 drawn uniformly. As the signs make the
mean of each class zero, no linear classifier has a lower cross entropy than chance. On a finite set
one that is stopped early still gets up to half of the samples right: those of the sign that a state
happens to have more often.
"""

from typing import SupportsIndex

import torch
from torch import Tensor
from torch.utils.data import Dataset

GAIN = 1.5  # of the recurrence: enough to bend, too little to turn it into signs


class SyntheticRecursiveDataset(Dataset[tuple[Tensor, Tensor]]):
    """Samples of the task at the top, as pairs of features and label.

    Args:
        num_samples: number of samples, >= 0.
        input_dim: size of the feature vectors, >= 1.
        num_classes: number of classes, >= 1.
        depths: largest number of steps of the recurrence, >= 1.
        noise: standard deviation of what is added to each feature, >= 0.
        seed: seed of the samples.
        task_seed: seed of the prototypes and of A, which make the task.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> data = trm_fast.data.synthetic.vectors.SyntheticRecursiveDataset(num_samples=800)
        >>> features, label = data[0]
    """

    def __init__(
        self,
        num_samples: int = 800,
        input_dim: int = 128,
        num_classes: int = 10,
        depths: int = 3,
        noise: float = 0.3,
        seed: int = 1,
        task_seed: int = 0,
    ) -> None:
        _check_counts(0, num_samples=num_samples)
        _check_counts(1, input_dim=input_dim, num_classes=num_classes, depths=depths)
        if not 0.0 <= noise < float("inf"):
            raise ValueError(
                f"SyntheticRecursiveDataset: noise must be finite and >= 0; got {noise!r}"
            )
        states = task_states(input_dim, num_classes, depths, task_seed)
        generator = torch.Generator().manual_seed(seed)
        count = (num_samples,)
        self.labels = torch.randint(num_classes, count, generator=generator)
        depth = torch.randint(depths, count, generator=generator)
        sign = 2.0 * torch.randint(2, (num_samples, 1), generator=generator) - 1.0
        errors = torch.randn(num_samples, input_dim, generator=generator)
        self.features = sign * states[depth, self.labels] + noise * errors

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: SupportsIndex | slice | Tensor) -> tuple[Tensor, Tensor]:
        """Returns features [input_dim], float32, and label, int64, of a sample; of several samples
        for a slice or a tensor of indices."""
        return self.features[index], self.labels[index]


def task_states(input_dim: int, num_classes: int, depths: int, task_seed: int) -> Tensor:
    """Returns h_1 to h_depths of all prototypes.

    Args:
        input_dim, num_classes, depths, task_seed: as for ``SyntheticRecursiveDataset``.

    Returns:
        States [depths, num_classes, input_dim], float32.
    """
    generator = torch.Generator().manual_seed(task_seed)
    state = torch.randn(num_classes, input_dim, generator=generator)
    matrix = GAIN * _random_orthogonal(input_dim, generator)
    states = []
    for _ in range(depths):
        state = torch.tanh(state @ matrix.T)
        states.append(state)
    return torch.stack(states)


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    # In float64, so that libraries differ by less than a rounding of float32.
    drawn = torch.randn(size, size, generator=generator).double()
    q, r = torch.linalg.qr(drawn)
    # Signs of r's diagonal are the library's choice; made positive, q is unique and uniform.
    unique: Tensor = q * r.diagonal().sign()
    return unique.float()


def _check_counts(least: int, **counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"SyntheticRecursiveDataset: {name} must be a whole number >= {least}; got "
                f"{value!r}"
            )
