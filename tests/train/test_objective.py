"""Objectives that yield their losses: when backward runs, what the end of a batch may do."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trm_fast.nn.supervision import deep_supervision
from trm_fast.train import DeepSupervision, Objective, StepResult, Trainer, TrainerConfig

from .test_trainer import loss, network, split


class Written(Objective):
    """Notes what happens, in order."""

    def __init__(self, count: int = 2) -> None:
        self.told: list[str] = []
        self.count = count

    def losses(self, model: nn.Module, batch: Any) -> Iterator[StepResult]:
        for number in range(self.count):
            self.told.append(f"forward {number}")
            value = loss(model, batch)
            value.register_hook(lambda grad, number=number: self.told.append(f"backward {number}"))
            yield StepResult(value)
        self.told.append("end")

    def commit(self, finite: Tensor) -> None:
        self.told.append(f"commit {bool(finite)}")


def run(objective: Any, model: nn.Module | None = None, **config: Any) -> Trainer:
    model = model or network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = TrainerConfig(**{"steps": 1, "log_every": 1, **config})
    return Trainer(model, optimizer, split(6), objective, settings, device="cpu")


def test_backward_runs_after_each_loss_and_the_end_before_the_update():
    objective = Written()
    run(objective, accumulate=2).fit()
    once = ["forward 0", "backward 0", "forward 1", "backward 1", "end"]
    assert objective.told == [*once, *once, "commit True"]


def test_an_update_that_was_not_taken_is_committed_too():
    class Bad(Written):
        def losses(self, model: nn.Module, batch: Any) -> Iterator[StepResult]:
            for found in super().losses(model, batch):
                yield found._replace(loss=found.loss * float("nan"))

    objective = Bad()
    run(objective, on_nonfinite="skip").fit()
    assert objective.told[-1] == "commit False"


@pytest.mark.parametrize(
    ("count", "declared", "message"),
    [
        (0, None, "losses of Written must yield at least one; got 0"),
        (0, 2, "losses of Written must yield 2, as backwards says; got 0"),
        (1, 2, "losses of Written must yield 2, as backwards says; got 1"),
        (3, 2, "losses of Written must yield 2, as backwards says; got 3"),
    ],
)
def test_a_wrong_number_of_losses_is_refused(count, declared, message):
    objective = Written(count)
    objective.backwards = declared
    with pytest.raises(ValueError, match=message):
        run(objective).fit()


def test_an_error_in_an_objective_leaves_autocast_off():
    def fails(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("a fault")

    with pytest.raises(KeyError):
        run(fails, precision="bf16").fit()
    assert not torch.is_autocast_enabled("cpu")


# Deep supervision


class Embedded(nn.Module):
    """Any model: an embedding, a state, and a head."""

    def __init__(self, cut: bool = True) -> None:
        super().__init__()
        self.embedding, self.net, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.first = nn.Parameter(torch.ones(8))
        self.cut, self.calls = cut, 0

    def start(self, batch: Any) -> dict[str, Any]:
        self.calls += 1
        x = torch.tanh(self.embedding(batch[0]))
        return {"x": x, "y": (self.first.expand(len(x), 8), None), "steps": 0}

    def forward(self, state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], Tensor]:
        y = torch.tanh(self.net(state["x"] + state["y"][0]))
        return {**state, "y": (y, None), "steps": state["steps"] + 1}, self.head(y)


def embedded() -> Embedded:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Embedded().double()


def entropy(logits: Tensor, batch: Any) -> StepResult:
    nats = nn.functional.cross_entropy(logits, batch[1], reduction="none")
    return StepResult(nats.mean(), {"nats": (nats.sum(), len(nats))}, {"nats": nats.detach()})


def whole_gradient(weights: list[float]) -> list[Tensor]:
    """Of one backward pass over the sum, in which the states alone are cut."""
    model, batch = embedded(), split(6)[0]
    state, total = model.start(batch), 0.0
    for weight in weights:
        state, logits = model(state, batch)
        total = total + weight * entropy(logits, batch).loss
        state["y"] = (state["y"][0].detach(), None)
    total.backward()
    return [param.grad for param in model.parameters()]


@pytest.mark.parametrize("weights", ["uniform", "halving", (0.33, 0.5, 0.75, 1.0)])
def test_deep_supervision_of_any_model_has_the_gradient_of_the_sum(weights):
    model, objective = embedded(), DeepSupervision(entropy, 4, weights)
    found = []
    for one in objective.losses(model, split(6)[0]):
        one.loss.backward()
        found.append(one)
    # The gradients of four steps are the same numbers, added up in another order.
    for param, wanted in zip(model.parameters(), whole_gradient(objective.weights), strict=True):
        assert (param.grad - wanted).abs().max() <= 8 * 2**-53 * (1 + wanted.abs().max())
    assert model.calls == 1 and objective.backwards == len(found) == 4
    assert [bool(one.metrics) for one in found] == [bool(one.samples) for one in found]
    assert [bool(one.metrics) for one in found] == [False, False, False, True]


def test_deep_supervision_keeps_no_graph_from_step_to_step():
    model, states = embedded(), []
    batch = split(6)[0]
    for _, state, logits in deep_supervision(
        lambda: model.start(batch), lambda state: model(state, batch), [0.5, 0.5]
    ):
        states.append(state)
        entropy(logits, batch).loss.backward()
    assert all(not state["y"][0].requires_grad for state in states)
    assert states[0]["x"] is states[1]["x"] and states[0]["x"].is_leaf
    assert [state["steps"] for state in states] == [1, 2]


def test_a_run_with_deep_supervision_learns():
    trainer = run(DeepSupervision(entropy, 3), embedded(), steps=120)
    trainer.optimizers[0].param_groups[0]["lr"] = 1.0
    trainer.fit()
    losses = [record["loss"] for record in trainer.history]
    assert losses[-1] < 0.9 * losses[0] and "nats" in trainer.history[0]


def test_deep_supervision_needs_a_step():
    with pytest.raises(ValueError, match="steps"):
        DeepSupervision(entropy, 0)


class Returned(Objective):
    """Hands over one thing in place of an iterator of losses."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def losses(self, model: nn.Module, batch: Any) -> Any:
        return self.found


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Returned(StepResult(torch.zeros(()))),
         "losses of Returned .* got one that is returned. Write yield in place of return"),
        (Returned(None), "losses of Returned must yield StepResults, .* got NoneType"),
        (Returned(iter([torch.zeros(())])), "losses of Returned must yield StepResults, .* Tensor"),
        (Returned([StepResult(0.5)]), "each with the loss as a tensor; got one with float"),
        (lambda model, batch: (loss(model, batch), {}), "must return the loss, .* got tuple"),
        (DeepSupervision(lambda outputs, batch: 0.5, steps=2), "must return the loss, .* float"),
    ],
)  # fmt: skip
def test_what_is_no_loss_is_refused(objective, message):
    model = embedded() if isinstance(objective, DeepSupervision) else network()
    with pytest.raises(TypeError, match=message):
        run(objective, model).fit()


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.expand(2),
        lambda value: value.detach(),
        lambda value: value.round().long(),
        lambda value: value * 1j,
    ],
)
def test_a_loss_without_a_backward_pass_is_refused_before_anything_moves(change):
    model = network()
    before = [param.clone() for param in model.parameters()]
    trainer = run(lambda model, batch: change(loss(model, batch)), model)
    message = r"the loss of FunctionObjective must be one real number that depends on parameters"
    with pytest.raises(ValueError, match=message):
        trainer.fit()
    assert trainer.step == 0 and all(map(torch.equal, model.parameters(), before))
