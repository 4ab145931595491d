"""Precision "fp16": the loss is scaled, and nobody but the backward pass sees it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trm_fast.optim import GrokFastAdamW
from trm_fast.train import Callback, Checkpoints, NonFiniteError, Run, Step, Trainer, TrainerConfig
from trm_fast.train.run_directory import read_records

from .runs import differences
from .test_guard import kept
from .test_hooks import Watch
from .test_trainer import loss, split

START = 2.0**16  # torch's


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def run(
    *callbacks: Callback, objective: Any = loss, out: Path | None = None, **config: Any
) -> Trainer:
    net = model()
    optimizer = GrokFastAdamW(net.parameters(), lr=0.01, filter="ema")
    settings = TrainerConfig(**{"steps": 6, "precision": "fp16", **config})
    batches = split(6, dtype=torch.float32)
    return Trainer(net, optimizer, batches, objective, settings, callbacks=callbacks, out=out,
                   device="cpu")  # fmt: skip


class Overflow:
    """A loss whose gradient leaves the range of float16 from a scale on."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, net: nn.Module, batch: Any) -> Tensor:
        logits = net(batch[0])
        value = nn.functional.cross_entropy(logits.float(), batch[1])
        return value + _Limited.apply(logits, self.limit)


class _Limited(torch.autograd.Function):
    """Zero, whose gradient is 0 below a limit of that of the result, and infinite from there on."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, limit: float) -> Tensor:
        ctx.like, ctx.limit = logits, limit
        return logits.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        overflows = float(grad) >= ctx.limit
        return torch.full_like(ctx.like, float("inf") if overflows else 0.0), None


def test_callbacks_see_gradients_and_norms_without_the_scale():
    watch = Watch()
    run(watch, clip_norm=0.05, steps=1).fit()
    (_, grad, step) = watch.before[0]
    net = model()
    with torch.autocast("cpu", torch.float16):
        value = loss(net, split(6, dtype=torch.float32)[0])
    (START * value).backward()
    wanted = torch.cat([param.grad.flatten() for param in net.parameters()]) / START
    assert torch.equal(grad, wanted)
    # A sum of 83 squares in float32.
    assert float(step.norm) == pytest.approx(float(wanted.norm()), rel=83 * 2**-24)
    assert float(step.loss) == float(value.detach())
    assert float(step.norm) > 0.05 and step.clip_norm == 0.05


def test_clipping_is_by_the_norm_without_the_scale():
    # The same gradients in float32, but for roundings of 2^-11 of what autocast computes in
    # float16; Adam's first step is lr times the sign where they are far from 0, so clip shows in
    # plain descent.
    moved = {}
    for precision in ("fp32", "fp16"):
        net = model()
        before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        settings = TrainerConfig(steps=1, precision=precision, clip_norm=0.05)
        batches = split(6, dtype=torch.float32)
        Trainer(net, optimizer, batches, loss, settings, device="cpu").fit()
        moved[precision] = nn.utils.parameters_to_vector(net.parameters()).detach() - before
    assert float(moved["fp16"].norm()) == pytest.approx(0.05, rel=1e-4)
    # Relative to the norm: six products of 8 and 6 terms, each rounded to 2^-11.
    assert (moved["fp16"] - moved["fp32"]).norm() <= 0.05 * 14 * 2**-11


@pytest.mark.parametrize("on_device", [False, True])
def test_an_overflow_is_skipped_scales_down_and_does_not_end_the_run(on_device, tmp_path):
    watch = Watch()
    # Five overflows in a row, from 2^16 to 2^12: more than max_nonfinite.
    trainer = run(watch, objective=Overflow(2.0**12), out=tmp_path, steps=8)
    trainer._update.on_device = on_device
    summary = trainer.fit()
    assert [bool(step.finite) for *_, step in watch.after] == [False] * 5 + [True] * 3
    assert [bool(step.overflow) for *_, step in watch.after] == [True] * 5 + [False] * 3
    assert all(torch.equal(watch.after[0][0], after[0]) for after in watch.after[:5])
    assert not torch.equal(watch.after[5][0], watch.after[4][0])
    assert summary.skipped == 5 and trainer.scaler.get_scale() == 2.0**11
    events = read_records(tmp_path / "events.jsonl")
    assert ["float16 has overflowed" in event["message"] for event in events] == [True] * 5


def test_the_device_decides_of_an_overflow_as_the_host_does():
    found = []
    for on_device in (False, True):
        trainer = run(objective=Overflow(2.0**13), steps=8, clip_norm=0.5)
        trainer._update.on_device = on_device
        trainer.fit()
        found.append(kept(trainer))
    assert differences(*found) == []


def test_a_loss_that_is_not_finite_ends_the_run_as_ever():
    def bad(net: nn.Module, batch: Any) -> Tensor:
        return loss(net, batch) * float("nan")

    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        run(objective=bad).fit()


def test_a_gradient_that_no_scale_mends_ends_the_run():
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        run(objective=Overflow(2.0**-20), steps=40).fit()


def test_the_scale_is_saved_and_comes_back(tmp_path):
    trainer = run(objective=Overflow(2.0**14), out=tmp_path, steps=5)
    trainer.fit()
    saved = Checkpoints(tmp_path).load().state["trainer"]["scaler"]
    assert (saved["scale"], saved["_growth_tracker"]) == (2.0**13, 2)
    scales = []

    class Look(Callback):
        def on_step(self, run: Run, step: Step) -> None:
            scales.append(run.scaler.get_scale())

    again = run(Look(), objective=Overflow(2.0**14), out=tmp_path, steps=7)
    again.fit(resume=True)
    assert scales == [2.0**13] * 2 and again.scaler._get_growth_tracker() == 4


def test_an_update_that_reaches_no_weight_of_the_optimizer_leaves_the_scale():
    """As in a stage that trains other weights."""
    other = nn.Parameter(torch.ones(2))
    trainer = run(objective=lambda net, batch: other.square().sum(), steps=3)
    before = [param.detach().clone() for param in trainer.model.parameters()]
    assert trainer.fit().step == 3
    assert trainer.scaler.get_scale() == START
    assert all(map(torch.equal, before, trainer.model.parameters()))
