"""Names that a record has already, objectives that two updates share, verdicts before a save."""

import pytest
import torch

from trm_fast.train import Callback, Objective, StepResult, Trainer, TrainerConfig, read_checkpoint


def line(objective=None, out=None, evaluate=None, callbacks=(), **config):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    objective = objective or (lambda model, batch: model(batch).square().mean())
    return Trainer(
        model, optimizer, [torch.ones(4, 2)], objective, TrainerConfig(**config), out=out,
        evaluate=evaluate, callbacks=callbacks, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["step", "kind", "seconds", "lr", "steps_per_second", "a\nb"])
def test_metrics_of_an_objective_leave_the_fields_of_a_record_alone(name, tmp_path):
    def objective(model, batch):
        return StepResult(model(batch).square().mean(), {name: (7.5, 1.0)})

    trainer = line(objective, out=tmp_path, steps=3, log_every=1)
    with pytest.raises(ValueError, match="metrics of the objective must have names that can be"):
        trainer.fit()
    assert len([*(tmp_path / "ckpt").glob("step-*")]) == 1  # the steps until there are kept


@pytest.mark.parametrize("name", ["step", "kind"])
def test_metrics_of_an_evaluation_do_too(name, tmp_path):
    trainer = line(out=tmp_path, steps=3, evaluate=lambda model: {name: 0.5})
    with pytest.raises(ValueError, match="metrics of the evaluation must have names that can be"):
        trainer.fit()
    assert len([*(tmp_path / "ckpt").glob("step-*")]) == 1


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "a mapping of names to numbers; got None"),
        ([0.5], r"a mapping of names to numbers; got \[0.5\]"),
        ({"accuracy": None}, "a number for each metric; got None for 'accuracy'"),
        ({"accuracy": torch.ones(2)}, r"a number for each metric; got tensor\(\[1., 1.\]\) for"),
    ],
)
def test_an_evaluation_without_numbers_says_what_came(found, message):
    with pytest.raises(TypeError, match=f"Trainer: evaluate must return .*{message}"):
        line(evaluate=lambda model: found).evaluate()


class Squares(Objective):
    def losses(self, model, batch):
        yield StepResult(model(batch).square().mean())


class Again(Callback):
    def __init__(self, names):
        self.names, self.objective = names, Squares()

    def on_step(self, run, step):
        for name in self.names:
            run.extra_update(self.objective or run.objective, step.batches, name)


@pytest.mark.parametrize("shared", [True, False])
def test_an_objective_belongs_to_one_kind_of_update(shared):
    again = Again(["one", "two"] if shared else ["one"])
    if not shared:
        again.objective = None  # that of the run
    trainer = line(Squares(), callbacks=[again], steps=2)
    with pytest.raises(ValueError, match="extra_update needs an objective of its own"):
        trainer.fit()


class BrokenOnce(Callback):
    """An extra update that is not finite, after the last look at the verdicts of a step."""

    def on_evaluate(self, run, record):
        run.extra_update(lambda model, batch: model(batch).sum() * float("nan"), [torch.ones(1, 2)])


def test_a_verdict_is_counted_before_a_checkpoint(tmp_path):
    trainer = line(
        out=tmp_path, callbacks=[BrokenOnce()], evaluate=lambda model: {"score": 1.0}, steps=2,
        evaluate_every=1, save_every=1, on_nonfinite="skip",
    )  # fmt: skip
    summary = trainer.fit()
    newest = sorted((tmp_path / "ckpt").glob("step-*"))[-1]
    saved = read_checkpoint(newest).state["trainer"]["guard"]
    assert saved["skipped"] == summary.skipped == 2
