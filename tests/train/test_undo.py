"""A checkpoint of which any part cannot be taken over leaves the trainer as it was."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from trm_fast import GrokFastAdamW
from trm_fast.train import (
    Callback,
    Checkpoints,
    Curriculum,
    EpochBatches,
    Objective,
    Stage,
    StepResult,
    Trainer,
    TrainerConfig,
)
from trm_fast.train.checkpoints import snapshot as module
from trm_fast.train.checkpoints.loading import load_run
from trm_fast.train.checkpoints.snapshot import restore, snapshot
from trm_fast.train.checkpoints.state import flatten
from trm_fast.train.generators import fork_rng

from .runs import equal


class Counting(Callback):
    """Keeps a list that it changes in place, also where it fails."""

    name = "counting"
    fails = False

    def __init__(self):
        self.seen = [0]

    def on_step(self, run, step):
        self.seen.append(step.index)

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state):
        self.seen[:] = state["seen"]
        if self.fails:
            raise ValueError("it does not fit")


class Carrying(Objective):
    """Has a carry that it changes in place."""

    def __init__(self):
        self.carry = torch.zeros(2)

    def losses(self, model, batch):
        yield StepResult(model(batch).square().mean())

    def commit(self, finite):
        self.carry += 1

    def state_dict(self):
        return {"carry": self.carry.clone()}

    def load_state_dict(self, state):
        self.carry.copy_(state["carry"])


def made(out=None, steps=6):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.1), nn.Linear(3, 2))

    def second(run):
        run.model[2].p = 0.5

    stages = [
        Stage("first", [torch.randn(8, 4)], steps=3),
        Stage("second", None, settings=second, schedules=cosine),
    ]
    return Trainer(
        model, [GrokFastAdamW(model.parameters(), lr=0.1), torch.optim.SGD(model[0].parameters())],
        Curriculum(stages), Carrying(), TrainerConfig(steps=steps, save_every=2, ema=0.9),
        schedules=cosine, callbacks=[Counting()], out=out, device="cpu",
    )  # fmt: skip


def cosine(optimizers):
    return [torch.optim.lr_scheduler.CosineAnnealingLR(each, 20) for each in optimizers]


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    """A directory with a checkpoint of another stage, whose state differs in every part."""
    out = tmp_path_factory.mktemp("run")
    made(out).fit()
    return out


def everything(run):
    """Flat names to all that a run is made of."""
    tensors, tree = {}, {}
    for name, part in snapshot(run).items():
        own, tree[name] = flatten(deepcopy(part), name)
        tensors |= {f"{name}.{key}": value.clone() for key, value in own.items()}
    del tree["trainer"]["seconds"]
    more = {
        "p": run.model[2].p,
        "trained": [param.requires_grad for param in run.model.parameters()],
        "options": [
            {k: v for k, v in group.items() if k != "params"}
            for optimizer in run.optimizers
            for group in optimizer.param_groups
        ],
        "schedules": [type(each).__name__ for each in run.schedules],
        "seen": list(run.callbacks[0].seen),
        "carry": run.objective.carry.clone(),
    }
    return {**tensors, "tree": tree, **more}


def changed(before, after):
    return [k for k in {*before, *after} if not equal(before.get(k), after.get(k))]


def failing(*_, **__):
    raise ValueError("it does not fit")


# What fails -> how it is made to; in the order in which the parts are taken over.
FAILURES = {
    "groups": lambda run, patch: patch.setattr(module, "check_weights", failing),
    "callback": lambda run, patch: patch.setattr(run.callbacks[0], "fails", True),
    "stage": lambda run, patch: patch.setattr(run.curriculum, "enter_again", failing),
    "model": lambda run, patch: patch.setattr(module, "_load_model", failing),
    "optimizer": lambda run, patch: patch.setattr(run.optimizers[1], "load_state_dict", failing),
    "average": lambda run, patch: patch.setattr(run.ema, "load_state_dict", failing),
    "schedule": lambda run, patch: patch.setattr(
        torch.optim.lr_scheduler.CosineAnnealingLR, "load_state_dict", failing
    ),
    "guard": lambda run, patch: patch.setattr(run.guard, "load_state_dict", failing),
    "places": lambda run, patch: patch.setattr(run.curriculum.sources, "load_places", failing),
    "place": lambda run, patch: patch.setattr(EpochBatches, "load_state_dict", failing),
    "objective": lambda run, patch: patch.setattr(run.objective, "load_state_dict", failing),
    "extra": lambda run, patch: patch.setattr(run.extra, "load_state_dict", failing),
    "meter": lambda run, patch: patch.setattr(run.meter, "load_state_dict", failing),
    "data": lambda run, patch: patch.setattr(run.curriculum.sources, "load_fingerprints", failing),
    "generators": lambda run, patch: patch.setattr(module, "set_generators", failing),
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("part", FAILURES)
def test_a_part_that_does_not_fit_changes_nothing(later, monkeypatch, part, trained):
    run = made()
    state = Checkpoints(later).load().state
    with fork_rng(run.world.device):
        if trained:
            run.config = TrainerConfig(steps=2, ema=0.9)
            run.fit()
        before = everything(run)
        FAILURES[part](run, monkeypatch)
        with pytest.raises(ValueError, match="does not fit"):
            restore(run, state)
        monkeypatch.undo()
        assert changed(before, everything(run)) == []


@pytest.mark.parametrize("part", ["stage", "model", "optimizer", "average"])
def test_weights_that_do_not_fit_change_nothing(later, monkeypatch, part):
    run = made()
    with fork_rng(run.world.device):
        before = everything(run)
        FAILURES[part](run, monkeypatch)
        with pytest.raises(ValueError, match="fit"):
            load_run(run, later)
        monkeypatch.undo()
        assert changed(before, everything(run)) == []


def test_what_fits_changes_every_part(later):
    run = made()
    with fork_rng(run.world.device):
        before = everything(run)
        restore(run, Checkpoints(later).load().state)
        names = changed(before, everything(run))
    assert {"p", "options", "seen", "carry", "tree", "model.0.weight"} <= {*names}


def test_a_run_that_could_not_be_resumed_can_be_trained_as_it_was(later, monkeypatch):
    whole, run = made(), made()
    run.out, run.files = later, type(run.files)(later, run.world, ("run.json",), 2)
    FAILURES["meter"](run, monkeypatch)
    with pytest.raises(ValueError, match="fit"):
        run.fit(resume=True)
    monkeypatch.undo()
    run.out, run.files = None, type(run.files)(None, run.world, (), 2)
    for each in (whole, run):
        each.fit()
    with fork_rng(run.world.device):
        assert changed(everything(whole), everything(run)) == []
