"""Prediction, evaluation, and joint supervision with the memory of one step."""

import pytest
import torch

from trm_fast.nn import Outputs, joint_supervision
from trm_fast.nn.prediction import predict

from .checks import DOUBLE, SINGLE, batch_of, make, plain, small

MIXERS = ("attention", "mlp_t")


def halting_model(mixer: str, **settings):
    """Sequences halt after different numbers of steps."""
    model = make(small(mixer, halt_max_steps=6, **settings))
    with torch.no_grad():
        model.q_head.weight.mul_(3)
    return model


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("no_continue", [True, False])
def test_early_halting_gives_the_answers_of_the_whole_batch(mixer, no_continue):
    model = halting_model(mixer, no_ACT_continue=no_continue)
    batch = batch_of(model.config, 12)
    found = model.predict(batch["inputs"], batch["puzzle_identifiers"])
    y = model.y_init.expand(12, model.config.length, -1)
    z = model.z_init.expand(12, model.config.length, -1)
    done = torch.zeros(12, dtype=torch.bool)
    for step in range(1, 7):
        with torch.no_grad():
            y, z, outputs = model.step(y, z, batch)
        wants = outputs.q_halt > (0 if no_continue else outputs.q_continue)
        ends = ~done & (wants if step < 6 else True)
        assert (found.steps == step).tolist() == ends.tolist()
        assert torch.equal(found.tokens[ends], outputs.logits.argmax(-1)[ends])
        # Products of another batch may add up in another order.
        difference = (found.q_halt[ends] - outputs.q_halt[ends]).abs()
        assert difference.numel() == 0 or difference.max() <= 1e4 * DOUBLE
        done |= ends
    assert done.all() and len({*found.steps.tolist()}) > 1


def test_without_early_halting_all_take_all_steps():
    model = halting_model("attention")
    batch = batch_of(model.config, 4)
    found = model.predict(batch["inputs"], batch["puzzle_identifiers"], 3, early_halt=False)
    carry = model.eval().initial_carry(batch)
    for _ in range(3):
        carry, outputs = model(carry, batch)
    assert found.steps.tolist() == [3] * 4
    assert torch.equal(found.tokens, outputs.logits.argmax(-1))
    assert torch.equal(found.q_halt, outputs.q_halt)


def test_prediction_leaves_the_mode_and_needs_no_ids():
    model = halting_model("mlp_t")
    model.q_head.eval()
    batch = batch_of(model.config, 2)
    zeros = torch.zeros(2, dtype=torch.int64)
    found = model.predict(batch["inputs"])
    assert torch.equal(found.q_halt, model.predict(batch["inputs"], zeros).q_halt)
    assert model.training and model.recursion.training and not model.q_head.training
    assert not found.q_halt.requires_grad


@pytest.mark.parametrize("early_halt", [False, True])
def test_prediction_is_a_loop_for_any_states_and_step(early_halt):
    """Each sequence counts its steps in two states, and wants to halt when it has its number."""
    data, sizes = {"wanted": torch.tensor([3, 1, 9, 2])}, []

    def start(data):
        return torch.zeros(4, 1), torch.zeros(4, 1, 1)

    def step(states, data):
        count, other = (state + 1 for state in states)
        sizes.append(len(count))
        assert torch.equal(count[:, 0], other[:, 0, 0])
        logits = torch.nn.functional.one_hot(count.long(), 8).float()
        return (count, other), Outputs(logits, count[:, 0] - data["wanted"], count[:, 0])

    found = predict(start, step, lambda o: o.q_halt >= 0, data, max_steps=5, early_halt=early_halt)
    truth = [3, 1, 5, 2] if early_halt else [5, 5, 5, 5]
    assert found.steps.tolist() == found.tokens[:, 0].tolist() == truth
    assert found.q_halt.tolist() == [t - w for t, w in zip(truth, [3, 1, 9, 2], strict=True)]
    assert sizes == ([4, 3, 2, 1, 1] if early_halt else [4] * 5)


@pytest.mark.parametrize("max_steps", [0, 1.5])
def test_a_wrong_number_of_steps_is_named(max_steps):
    model = make(small())
    with pytest.raises(ValueError) as error:
        model.predict(batch_of(model.config)["inputs"], None, max_steps)
    assert str(error.value) == (
        f"TinyRecursiveModel.predict: max_steps must be a whole number >= 1; got {max_steps!r}"
    )


