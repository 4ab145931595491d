"""State of other GrokFast packages: grokfast-pytorch and ironjr/grokfast.

The truth is the run that was never interrupted.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Linear, Parameter

from trm_fast.optim import (
    GrokFastAdamW,
    from_lucidrains,
    load_official_ema,
)

from .interop_checks import assert_close
from .torch_checks import (
    assert_same,
    assert_within,
    make_grads,
    randn,
    set_grads,
    train,
)

# grokfast-pytorch


INIT_LR = 2e-3 / 3


def lucidrains_dict(params: Sequence[Tensor], **group: Any) -> dict[str, Any]:
    """The layout of `grokfast_pytorch.GrokFastAdamW.state_dict()`."""
    state = {
        i: {
            "steps": 10 + i,
            "exp_avg": randn(*p.shape, seed=20 + i),
            "exp_avg_sq": randn(*p.shape, seed=30 + i).square(),
            "grok_exp_avg": randn(*p.shape, seed=40 + i),
        }
        for i, p in enumerate(params)
    }
    options = {
        "lr": INIT_LR / 2, "betas": (0.9, 0.98), "eps": 1e-9, "weight_decay": 0.01,
        "grokfast": True, "grokfast_alpha": 0.95, "grokfast_lamb": 2.0, "grokfast_after_step": 0,
    }  # fmt: skip
    return {"state": state, "param_groups": [options | group | {"params": [*range(len(params))]}]}


def pair() -> list[Parameter]:
    return [Parameter(randn(4, 3)), Parameter(randn(2, seed=1))]


def test_lucidrains_states_are_taken_as_they_are() -> None:
    params = pair()
    source = lucidrains_dict(params)
    optimizer = GrokFastAdamW(params)
    optimizer.load_state_dict(from_lucidrains(source, INIT_LR))
    names = ("exp_avg", "exp_avg_sq", "grok_exp_avg")
    for i, param in enumerate(params):
        expected = {name: source["state"][i][name] for name in names}
        assert_same({name: optimizer.state[param][name] for name in names}, expected)


def test_lucidrains_step_counts_become_tensors() -> None:
    params = pair()
    optimizer = GrokFastAdamW(params)
    optimizer.load_state_dict(from_lucidrains(lucidrains_dict(params), INIT_LR))
    steps = [optimizer.state[param]["step"] for param in params]
    assert_same(steps, [torch.tensor(10.0), torch.tensor(11.0)])


def test_lucidrains_options_keep_their_meaning() -> None:
    params = pair()
    optimizer = GrokFastAdamW(params, filter="highpass", normalize_lr=True)
    optimizer.load_state_dict(from_lucidrains(lucidrains_dict(params), INIT_LR))
    expected = {
        "lr": INIT_LR / 2, "betas": (0.9, 0.98), "eps": 1e-9, "weight_decay": 0.01 / INIT_LR,
        "alpha": 0.95, "lamb": 2.0, "after_step": 0, "filter": "ema", "normalize_lr": False,
        "decoupled_weight_decay": True,
    }  # fmt: skip
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected


@pytest.mark.parametrize("on", [True, False])
def test_lucidrains_run_continues_by_its_formula(on: bool) -> None:
    """One step, written out; their clamp at eps and our sum differ by eps / vhat, here below 1e-8,
    and the rest by at most 16 roundings of 2**-24 of values below 4."""
    params = pair()
    source = lucidrains_dict(params, grokfast=on)
    for state in source["state"].values():
        state["exp_avg_sq"] += 0.1
    grads = make_grads(params, 1)[0]
    expected = []
    for p, g, s in zip(params, grads, source["state"].values(), strict=True):
        p, g, t = p.detach().double(), g.double(), s["steps"] + 1
        mean = 0.95 * s["grok_exp_avg"].double() + 0.05 * g
        ghat = g + 2.0 * mean if on else g
        m = 0.9 * s["exp_avg"].double() + 0.1 * ghat
        v = 0.98 * s["exp_avg_sq"].double() + 0.02 * ghat**2
        p = p * (1 - (INIT_LR / 2) / INIT_LR * 0.01)
        vhat = (v / (1 - 0.98**t)).sqrt().clamp(min=1e-9)
        expected.append(p - (INIT_LR / 2) * m / (1 - 0.9**t) / vhat)
    optimizer = GrokFastAdamW(params)
    optimizer.load_state_dict(from_lucidrains(source, INIT_LR))
    train(optimizer, [grads])
    for ours, truth in zip(params, expected, strict=True):
        assert_within(ours, truth, 1e-8 + 16 * 4 * 2**-24, "param")


def test_lucidrains_dict_may_lack_parameters_without_state() -> None:
    params = pair()
    source = lucidrains_dict(params)
    del source["state"][0]
    optimizer = GrokFastAdamW(params)
    optimizer.load_state_dict(from_lucidrains(source, INIT_LR))
    assert [optimizer.state[param]["step"].item() for param in params] == [0, 11]


def test_lucidrains_dict_is_not_written() -> None:
    source = lucidrains_dict(pair())
    before = deepcopy(source)
    from_lucidrains(source, INIT_LR)
    assert_same(source, before)


def test_lucidrains_dict_is_refused_without_conversion() -> None:
    params = pair()
    with pytest.raises(ValueError, match=r"from_lucidrains\(state_dict, init_lr=\.\.\.\)"):
        GrokFastAdamW(params).load_state_dict(lucidrains_dict(params))


def test_refused_lucidrains_dict_changes_nothing() -> None:
    params = pair()
    optimizer = GrokFastAdamW(params)
    before = deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError):
        optimizer.load_state_dict(lucidrains_dict(params))
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("init_lr", [0.0, -1e-3, float("nan")])
def test_init_lr_must_be_positive(init_lr: float) -> None:
    with pytest.raises(ValueError, match="init_lr must be finite and > 0"):
        from_lucidrains(lucidrains_dict(pair()), init_lr)


def test_dict_of_another_optimizer_is_not_converted() -> None:
    with pytest.raises(ValueError, match="every group must hold grokfast, grokfast_alpha"):
        from_lucidrains(torch.optim.AdamW(pair()).state_dict(), INIT_LR)


def test_dict_without_step_counts_is_not_converted() -> None:
    source = lucidrains_dict(pair())
    del source["state"][1]["steps"]
    with pytest.raises(ValueError, match="steps"):
        from_lucidrains(source, INIT_LR)


# ironjr/grokfast


def model_64() -> torch.nn.Module:
    model = torch.nn.Sequential(Linear(4, 3), Linear(3, 2)).double()
    with torch.no_grad():
        for seed, param in enumerate(model.parameters()):
            param.copy_(randn(*param.shape, seed=seed, dtype=torch.float64))
    return model


def official_steps(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    means: dict[str, Tensor] | None,
    rows: list[list[Tensor]],
) -> dict[str, Tensor]:
    """The official filter, alpha 0.98 and lamb 2, in front of an optimizer of torch."""
    for row in rows:
        set_grads([*model.parameters()], row)
        if means is None:
            means = {name: p.grad.clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            means[name] = means[name] * 0.98 + p.grad * 0.02
            p.grad = p.grad + means[name] * 2.0
        optimizer.step()
    assert means is not None
    return means


def test_official_run_continues() -> None:
    model = model_64()
    theirs = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)
    rows = make_grads([*model.parameters()], 40)
    means = official_steps(model, theirs, None, rows[:20])
    other = deepcopy(model)
    ours = GrokFastAdamW(other.parameters(), alpha=0.98, lamb=2.0)
    ours.load_state_dict(theirs.state_dict())
    load_official_ema(ours, means, other.named_parameters())
    official_steps(model, theirs, means, rows[20:])
    train(ours, rows[20:])
    assert_close([*other.parameters()], [*model.parameters()])


def test_official_means_are_copied() -> None:
    model = model_64()
    ours = GrokFastAdamW(model.parameters())
    means = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    load_official_ema(ours, means, model.named_parameters())
    train(ours, make_grads([*model.parameters()], 1))
    assert all((mean == 1).all() for mean in means.values())


def test_official_means_do_not_carry_a_graph() -> None:
    model = model_64()
    ours = GrokFastAdamW(model.parameters())
    mean = torch.ones(2, dtype=torch.float64, requires_grad=True)
    load_official_ema(ours, {"1.bias": mean}, model.named_parameters())
    assert not ours.state[model[1].bias]["grok_exp_avg"].requires_grad


def test_parameter_without_official_mean_starts_at_its_next_gradient() -> None:
    model = model_64()
    ours = GrokFastAdamW(model.parameters())
    means = {"1.bias": torch.ones(2, dtype=torch.float64)}
    load_official_ema(ours, means, model.named_parameters())
    rows = make_grads([*model.parameters()], 1)
    train(ours, rows)
    assert_same(ours.state[model[0].weight]["grok_exp_avg"], rows[0][0])


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"2.bias": torch.ones(2)}, KeyError, "'2.bias' is no parameter"),
        ({"1.bias": torch.ones(3)}, ValueError, r"'1.bias' must be of shape \(2,\); got \(3,\)"),
    ],
    ids=["name", "shape"],
)
def test_wrong_official_mean_is_refused(
    bad: dict[str, Tensor], error: type[Exception], text: str
) -> None:
    model = model_64()
    ours = GrokFastAdamW(model.parameters())
    with pytest.raises(error, match=text):
        load_official_ema(ours, bad, model.named_parameters())


@pytest.mark.parametrize("options", [{"lamb": 0.0}, {"filter": None}], ids=str)
def test_official_mean_needs_a_filter(options: dict[str, Any]) -> None:
    model = model_64()
    ours = GrokFastAdamW(model.parameters(), **options)
    with pytest.raises(ValueError, match=r"'1\.bias' must be in a group with a filter"):
        load_official_ema(ours, {"1.bias": torch.ones(2)}, model.named_parameters())


@pytest.mark.parametrize("bad", ["2.bias", "1.bias"], ids=["name", "shape"])
def test_wrong_official_mean_changes_nothing(bad: str) -> None:
    """Not even what belongs to the right means before it."""
    model = model_64()
    ours = GrokFastAdamW(model.parameters())
    before = deepcopy(ours.state_dict())
    means = {"0.bias": torch.ones(3, dtype=torch.float64), bad: torch.ones(3, dtype=torch.float64)}
    with pytest.raises((KeyError, ValueError)):
        load_official_ema(ours, means, model.named_parameters())
    assert_same(ours.state_dict(), before)
