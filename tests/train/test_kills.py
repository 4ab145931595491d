"""The small recipe, killed at random moments; ``python -m tests.kills`` does the same."""

import pytest
import torch.distributed as dist

from ..kills import kill_often


@pytest.mark.parametrize(
    ("size", "kills"),
    [(2, 4), *(pytest.param(size, 20, marks=pytest.mark.long) for size in (1, 2))],
)
def test_a_recipe_that_is_killed_ends_with_the_same_bits(size, kills, memory):
    if size > 1 and not dist.is_gloo_available():
        pytest.skip("this torch is built without gloo")
    found = kill_often(memory, kills, size, seed=size)
    assert found.differs == []
    # After the last step, the run may have ended before the kill.
    late = found.steps.count(found.length)
    assert kills - late <= found.kills <= kills
    # All of the run was reached: both stages were ended by their metric, in more steps than one
    # stage has, and each tenth step was followed by an extra update.
    assert [stage["stage"] for stage in found.stages] == ["small", "large"]
    assert all(stage["reason"].startswith("nats ") for stage in found.stages)
    first, last = (stage["step"] for stage in found.stages)
    assert found.length == last and found.extra_updates == last // 10 > first // 10 > 0
    # So were the stages and the ends of both.
    assert min(found.steps) <= first < max(found.steps) and {first, last} <= {*found.steps}
