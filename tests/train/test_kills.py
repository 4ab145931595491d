"""The small recipe, killed at random moments; ``python -m tests.kills`` does it more often."""

import pytest
import torch.distributed as dist

from ..kills import kill_often


@pytest.mark.parametrize("size", [1, 2])
def test_a_recipe_that_is_killed_ends_with_the_same_bits(size, tmp_path):
    if size > 1 and not dist.is_gloo_available():
        pytest.skip("this torch is built without gloo")
    died, differ = kill_often(tmp_path, 3, size, seed=size)
    assert (died, differ) == (3, [])
