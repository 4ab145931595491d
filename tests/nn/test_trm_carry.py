"""Carry and halting against the rules written out slot by slot."""

import pytest
import torch
from torch import Tensor

from trm_fast.nn import TinyRecursiveModel, TRMConfig

from .checks import batch_of, make, small


def written_out(
    model: TinyRecursiveModel, batches: list[dict[str, Tensor]], least: list[Tensor] | None
) -> list[dict]:
    """Each slot in a loop of its own kind: what it works on, for how long, whether it halts."""
    config, count = model.config, len(batches[0]["inputs"])
    y = model.y_init.expand(count, config.length, -1).clone()
    z = model.z_init.expand(count, config.length, -1).clone()
    slots = [{"halted": True, "steps": 0, "data": None} for _ in range(count)]
    history = []
    for number, batch in enumerate(batches):
        for k, slot in enumerate(slots):
            if slot["halted"]:
                y[k], z[k] = model.y_init, model.z_init
                slot.update(steps=0, data={key: value[k] for key, value in batch.items()})
        data = {key: torch.stack([slot["data"][key] for slot in slots]) for key in batch}
        with torch.no_grad():
            y, z, outputs = model.step(y, z, data)
        for k, slot in enumerate(slots):
            slot["steps"] += 1
            slot["halted"] = slot["steps"] >= config.halt_max_steps
            if model.training and config.halt_max_steps > 1:
                wants = outputs.q_halt[k] > (0 if config.no_ACT_continue else outputs.q_continue[k])
                slot["halted"] = slot["halted"] or bool(wants)
                if least is not None:
                    slot["halted"] = slot["halted"] and slot["steps"] >= least[number][k]
        history.append({
            "steps": [slot["steps"] for slot in slots],
            "halted": [slot["halted"] for slot in slots],
            "data": data,
            "logits": outputs.logits,
        })  # fmt: skip
    return history


def run(config: TRMConfig, least: list[Tensor] | None, training: bool, generator=None):
    model = make(config).train(training)
    # q near zero, so that some halt and some do not.
    with torch.no_grad():
        model.q_head.weight.mul_(3)
    batches = [batch_of(config, 6, seed=number) for number in range(9)]
    truth = written_out(model, batches, least)
    carry = model.initial_carry(batches[0])
    for number, batch in enumerate(batches):
        carry, outputs = model(carry, batch, generator=generator)
        assert carry.steps.tolist() == truth[number]["steps"]
        assert carry.halted.tolist() == truth[number]["halted"]
        for key, value in carry.data.items():
            assert torch.equal(value, truth[number]["data"][key])
        assert torch.equal(outputs.logits, truth[number]["logits"])
        assert not carry.y.requires_grad and carry.steps.dtype == torch.int32
    return truth


@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
@pytest.mark.parametrize("no_continue", [True, False])
def test_slots_halt_and_are_refilled_one_by_one(mixer, no_continue):
    settings = {"halt_max_steps": 4, "no_ACT_continue": no_continue}
    truth = run(small(mixer, halt_exploration_prob=0.0, **settings), None, True)
    halted = {steps for step in truth for steps, done in
              zip(step["steps"], step["halted"], strict=True) if done}  # fmt: skip
    assert len(halted) > 1 and 4 in halted  # some by q, some by the limit


def test_exploration_makes_some_slots_wait():
    config = small(halt_max_steps=5, halt_exploration_prob=0.5)
    generator, least = torch.Generator().manual_seed(3), []
    for _ in range(9):
        explores = torch.rand(6, generator=generator) < 0.5
        least.append(torch.randint(2, 6, (6,), generator=generator) * explores)
    plain = run(small(halt_max_steps=5, halt_exploration_prob=0.0), None, True)
    truth = run(config, least, True, torch.Generator().manual_seed(3))
    assert [step["halted"] for step in truth] != [step["halted"] for step in plain]


def test_in_evaluation_only_the_limit_counts():
    truth = run(small(halt_max_steps=4), None, False)
    assert [step["halted"] for step in truth] == [[step % 4 == 3] * 6 for step in range(9)]


def test_one_step_at_most_is_always_the_last():
    assert all(all(step["halted"]) for step in run(small(halt_max_steps=1), None, True))


def test_the_carry_does_not_change_under_a_step():
    config = small()
    model, batch = make(config), batch_of(config)
    carry, _ = model(model.initial_carry(batch), batch)
    before = [part.clone() for part in carry[:4]]
    model(carry, batch_of(config, seed=5))
    assert all(torch.equal(one, other) for one, other in zip(before, carry[:4], strict=True))


def test_what_comes_with_a_batch_goes_along():
    config = small(halt_max_steps=2, halt_exploration_prob=0.0)
    model = make(config)
    with torch.no_grad():
        model.q_head.bias.fill_(-100)
    carry, seen = None, []
    for number in range(4):
        batch = {**batch_of(config), "index": torch.full((3, 2), number)}
        carry = model.initial_carry(batch) if carry is None else carry
        carry, _ = model(carry, batch)
        seen.append(carry.data["index"][0, 0].item())
    assert seen == [0, 0, 2, 2]


def test_the_target_of_going_on_is_the_better_choice_at_the_next_step():
    config = small(no_ACT_continue=False, halt_max_steps=2, halt_exploration_prob=0.0)
    model, batch = make(config), batch_of(config)
    with torch.no_grad():
        model.q_head.bias.copy_(torch.tensor([-100.0, 100.0]))  # nothing halts by itself
    carry = model.initial_carry(batch)
    for step in (1, 2):
        carry, outputs = model(carry, batch)
        with torch.no_grad():
            following = model.step(carry.y, carry.z, carry.data)[2]
        better = torch.maximum(following.q_halt, following.q_continue)
        truth = torch.sigmoid(following.q_halt if step == 2 else better)
        assert torch.equal(outputs.target_continue, truth)
        found = model.loss(carry, outputs)
        assert found.metrics["q_continue_loss"] > 0
    found.loss.backward()
    assert model.q_head.weight.grad[1].abs().max() > 0
    assert model.eval()(carry, batch)[1].target_continue is None


def test_q_continue_is_not_trained_unless_asked():
    config = small()
    model, batch = make(config), batch_of(config)
    carry, outputs = model(model.initial_carry(batch), batch)
    model.loss(carry, outputs).loss.backward()
    assert outputs.target_continue is None
    assert model.q_head.weight.grad[1].abs().max() == 0 < model.q_head.weight.grad[0].abs().max()
