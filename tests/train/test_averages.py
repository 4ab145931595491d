"""The average of the weights in a run: it starts at the weights of the first update."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trm_fast.optim import AdamATan2, GrokFastAdamW, GrokFastSGD
from trm_fast.train import Callback, Run, Step, Trainer, TrainerConfig

OPTIMIZERS = {
    "beside torch's SGD": (torch.optim.SGD, {}, 0.9),
    "beside AdamW": (GrokFastAdamW, {}, 0.9),
    "of AdamW": (GrokFastAdamW, {"weight_ema": 0.9}, None),
    "of SGD": (GrokFastSGD, {"weight_ema": 0.9}, None),
    "of AdamATan2": (AdamATan2, {"weight_ema": 0.9}, None),
}
each_average = pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Truth(Callback):
    """The average in float64, from the weights before the first update on."""

    def on_start(self, run: Run) -> None:
        self.average = run.model.weight.detach().double()

    def on_step(self, run: Run, step: Step) -> None:
        self.average = 0.9 * self.average + 0.1 * run.model.weight.detach().double()


def make(case: Any, out: Path | None = None, steps: int = 5) -> tuple[Trainer, Truth]:
    kind, options, ema = case
    torch.manual_seed(0)
    model, truth = nn.Linear(4, 8), Truth()
    trainer = Trainer(
        model, kind(model.parameters(), lr=0.1, **options), [torch.ones(2, 4)],
        lambda model, batch: model(batch).square().mean(), TrainerConfig(steps=steps, ema=ema),
        evaluate=lambda model: {"weight": model.weight.mean()}, callbacks=[truth], out=out,
        device="cpu",
    )  # fmt: skip
    return trainer, truth


def load_fives(model: nn.Module) -> None:
    state: dict[str, Tensor] = model.state_dict()
    model.load_state_dict({name: torch.full_like(value, 5.0) for name, value in state.items()})


@pytest.mark.parametrize("loaded", [False, True])
@each_average
def test_it_starts_at_the_weights_of_the_first_update(case, loaded):
    trainer, truth = make(case)
    if loaded:
        load_fives(trainer.model)
    assert trainer.evaluate()["weight"] == float(trainer.model.weight.detach().mean())
    assert trainer.ema is not None
    assert torch.equal(trainer.ema.average["weight"], trainer.model.weight)
    trainer.fit()
    # Three roundings a step, of values below 6.
    error = (trainer.ema.average["weight"].double() - truth.average).abs().max()
    assert error < 5 * 3 * 2**-24 * 6


@each_average
def test_it_goes_on_from_a_checkpoint_before_the_first_update(case, tmp_path):
    class Stop(Callback):
        def on_start(self, run: Run) -> None:
            run.stop("nothing is done yet")

    first, _ = make(case, tmp_path)
    load_fives(first.model)
    first.callbacks.append(Stop())
    assert first.fit().step == 0
    second, truth = make(case, tmp_path)
    second.fit(resume=True)
    assert second.ema is not None
    error = (second.ema.average["weight"].double() - truth.average).abs().max()
    assert error < 5 * 3 * 2**-24 * 6
    assert bool((second.ema.average["weight"] > 2).all())
