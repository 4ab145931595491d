"""What a state that came from elsewhere must reproduce."""

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_checks import (
    assert_within,
)

# At most 25 roundings of 2**-53 per step, relative to terms no larger than the largest value: after
# 40 steps below 40 * 25 * 2**-53 = 1.2e-13.
RTOL = 1e-12


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for index, (ours, truth) in enumerate(zip(actual, expected, strict=True)):
        largest = truth.abs().max().item() if truth.numel() else 0.0
        assert_within(ours, truth, RTOL * largest, f"tensor {index}")


def through_file(value: Any) -> Any:
    """What a safe load reads back."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
