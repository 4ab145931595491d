"""What no test of the optimizers leaves behind, beside that of tests/conftest.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from trm_fast._dispatch import named_backend


@pytest.fixture(autouse=True)
def nothing_is_registered() -> Iterator[None]:
    """Refuses a named backend, hooks of all optimizers, or a process group that stay."""
    before = _registered()
    yield
    assert _registered() == before


def _registered() -> dict[str, Any]:
    return {
        "backend": named_backend(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "before steps": list(torch_optimizer._global_optimizer_pre_hooks),
        "after steps": list(torch_optimizer._global_optimizer_post_hooks),
        "process group": torch.distributed.is_initialized(),
    }
