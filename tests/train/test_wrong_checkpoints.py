"""Checkpoints that are whole and say something else, and those of a model that was compiled."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from trm_fast import GrokFastAdamW
from trm_fast.train import Checkpoints, Trainer, TrainerConfig
from trm_fast.train.checkpoints.loading import load_run
from trm_fast.train.checkpoints.snapshot import restore
from trm_fast.train.generators import fork_rng


def plain(model):
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def inside(model):
    return nn.Sequential(compiled(model[0]), *model[1:])


def trainer(wrap, out, steps=4):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    return Trainer(
        model, GrokFastAdamW(model.parameters()), [torch.randn(8, 4)],
        lambda m, batch: m(batch).square().mean(), 
        TrainerConfig(steps=steps, save_every=2, ema=0.9), out=out,
    )  # fmt: skip


def values(trainer):
    named = [*trainer.model.state_dict().values(), *trainer.ema.average.values()]
    return torch.cat([value.detach().flatten().double() for value in named])


@pytest.mark.parametrize("before", [plain, compiled, inside])
@pytest.mark.parametrize("now", [plain, compiled, inside])
def test_a_run_goes_on_compiled_or_not(tmp_path, before, now):
    whole = trainer(before, None, 6)
    whole.fit()
    trainer(before, tmp_path).fit()
    names = Checkpoints(tmp_path).load().state["model"].keys()
    assert not any("_orig_mod" in name for name in names)
    again = trainer(now, tmp_path, 6)
    again.fit(resume=True)
    assert torch.equal(values(again), values(whole))


def test_checkpoints_with_the_names_of_a_compiled_model_are_read(tmp_path):
    first = trainer(plain, tmp_path)
    first.fit()
    state = Checkpoints(tmp_path).load().state
    state["model"] = {f"_orig_mod.{name}": value for name, value in state["model"].items()}
    Checkpoints(tmp_path).save(5, state)
    again = trainer(plain, None)
    load_run(again, tmp_path)
    assert torch.equal(values(again), values(first))


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    trainer(plain, out).fit()
    return Checkpoints(out).load().state


def places(tree, path=()):
    """The path of each value in nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else ()
    items = enumerate(tree) if isinstance(tree, list) else items
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


WRONG = {
    "missing": None, "text": "x", "nothing": None, "list": [], "dict": {}, "negative": -7,
    "tensor": torch.zeros(2, 5, 1), "tuple": (1, 2), "fraction": 0.5,
}  # fmt: skip


SHORT = ("missing", "text", "tensor")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in SHORT else pytest.mark.long) for k in WRONG]
)
def test_what_is_of_another_kind_is_refused_or_goes_on(tmp_path, state, kind):
    for path in [*places(state)]:
        changed = deepcopy(state)
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        if kind == "missing":
            del inner[path[-1]]
        else:
            inner[path[-1]] = WRONG[kind]
        assert_refused_or_taken(changed, path)


def assert_refused_or_taken(changed, path):
    with fork_rng(torch.device("cpu")):
        again = trainer(plain, None)
        try:
            restore(again, changed)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 500, path
