"""What callbacks see of an update and may do to it; what they add to records and checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trm_fast.optim import GrokFastAdamW
from trm_fast.train import (
    Callback,
    Checkpoints,
    Metrics,
    Objective,
    Run,
    Step,
    StepResult,
    Tracker,
    Trainer,
    TrainerConfig,
)
from trm_fast.train._interval import add_metrics
from trm_fast.train.checkpoints.snapshot import restore, snapshot
from trm_fast.train.meter import Meter

from .runs import differences, function_run, result
from .test_trainer import loss, network, split


def plain_run(*callbacks: Callback, optimizer: Any = None, **config: Any) -> Trainer:
    """Plain descent on six batches of six rows, in float64."""
    model = network()
    made = optimizer or (lambda model: torch.optim.SGD(model.parameters(), lr=0.5))
    settings = TrainerConfig(**{"steps": 3, **config})
    return Trainer(model, made, split(6), each, settings, callbacks=callbacks, device="cpu")


def each(model: nn.Module, batch: tuple[Tensor, Tensor]) -> StepResult:
    nats = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return StepResult(nats.mean(), {"nats": (nats.sum(), len(nats))}, {"nats": nats.detach()})


def weights(run: Run) -> Tensor:
    return torch.cat([param.detach().flatten() for param in run.model.parameters()])


def gradient(run: Run) -> Tensor:
    return torch.cat([param.grad.flatten() for param in run.model.parameters()])


class Watch(Callback):
    """Keeps weights and gradients at both hooks of each step."""

    def __init__(self) -> None:
        self.before: list[tuple[Tensor, Tensor, Step]] = []
        self.after: list[tuple[Tensor, Tensor, Step]] = []

    def on_gradients(self, run: Run, step: Step) -> None:
        self.before.append((weights(run), gradient(run), step))

    def on_step(self, run: Run, step: Step) -> None:
        assert run.step == step.index
        self.after.append((weights(run), gradient(run), step))


def test_gradients_are_seen_before_the_weights_move_and_still_after_it():
    watch = Watch()
    trainer = plain_run(watch)
    start = weights(trainer)
    trainer.fit()
    for number, (before, after) in enumerate(zip(watch.before, watch.after, strict=True)):
        assert torch.equal(before[0], start)
        assert torch.equal(before[1], after[1])
        # One step of plain descent: two roundings of 2^-53 of numbers below 2.
        assert (after[0] - (start - 0.5 * before[1])).abs().max() <= 2 * 2 * 2**-53
        # Of this batch alone: nothing is left of the step before.
        model = network()
        nn.utils.vector_to_parameters(start, model.parameters())
        each(model, split(6)[number]).loss.backward()
        assert torch.equal(before[1], torch.cat([p.grad.flatten() for p in model.parameters()]))
        start = after[0]
    assert all(param.grad is None for param in trainer.model.parameters())


def test_a_step_says_what_it_was_made_of():
    watch = Watch()
    plain_run(watch, accumulate=2, steps=2).fit()
    batches = split(6)
    for number, (_, grad, step) in enumerate(watch.before):
        assert step.index == number + 1
        for batch, own in zip(step.batches, batches[2 * number :], strict=False):
            assert torch.equal(batch[0], own[0])
        assert torch.equal(step.loss, (step.losses[0] / 2 + step.losses[1] / 2).double())
        for one, samples in zip(step.losses, step.samples, strict=True):
            assert samples["nats"].shape == (6,) and torch.equal(samples["nats"].mean(), one)
        # A sum of squares of 147 numbers, in another order.
        assert float(step.norm) == pytest.approx(float(grad.norm()), rel=147 * 2**-53)
        assert bool(step.finite) and step.overflow is None


def test_a_controller_decides_of_the_update_that_comes():
    class Control(Callback):
        def on_gradients(self, run: Run, step: Step) -> None:
            run.optimizers[0].param_groups[0]["lr"] = 0.5 if step.index == 2 else 0.0
            step.clip_norm = 0.01

    watch = Watch()
    trainer = plain_run(Control(), watch)
    start = weights(trainer)
    trainer.fit()
    moved = [float((after[0] - before).norm()) for after, before in zip(
        watch.after, [start, *(after[0] for after in watch.after)], strict=False)]  # fmt: skip
    # The norm of the change is lr times that of the clipped gradient; torch adds 1e-6 to the norm.
    assert moved[0] == moved[2] == 0.0 and 0.5 * 0.0099 < moved[1] <= 0.5 * 0.01


def test_statistics_of_a_filter_can_be_read_in_both_hooks():
    found: dict[str, list[int]] = {"on_gradients": [], "on_step": []}

    class Read(Callback):
        def on_gradients(self, run: Run, step: Step) -> None:
            found["on_gradients"].append(len(run.optimizers[0].statistics()))

        def on_step(self, run: Run, step: Step) -> None:
            (entry,) = run.optimizers[0].statistics()
            norms = torch.stack([param.grad.norm() for param in entry.params])
            assert torch.allclose(entry.grad_norm, norms)
            found["on_step"].append(len(entry.params))

    def optimizer(model: nn.Module) -> GrokFastAdamW:
        return GrokFastAdamW(model.parameters(), lr=0.01, filter="ema")

    plain_run(Read(), optimizer=optimizer, clip_norm=0.1).fit()
    assert found == {"on_gradients": [1, 1, 1], "on_step": [6, 6, 6]}


def test_gradients_of_a_step_that_an_error_has_ended_do_not_stay():
    class Fail(Callback):
        fails = True

        def on_gradients(self, run: Run, step: Step) -> None:
            if self.fails:
                raise KeyError("a fault")

    fail, watch = Fail(), Watch()
    trainer = plain_run(fail, watch, steps=1)
    with pytest.raises(KeyError):
        trainer.fit()
    fail.fails = False
    trainer.fit()
    model = network()
    each(model, split(6)[1]).loss.backward()
    wanted = torch.cat([param.grad.flatten() for param in model.parameters()])
    assert torch.equal(watch.before[0][1], wanted)


# Metrics


class Tells(Callback):
    def __init__(self, key: str, name: str = "") -> None:
        self.key, self.name, self.calls = key, name, 0

    def metrics(self) -> Metrics:
        self.calls += 1
        return {self.key: (torch.tensor(6.0 * self.calls), 2.0)}


def test_metrics_of_callbacks_stand_in_records_under_their_own_names(tmp_path):
    written: list[dict[str, float]] = []

    class Keep:
        def write(self, step: int, numbers: dict[str, float]) -> None:
            written.append(numbers)

        def close(self) -> None:
            pass

    tells = Tells("grok/lamb")
    trainer = function_run(tmp_path, (tells, Tracker(lambda run: Keep())))
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for records in (lines, trainer.history):
        found = [record["grok/lamb"] for record in records if record["kind"] == "train"]
        assert found == [3.0, 6.0, 9.0]
        assert not any("grok/lamb" in r for r in records if r["kind"] == "evaluation")
    assert [n["grok/lamb"] for n in written if "grok/lamb" in n] == [3.0, 6.0, 9.0]
    assert "train/loss" in written[0]


def test_a_name_that_is_taken_costs_no_step(tmp_path):
    with pytest.raises(ValueError, match="names of their own"):
        function_run(tmp_path / "parts", (Tells("loss"),), save_every=0).fit()
    assert Checkpoints(tmp_path / "parts").load().step == 4
    function_run(tmp_path / "parts").fit(resume=True)
    function_run(tmp_path / "whole").fit()
    parts, whole = result(tmp_path / "parts"), result(tmp_path / "whole")
    # The resume has made up for the record.
    assert differences(parts, whole) == []


class Two:
    """Two processes, of which the other one has metrics of other names."""

    size = 2

    def __init__(self, *names: str) -> None:
        self.names, self.exchanges = names, 0

    def gather(self, value: Any) -> list[Any]:
        other = {name: {*self.names} for name in value} if isinstance(value, dict) else []
        return [value, other or [*self.names]]

    def add_up(self, tensor: Tensor) -> None:
        self.exchanges += 1


def test_metrics_that_only_some_processes_have_are_exchanged_by_all():
    record, world = {"loss": 1.0}, Two("b")
    add_metrics(record, {"tells": Tells("a")}, Meter(torch.device("cpu")), world)
    assert record["a"] == 3.0 and "b" in record and world.exchanges == 2
    with pytest.raises(ValueError, match="got 'loss' from the trainer and from callback tells"):
        add_metrics(record, {"tells": Tells("c")}, Meter(torch.device("cpu")), Two("loss"))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ((Tells("loss"),), "got 'loss' from the trainer and from callback Tells"),
        ((Tells("accuracy"),), "got 'accuracy' from the trainer and from callback Tells"),
        ((Tells("lr"),), "got 'lr' from the trainer and from callback Tells"),
        ((Tells("a", "one"), Tells("a", "two")), "got 'a' from callback one and from callback two"),
    ],
)
def test_a_name_that_is_taken_is_refused_with_both_owners(callbacks, message):
    with pytest.raises(ValueError, match=f"metrics must have names of their own; {message}"):
        function_run(None, callbacks).fit()


# Extra updates


class Extra(Callback):
    """Takes an extra update after each second step, on the first batch."""

    def __init__(self, objective: Any = each, name: str = "replay") -> None:
        self.objective, self.key = objective, name
        self.moved: list[bool] = []

    def on_step(self, run: Run, step: Step) -> None:
        if run.step % 2:
            return
        before, grad = weights(run), gradient(run)
        self.found = run.extra_update(self.objective, [split(6)[0]], self.key)
        self.moved.append(not torch.equal(before, weights(run)))
        assert torch.equal(grad, gradient(run))


def test_an_extra_update_moves_weights_and_is_no_step():
    extra, watch = Extra(), Watch()
    trainer = plain_run(extra, watch, steps=4, log_every=4)
    trainer.schedules = [torch.optim.lr_scheduler.StepLR(trainer.optimizers[0], 100)]
    trainer.fit()
    assert extra.moved == [True, True]
    assert (trainer.step, trainer.extra_updates, len(watch.before)) == (4, 2, 4)
    assert trainer.schedules[0].last_epoch == 4
    assert extra.found.index == 2 and float(extra.found.norm) > 0
    record = trainer.history[0]
    assert record["replay/loss"] == pytest.approx(record["replay/nats"]) != record["loss"]

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for number in (0, 1, 0, 2, 3, 0):  # the batches of the steps, and the first one in between
        each(model, split(6)[number]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(weights(trainer), nn.utils.parameters_to_vector(model.parameters()))


def test_an_extra_update_that_is_not_finite_is_skipped_and_told():
    class Bad(Callback):
        def on_step(self, run: Run, step: Step) -> None:
            before = weights(run)
            run.extra_update(lambda model, batch: loss(model, batch) * float("nan"), [split(6)[0]])
            assert torch.equal(before, weights(run))

    trainer = plain_run(Bad(), steps=2, on_nonfinite="skip")
    summary = trainer.fit()
    assert summary.skipped == 2 and trainer.extra_updates == 2


def test_wrong_extra_updates_are_refused():
    class Early(Callback):
        def on_gradients(self, run: Run, step: Step) -> None:
            run.extra_update(each, [split(6)[0]])

    with pytest.raises(RuntimeError, match="must not come between the gradients of a step and"):
        plain_run(Early()).fit()

    class Empty(Callback):
        def on_step(self, run: Run, step: Step) -> None:
            run.extra_update(each, [])

    with pytest.raises(ValueError, match="extra_update needs at least one batch"):
        plain_run(Empty()).fit()
    with pytest.raises(ValueError, match="'replay' for FunctionObjective and Counts"):
        plain_run(Extra(), _named(Extra(Counts()), "other"), steps=2).fit()


def _named(callback: Callback, name: str) -> Callback:
    callback.name = name
    return callback


class Counts(Objective):
    """Weighs its loss by how often it was asked before."""

    def __init__(self) -> None:
        self.count = 0

    def losses(self, model: nn.Module, batch: Any) -> Iterator[StepResult]:
        self.count += 1
        yield StepResult(loss(model, [part.float() if part.is_floating_point() else part
                                      for part in batch]) * self.count)  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("stop", [1, 2, 5, 7])
def test_extra_updates_come_back_with_the_state_of_their_objective(stop, tmp_path):
    from ..interruptions import Interruption

    def run(out: Path, *callbacks: Callback) -> Trainer:
        return function_run(out, (Extra(Counts()), *callbacks))

    run(tmp_path / "whole").fit()
    run(tmp_path / "parts", Interruption("signal", stop)).fit()
    trainer = run(tmp_path / "parts")
    trainer.fit(resume=True)
    assert trainer.extra_updates == 6
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []
    saved = Checkpoints(tmp_path / "parts").load().state
    assert saved["process"]["0"]["extra"] == {"replay": {"count": 6}}
    assert saved["trainer"]["extra_updates"] == 6


def test_another_number_of_processes_keeps_the_count_of_extra_updates():
    trainer = function_run(None, (Extra(Counts()),))
    trainer.fit()
    state = snapshot(trainer)
    state["trainer"]["world_size"] = 2
    again = function_run(None, (Extra(Counts()),))
    lost = restore(again, state)
    assert again.extra_updates == trainer.extra_updates == 6
    assert lost == (
        "the checkpoint is of 2 processes, now there are 1: carries, those of extra updates too, "
        "random generators and sums of metrics start anew, and buffers that differ are those of "
        "the first one"
    )


# State by name


class Keeps(Callback):
    """Has a state from the second step on."""

    def __init__(self, name: str = "") -> None:
        self.name, self.seen, self.calls = name, 0, 0

    def on_step(self, run: Run, step: Step) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        self.calls += 1
        return {"seen": self.seen} if self.seen > 1 else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_a_callback_without_a_state_yet_is_taken_up(tmp_path):
    function_run(tmp_path, (Keeps(),), steps=4).fit()
    again = Keeps()
    function_run(tmp_path, (again,), steps=6).fit(resume=True)
    assert again.seen == 6


def test_the_order_of_callbacks_does_not_matter_and_new_ones_may_come(tmp_path):
    function_run(tmp_path, (Keeps("a"), Keeps("b")), steps=4).fit()
    found = Keeps("b"), Keeps("new"), Keeps("a")
    function_run(tmp_path, found, steps=6).fit(resume=True)
    assert [callback.seen for callback in found] == [6, 2, 6]


def test_two_callbacks_of_one_name_are_refused():
    with pytest.raises(ValueError, match="got Keeps and Tells, both named 'Keeps'"):
        function_run(None, (Keeps(), Tells("a", "Keeps")))


def test_a_state_without_its_callback_is_refused(tmp_path):
    function_run(tmp_path, (Keeps("lost"),), steps=4).fit()
    other = function_run(tmp_path, (Keeps("found"),))
    before = weights(other)
    with pytest.raises(ValueError, match="has a state of 'lost'; got EarlyStopping noise, found"):
        other.fit(resume=True)
    assert torch.equal(before, weights(other))


def test_a_state_that_does_not_fit_is_refused_with_what_it_has(tmp_path):
    class Other(Keeps):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = state["amount"]

    function_run(tmp_path, (Keeps("a"),), steps=4).fit()
    with pytest.raises(ValueError, match="'a' must be one that it can load; got one with seen"):
        function_run(tmp_path, (Other("a"),)).fit(resume=True)


def test_the_state_of_a_callback_is_asked_once_for_each_checkpoint(tmp_path):
    keeps = Keeps()
    function_run(tmp_path, (keeps,), steps=6, evaluate=False).fit()
    # After three and six steps, and to see whether it can be saved: once before the hooks of the
    # start, once with what they add, and once with what the first step adds.
    assert keeps.calls == 5
