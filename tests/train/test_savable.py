"""What a run accepts can be saved, or is refused before its first step."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from trm_fast.train import Callback, Checkpoints, Objective, StepResult, Trainer, TrainerConfig

from .runs import differences, result
from .test_trainer import loss, network, split


def run(out: Any, *callbacks: Callback, objective: Any = loss, **config: Any) -> Trainer:
    model = network()
    options = {"lr": np.float64(0.1), "momentum": np.float32(0.5), "nesterov": np.bool_(False)}
    optimizer = torch.optim.SGD([{"params": model.parameters(), "tag": np.str_("all")}], **options)

    def shape(step: int) -> float:
        return (step + 1) / 5 if step < 3 else 0.5 * (1 + np.cos(np.pi * step / 20))

    every = {"save_every": 1, "evaluate_every": 2, "log_every": 2}
    return Trainer(
        model, optimizer, split(6), objective, TrainerConfig(**{"steps": 9, **every, **config}),
        schedules=[torch.optim.lr_scheduler.LambdaLR(optimizer, shape)], callbacks=callbacks,
        evaluate=lambda model: {"value": np.float32(0.5), "count": np.int64(3)}, out=out,
        device="cpu",
    )  # fmt: skip


class Numbers(Callback):
    """A state of NumPy's numbers."""

    def __init__(self, **state: Any) -> None:
        self.state = state or {"sum": np.float64(0.25), "at": {np.int64(3): np.array(2)}}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Counting(Objective):
    """Counts in a number of NumPy, and gives metrics of them."""

    seen = np.int64(0)

    def losses(self, model: Any, batch: Any) -> Any:
        self.seen += np.int64(1)
        yield StepResult(loss(model, batch), {"seen": (np.float64(self.seen), np.int64(1))})

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_numbers_of_numpy_are_saved_as_the_plain_ones_they_are(tmp_path):
    run(tmp_path / "whole", Numbers(), objective=Counting()).fit()
    state = Checkpoints(tmp_path / "whole").load().state
    group, own = state["optim"]["0"]["param_groups"][0], state["process"]["0"]
    found = [
        group["lr"], group["momentum"], group["nesterov"], group["tag"], own["objective"]["seen"],
        own["callbacks"]["Numbers"]["sum"], *own["callbacks"]["Numbers"]["at"].items(),
    ]  # fmt: skip
    lr = 0.1 * 0.5 * (1 + math.cos(math.pi * 9 / 20))
    # Two roundings differ at most, of numbers below 0.1.
    assert found == [pytest.approx(lr, abs=2 * 2**-56), 0.5, False, "all", 9, 0.25, (3, 2)]
    assert [*map(type, found)] == [float, float, bool, str, int, float, tuple]
    # A run that goes on with the plain ones ends with the same bits.
    run(tmp_path / "parts", Numbers(), objective=Counting(), steps=4).fit()
    run(tmp_path / "parts", Numbers(), objective=Counting()).fit(resume=True)
    assert differences(result(tmp_path / "whole"), result(tmp_path / "parts")) == []


def test_numbers_of_numpy_are_settings(tmp_path):
    config = {"steps": np.int64(2), "save_every": np.int32(1), "clip_norm": np.float32(0.5)}
    assert run(tmp_path, **config, ema=np.float64(0.9)).fit().step == 2


class Late(Numbers):
    """A state that comes in a hook."""

    def on_start(self, run: Any) -> None:
        self.state = {"seen": {"a", "b"}}


@pytest.mark.parametrize("callback", [Numbers(seen={"a", "b"}), Late()])
def test_a_state_that_cannot_be_saved_is_refused_before_the_first_step(callback, tmp_path):
    name = type(callback).__name__
    trainer = run(tmp_path, callback, save_every=0)
    with pytest.raises(
        TypeError, match=rf"process.0.callbacks.{name}.seen must be .*; got builtins.set"
    ):
        trainer.fit()
    assert trainer.step == 0 and not Checkpoints(tmp_path).list()


@pytest.mark.parametrize(
    ("kind", "value"), [("buffer", math.nan), ("parameter", math.inf), ("parameter", math.nan)]
)
def test_a_weight_that_cannot_be_saved_is_refused_before_the_first_step(kind, value, tmp_path):
    trainer = run(tmp_path)
    odd = torch.tensor([0.0, value])
    if kind == "buffer":
        trainer.model.register_buffer("odd", odd)
    else:
        trainer.model.register_parameter("odd", torch.nn.Parameter(odd))
    with pytest.raises(ValueError, match=r"model.odd must be .*; got NaN or infinity in 1 of 2"):
        trainer.fit()
    assert trainer.step == 0


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_buffer_may_be_infinite_as_masks_are(ema, tmp_path):
    def make(**config: Any) -> Trainer:
        trainer = run(tmp_path, **config)
        trainer.model.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
        return trainer

    make(steps=4, ema=ema).fit()
    trainer = make(ema=ema)
    trainer.fit(resume=True)
    mask = Checkpoints(tmp_path).load().state["model"]["mask"]
    assert torch.equal(mask, torch.full((2, 2), -math.inf).triu(1))
    assert torch.equal(trainer.model.mask, mask)


class Whole(Numbers):
    """Its state is no dict."""

    def state_dict(self) -> Any:
        return torch.zeros(3)


def test_a_state_of_a_callback_that_is_no_dict_is_refused_before_the_first_step(tmp_path):
    trainer = run(tmp_path, Whole())
    message = r"state_dict\(\) of callback 'Whole' must return a dict; got Tensor"
    with pytest.raises(TypeError, match=message):
        trainer.fit()
    assert trainer.step == 0


def test_a_nested_tensor_is_refused_by_its_place(tmp_path):
    trainer = run(tmp_path, Numbers(rows=torch.nested.nested_tensor([torch.ones(2)])))
    with pytest.raises(TypeError, match=r"process.0.callbacks.Numbers.rows must be a dense tensor"):
        trainer.fit()


def test_a_state_that_becomes_one_that_cannot_be_saved_is_named(tmp_path):
    class Becomes(Numbers):
        def on_step(self, run: Any, step: Any) -> None:
            if run.step == 3:
                self.state = {"list": [1, np.zeros(2)]}

    with pytest.raises(TypeError, match=r"process.0.callbacks.Becomes.list.1 must .*ndarray"):
        run(tmp_path, Becomes()).fit()
    assert Checkpoints(tmp_path).load().step == 2


def test_a_run_that_writes_nothing_may_have_any_state():
    assert run(None, Numbers(seen={"a"})).fit().step == 9
