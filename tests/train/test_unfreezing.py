"""Parameters that come during a run are under everything that the first ones are under."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trm_fast.optim import GradFilter, GrokFastAdamW, WeightEMA
from trm_fast.train import Callback, Step, Trainer, TrainerConfig

from .runs import differences, result
from .test_trainer import loss, network, split

OPTIMIZERS = {
    "grokfast": lambda params: GrokFastAdamW(params, lr=0.01, weight_ema=0.9),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "named": lambda params: torch.optim.SGD(
        [(str(index), param) for index, param in enumerate(params, 2)], lr=0.1
    ),
    "filter": lambda params: GradFilter(torch.optim.SGD(params, lr=0.1, momentum=0.9)),
}


class Unfreeze(Callback):
    """Gives the optimizer the first layer at a step, by name where it has names."""

    def __init__(self, hook: str = "on_step", step: int = 2) -> None:
        setattr(self, hook, self.unfreeze)
        self.step = step

    def unfreeze(self, run: Any, step: Step) -> None:
        if step.index == self.step:
            run.model[0].requires_grad_(True)
            optimizer, params = run.optimizers[0], run.model[0].named_parameters()
            named = "param_names" in optimizer.param_groups[0]
            optimizer.add_param_group({"params": list(params if named else dict(params).values())})


def run(out: Any = None, *callbacks: Callback, optimizer: str = "sgd", **config: Any) -> Trainer:
    model = network()
    model[0].requires_grad_(False)
    settings = {"steps": 8, "log_every": 2, **config}
    return Trainer(
        model, OPTIMIZERS[optimizer](model[2].parameters()), split(6), loss,
        TrainerConfig(**settings), callbacks=callbacks, out=out, device="cpu",
        evaluate=lambda model: {"value": float(loss(model, split(6)[0]))},
    )  # fmt: skip


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def spoil(model: nn.Module) -> None:
    model[0].weight.register_hook(lambda grad: torch.full_like(grad, float("nan")))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_whose_new_gradient_is_not_finite_changes_nothing(optimizer):
    trainer = run(None, Unfreeze(), optimizer=optimizer, max_nonfinite=9)
    for step in trainer.updates():
        if step == 3:
            spoil(trainer.model)
            before = weights(trainer.model)
        if step == 4:
            break
    assert all(map(torch.equal, before, weights(trainer.model)))
    assert trainer.guard.skipped == 1


@pytest.mark.parametrize("hook", ["on_gradients", "on_step"])
def test_new_parameters_are_clipped_and_move_from_the_next_step_on(hook):
    norms, moved = [], []

    class Watch(Callback):
        def on_gradients(self, run: Any, step: Step) -> None:
            params = [*run.model[0].parameters(), *run.model[2].parameters()]
            grads = [p.grad for p in params[0 if step.index > 2 else 2 :]]
            norms.append((step.norm, torch.stack([g.norm() for g in grads]).norm()))
            self.before = run.model[0].weight.detach().clone()

        def on_step(self, run: Any, step: Step) -> None:
            moved.append(not torch.equal(self.before, run.model[0].weight))

    run(None, Watch(), Unfreeze(hook), steps=5, clip_norm=0.1).fit()
    assert moved == [False, False, True, True, True]
    for found, expected in norms:
        # 140 numbers: sums of squares in another order.
        assert abs(found - expected) <= 140 * 2**-53 * expected


def test_gradients_from_before_a_parameter_came_are_dropped():
    """A layer that was never frozen has gathered those of all steps."""
    trainer = run(None, steps=4)
    trainer.model[0].requires_grad_(True)
    found = []

    class Watch(Callback):
        def on_gradients(self, run: Any, step: Step) -> None:
            if step.index > 2:
                value = loss(run.model, step.batches[0])
                (expected,) = torch.autograd.grad(value, [run.model[0].weight])
                found.append(torch.equal(run.model[0].weight.grad, expected))

    trainer.callbacks.append(Watch())
    for step in trainer.updates():
        if step == 2:
            trainer.optimizers[0].add_param_group({"params": [trainer.model[0].weight]})
    assert found == [True, True]


@pytest.mark.parametrize("optimizer", ["grokfast", "sgd"])
def test_new_parameters_are_averaged(optimizer):
    ema = None if optimizer == "grokfast" else 0.9
    trainer = run(None, Unfreeze(), optimizer=optimizer, ema=ema)
    trainer.fit()
    assert isinstance(trainer.ema, WeightEMA)
    own, average = trainer.model[0].weight.detach().clone(), trainer.ema.average["0.weight"]
    assert not torch.equal(average, own)
    with trainer.ema.swapped():
        assert torch.equal(trainer.model[0].weight, average)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_has_the_groups_that_came_during_it(optimizer, steps, tmp_path):
    config = {"evaluate_every": 1, "optimizer": optimizer, "clip_norm": 0.5, "log_every": 1}
    run(tmp_path / "whole", Unfreeze(), **config).fit()
    run(tmp_path / "parts", Unfreeze(), steps=steps, **config).fit()
    resumed = run(tmp_path / "parts", Unfreeze(), **config)
    resumed.fit(resume=True)
    assert all(param.requires_grad for param in resumed.model.parameters())
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []
