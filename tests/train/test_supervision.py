"""Objectives of puzzle models: one update per supervision step, or one for all of them."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from trm_fast.losses.supervision import supervision_weights
from trm_fast.nn import TinyRecursiveModel
from trm_fast.train import (
    FunctionObjective,
    JointSupervision,
    Objective,
    PerStepSupervision,
    StepResult,
)

from .runs import _MODEL, puzzle_run

STEPS = _MODEL.halt_max_steps
TAKEN = torch.tensor(True)


def only(objective: Objective, net: Any, rows: Any) -> StepResult:
    """The one result of a batch; the update is taken."""
    (found,) = objective.losses(net, rows)
    objective.commit(TAKEN)
    return found


def model(**changes: Any) -> TinyRecursiveModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"halt_exploration_prob": 0.0, "forward_dtype": "float64", **changes}
        return TinyRecursiveModel(replace(_MODEL, **settings)).double()


def batch(seed: int, size: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 6, (2, size, 16), generator=generator)
    return {
        "inputs": tokens[0], "labels": tokens[1], "puzzle_identifiers": torch.zeros(size).long(),
    }  # fmt: skip


def test_a_sequence_stays_until_it_halts_and_gives_way_then():
    net = model()
    objective = PerStepSupervision(net)
    for number in range(2 * STEPS):
        only(objective, net, batch(number))
        carry = objective.carries[0]
        came = number - (carry.steps - 1)
        for row in range(3):
            wanted = batch(int(came[row]))["inputs"][row]
            assert torch.equal(carry.data["inputs"][row], wanted)
    assert carry.steps.max() <= STEPS


def test_the_result_is_that_of_the_model():
    net = model()
    objective = PerStepSupervision(net, halt_weight=1.0)
    found = only(objective, net, batch(0))
    carry, outputs = net(net.initial_carry(batch(0)), batch(0))
    wanted = net.loss(carry, outputs, halt_weight=1.0)
    assert torch.equal(found.loss, wanted.loss)
    count = wanted.metrics["count"]
    assert "count" not in found.metrics
    assert found.metrics["lm_loss"] == (wanted.metrics["lm_loss"], 1.0)
    assert found.metrics["accuracy"] == (wanted.metrics["accuracy"], count)


def test_accumulated_batches_have_carries_of_their_own():
    net = model()
    objective = PerStepSupervision(net)
    for slot in (0, 1):
        list(objective.losses(net, batch(slot)))
    objective.commit(TAKEN)
    assert [int(carry.data["inputs"].sum()) for carry in objective.carries] == [
        int(batch(slot)["inputs"].sum()) for slot in (0, 1)
    ]
    other = PerStepSupervision(net)
    other.load_state_dict(copy.deepcopy(objective.state_dict()))
    for _ in (0, 1):
        one, two = (next(o.losses(net, batch(9))).loss for o in (objective, other))
        assert torch.equal(one, two)


def test_a_carry_that_comes_back_has_a_leaf_for_compiled_calls():
    net = model(puzzle_emb_ndim=8, puzzle_emb_len=1)
    objective = PerStepSupervision(net)
    only(objective, net, batch(0))
    fresh = model(puzzle_emb_ndim=8, puzzle_emb_len=1)
    PerStepSupervision(fresh).load_state_dict(objective.state_dict())
    assert fresh.puzzles._leaves.keys() == net.puzzles._leaves.keys() == {3}


@pytest.mark.parametrize("finite", [True, False])
def test_after_a_step_that_is_not_finite_all_sequences_give_way(finite):
    net = model()
    objective = PerStepSupervision(net)
    only(objective, net, batch(0))
    before = objective.carries[0]
    before.y.fill_(float("nan"))
    objective.commit(torch.tensor(finite))
    assert torch.equal(objective.carries[0].halted, before.halted | (not finite))
    loss = only(objective, net, batch(1)).loss
    assert bool(torch.isfinite(loss)) == (not finite or bool(before.halted.all()))


@pytest.mark.parametrize("weights", ["uniform", "halving", (0.0, 1.0, 3.0)])
def test_joint_supervision_is_the_weighted_sum_of_all_steps(weights):
    net = model()
    objective = JointSupervision(net, STEPS, weights)
    total = 0.0
    for found in objective.losses(net, batch(0)):
        found.loss.backward()
        total += float(found.loss.detach())
    grads = [param.grad.clone() for param in net.parameters()]
    net.zero_grad()

    carry, losses = net.initial_carry(batch(0)), []
    for _ in range(STEPS):
        carry, outputs = net(carry, batch(0))
        carry = carry._replace(halted=torch.zeros_like(carry.halted))
        losses.append(net.loss(carry, outputs).loss)
    shares = supervision_weights(STEPS, weights)
    wanted = sum(share * loss for share, loss in zip(shares, losses, strict=True))
    wanted.backward()
    assert total == pytest.approx(float(wanted.detach()), rel=1e-14)
    # The same numbers, added up in another order.
    for grad, param in zip(grads, net.parameters(), strict=True):
        assert torch.allclose(grad, param.grad, rtol=1e-12, atol=1e-15)


def test_joint_supervision_counts_every_sequence_once_at_the_last_step():
    net = model()
    objective = JointSupervision(net, STEPS)
    results = list(objective.losses(net, batch(0)))
    assert [bool(found.metrics) for found in results] == [False] * (STEPS - 1) + [True]
    assert float(results[-1].metrics["accuracy"][1]) == 3
    assert objective.state_dict() == {}
    # The next batch starts anew, whatever its size.
    assert len(list(objective.losses(net, batch(1, size=2)))) == STEPS


def test_joint_supervision_needs_a_step():
    with pytest.raises(ValueError, match="steps"):
        JointSupervision(model(), 0)


def test_a_function_is_an_objective():
    plain = FunctionObjective(lambda net, rows: net * rows)
    assert list(plain.losses(torch.tensor(2.0), 3.0)) == [StepResult(torch.tensor(6.0))]
    result = StepResult(torch.tensor(1.0), {"a": (1.0, 1.0)})
    assert next(FunctionObjective(lambda net, rows: result).losses(0, 0)) is result
    assert plain.state_dict() == {} and plain.backwards == 1


@pytest.mark.parametrize("supervision", ["per_step", "joint"])
def test_a_run_learns(supervision):
    trainer = puzzle_run(
        None, supervision=supervision, steps=60, log_every=10, evaluate_every=0, augment=False
    )
    trainer.fit()
    losses = [record["loss"] for record in trainer.history if record["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
