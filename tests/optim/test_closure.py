"""An optimizer that asks for a closure in its step is named, with the remedy; nothing has moved."""

import pytest
import torch
from torch import nn

from trm_fast.optim import GradFilter
from trm_fast.train import StepResult, Trainer, TrainerConfig


class Asserting(torch.optim.SGD):
    """As published forms of SAM."""

    def step(self, closure=None):
        assert closure is not None
        return super().step(closure)


class Calling(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure()) if closure() else None


class Saying(torch.optim.SGD):
    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("a closure\nis needed")
        return super().step(closure)


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("another reason")


def trained(model, kind):
    def loss(model, batch):
        return StepResult(model(batch).square().mean(), {})

    optimizers = kind(model.parameters(), lr=0.1)
    config = TrainerConfig(steps=1)
    Trainer(model, optimizers, [torch.ones(2, 3)], loss, config=config).fit()


def filtered(model, kind):
    model(torch.ones(2, 3)).square().mean().backward()
    GradFilter(kind(model.parameters(), lr=0.1)).step()


@pytest.mark.parametrize("kind", [Asserting, Calling, Saying])
@pytest.mark.parametrize(
    ("step", "remedy"), [(trained, "One such as AdamW does"), (filtered, "Filter in its closure")]
)
def test_a_step_that_asks_for_a_closure_is_named(step, remedy, kind):
    model = nn.Linear(3, 1)
    before = model.weight.clone()
    message = rf"must step without a closure.*got {kind.__name__}\. {remedy}.*step says \w+Error"
    with pytest.raises(ValueError, match=message) as caught:
        step(model, kind)
    assert "\n" not in str(caught.value) and torch.equal(model.weight, before)


def test_another_error_of_a_step_stays_as_it_is():
    with pytest.raises(RuntimeError, match=r"^another reason$"):
        trained(nn.Linear(3, 1), Failing)