def test_the_evaluation_counts_what_the_last_step_says():
    model = halting_model("attention")
    batches = [batch_of(model.config, 5, seed=1), batch_of(model.config, 3, seed=2)]
    right = model.predict(
        batches[0]["inputs"], batches[0]["puzzle_identifiers"], early_halt=False
    ).tokens
    valid = batches[0]["labels"] != -100
    batches[0]["labels"][:2] = torch.where(valid, right, -100)[:2]  # two are exact
    batches[1]["labels"][2] = -100  # one fills up the batch, and does not count
    found = model.evaluate(batches)
    truth = dict.fromkeys(("accuracy", "exact_accuracy", "q_halt_accuracy", "steps"), 0.0)
    for batch in batches:
        answer = model.predict(batch["inputs"], batch["puzzle_identifiers"], early_halt=False)
        for k, labels in enumerate(batch["labels"]):
            valid = labels != -100
            if not valid.any():
                continue
            hits = (answer.tokens[k] == labels)[valid]
            truth["accuracy"] += hits.double().mean().item() / 7
            truth["exact_accuracy"] += hits.all().item() / 7
            truth["q_halt_accuracy"] += ((answer.q_halt[k] >= 0) == hits.all()).item() / 7
            truth["steps"] += 6 / 7
    assert found["count"] == 7 and found["exact_accuracy"] >= 2 / 7
    for name, value in truth.items():
        assert abs(found[name] - value) <= 16 * SINGLE * max(value, 1)  # shares are in float32
    loss = 0.0
    for batch in batches:
        carry = model.eval().initial_carry(batch)
        for _ in range(6):
            carry, outputs = model(carry, batch)
        q = torch.stack((outputs.q_halt, outputs.q_continue), -1)
        for k, labels in enumerate(batch["labels"]):
            if (labels != -100).any():
                one = slice(k, k + 1)
                loss += plain.plain_loss(outputs.logits[one], labels[None], q[one]).item() / 7
    assert abs(found["lm_loss"] + 0.5 * found["q_halt_loss"] - loss) <= 1e3 * DOUBLE * loss


@pytest.mark.parametrize("no_continue", [True, False])
@pytest.mark.parametrize("weights", ["uniform", [3.0, 0.0, 1.0]])
def test_joint_supervision_has_the_gradient_of_one_backward_pass(no_continue, weights):
    model, twin = (make(small(no_ACT_continue=no_continue)) for _ in range(2))
    batch = batch_of(model.config)
    total, last = joint_supervision(model, batch, 3, weights)
    factors = [1 / 3] * 3 if weights == "uniform" else [0.75, 0.0, 0.25]
    carry = twin.initial_carry(batch)._replace(data=batch)
    losses = []
    for step, factor in enumerate(factors):
        y, z, outputs = twin.step(carry.y, carry.z, batch)
        carry = carry._replace(y=y, z=z, steps=carry.steps + 1)
        if not no_continue:
            target = twin.target_continue(y, z, torch.full((3,), step + 1), batch)
            outputs = outputs._replace(target_continue=target)
        losses.append(factor * twin.loss(carry, outputs).loss)
    sum(losses).backward()
    assert abs(total.item() - sum(losses).item()) <= 8 * DOUBLE * total.item()
    # The same terms, added up in another order.
    pairs = [*zip(model.parameters(), twin.parameters(), strict=True)]
    grads = [(one.grad, other.grad) for one, other in pairs]
    grads.append((model.puzzles.table.grad.to_dense(), twin.puzzles.table.grad.to_dense()))
    for one, other in grads:
        assert (one - other).abs().max() <= 64 * DOUBLE * other.abs().max()
    assert last.metrics["steps"] == 9 and last.metrics["count"] == 3


class Kept:
    """Counts the bytes that graphs keep alive, and their largest number."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        self.now += tensor.nbytes
        self.peak = max(self.peak, self.now)
        return Held(self, tensor)


class Held:
    def __init__(self, kept: Kept, tensor):
        self.kept, self.tensor = kept, tensor

    def __del__(self):
        self.kept.now -= self.tensor.nbytes


def test_the_memory_of_joint_supervision_does_not_grow_with_its_steps():
    model = make(small())
    batch, peaks = batch_of(model.config), []
    for steps in (1, 2, 8):
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
            joint_supervision(model, batch, steps)
        peaks.append(kept.peak)
        assert kept.now == 0
    assert peaks[0] == peaks[1] == peaks[2] > 0


def test_joint_supervision_takes_another_loss_and_backward():
    model, seen = make(small()), []
    batch = batch_of(model.config)

    def loss(carry, outputs, **options):
        seen.append((carry.steps[0].item(), options))
        return model.loss(carry, outputs, **options)

    options = {"halt_weight": 0.0, "kind": "softmax"}
    calls = []
    joint_supervision(model, batch, 2, loss=loss, backward=calls.append, **options)
    assert seen == [(1, options), (2, options)] and len(calls) == 2
    assert all(parameter.grad is None for parameter in model.parameters())
