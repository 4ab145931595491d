"""MuGrokfast: Muon and GrokFastAdamW, each on its groups, behind one filter."""

import io
import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR

from trm_fast import BackendError, GrokFastAdamW, MuGrokfast, Muon, QKClip
from trm_fast.optim import PRESETS, split_params
from trm_fast.optim.qk_clip import QKRows

from .muon_checks import EXACT, assert_near, formula, matrix
from .torch_checks import (
    assert_same,
    clone_params,
    make_grads,
    snapshot,
    train,
    without_grads,
)


class Block(nn.Module):
    """A small network with every kind of parameter that is told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.qkv = nn.Linear(8, 24, bias=False)
        self.up = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.down = nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + torch.softmax(q @ k.mT, -1) @ v
        return self.head(x + self.down(self.norm(torch.relu(self.up(x)))))


def block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block()


def groups_of(model: Block) -> list[dict[str, Any]]:
    return split_params(model, heads=[model.head])


def backward(model: Block, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (4, 6), generator=generator)
    targets = torch.randint(5, (4, 6), generator=generator)
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
    return loss


def run(model: Block, *optimizers: Any, seeds: range = range(4)) -> None:
    for seed in seeds:
        model.zero_grad()
        backward(model, seed)
        for optimizer in optimizers:
            optimizer.step()


FILTERS: dict[str, dict[str, Any]] = {
    "default": {"lamb": 0.3},
    "none": {"filter": None},
    "highpass": {"filter": "highpass", "lamb": 2.0},
    "ma": {"filter": "ma", "window": 2, "lamb": 5.0},
    "projection": {"filter": "projection", "lamb": 2.0},
    "cosine_gate": {"filter": "cosine_gate", "lamb": 2.0},
    "late": {"after_step": 2, "lamb": 2.0},
    "maximize": {"maximize": True, "lamb": 2.0},
    "averaged": {"weight_ema": 0.9, "lamb": 2.0},
    "states in 16 bits": {"state_dtype": torch.bfloat16, "lamb": 2.0, "weight_ema": 0.9},
}


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_each_group_steps_like_the_optimizer_of_its_algorithm(
    options: dict[str, Any], backend: str | None
) -> None:
    """Bit for bit, weights and states."""
    ours, twin = block(), block()
    optimizer = MuGrokfast(
        groups_of(ours), muon_lr=0.02, lr=0.003, weight_decay=0.1, adamw_eps=1e-7,
        betas=(0.8, 0.98), backend=backend, **options,
    )  # fmt: skip
    hidden, rest = groups_of(twin)
    shared = {"weight_decay": 0.1, "backend": backend, "filter": "ema", **options}
    others = [
        Muon(hidden["params"], lr=0.02, **shared),
        GrokFastAdamW(rest["params"], lr=0.003, betas=(0.8, 0.98), eps=1e-7, **shared),
    ]
    run(ours, optimizer)
    run(twin, *others)
    assert_same(snapshot(optimizer), snapshot(others[0]) + snapshot(others[1]))


def test_hidden_matrices_follow_the_formula_in_float64() -> None:
    params = [matrix(6, 4, dtype=torch.float64), matrix(4, dtype=torch.float64)]
    (start, _) = clone_params(params)
    optimizer = MuGrokfast(
        [{"params": [p], "algorithm": a} for p, a in zip(params, ("muon", "adamw"), strict=True)],
        muon_lr=0.05,
        **EXACT,
    )
    rows = make_grads(params, 32)
    train(optimizer, rows)
    truth = formula(
        start, [r[0] for r in rows], lr=0.05, weight_decay=0.0, filter="ema", alpha=0.98, lamb=0.3
    )
    assert_near(params[0], truth["param"])
    assert_near(optimizer.state[params[0]]["momentum_buffer"], truth["momentum_buffer"])


def test_the_defaults_are_the_first_preset_and_others_can_be_had() -> None:
    params = groups_of(block())
    group = MuGrokfast(params).param_groups[0]
    assert {name: group[name] for name in ("lr", "lamb", "alpha", "momentum", "nesterov")} == {
        "lr": 1e-3, "lamb": 0.3, "alpha": 0.98, "momentum": 0.95, "nesterov": True,
    }  # fmt: skip
    assert (group["ns_steps"], group["weight_decay"], group["filter"]) == (5, 0.0, "ema")
    for preset in PRESETS.values():
        muon, adamw = MuGrokfast(groups_of(block()), **preset.options()).param_groups
        assert (muon["lr"], adamw["lr"]) == (preset.muon_lr, preset.lr)
        assert muon["lamb"] == adamw["lamb"] == preset.lamb


def test_presets_are_the_published_numbers() -> None:
    expected = {
        1: (1e-3, 1e-3, 0.3, 30.0, 0.0, False),
        3: (5e-4, 5e-4, 0.1, 25.0, 0.1, False),
        5: (1e-3, 1e-3, 2.0, 30.0, 0.0, True),
        6: (1e-4, 1e-4, 0.2, 30.0, 0.0, False),
        7: (5e-4, 5e-4, 0.15, 28.0, 0.05, False),
    }
    assert {phase: tuple(preset) for phase, preset in PRESETS.items()} == expected


# Groups


@pytest.mark.parametrize("algorithm", [None, "sgd", "Muon", 1])
def test_a_group_must_say_its_algorithm(algorithm: Any) -> None:
    group = {"params": [matrix(4, 4)]} | ({} if algorithm is None else {"algorithm": algorithm})
    with pytest.raises(ValueError, match=r"MuGrokfast: each group .*; got .*split_params"):
        MuGrokfast([group])
    optimizer = MuGrokfast([{"params": [matrix(4, 4)], "algorithm": "muon"}])
    with pytest.raises(ValueError, match=r"MuGrokfast: each group .*; got .*split_params"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("params", [[matrix(4, 4)], [("w", matrix(4, 4))]], ids=["bare", "named"])
def test_parameters_without_groups_are_refused(params: list[Any]) -> None:
    with pytest.raises(ValueError, match="each group must say its algorithm"):
        MuGrokfast(params)


def test_vectors_are_for_adamw_only() -> None:
    with pytest.raises(ValueError, match="MuGrokfast: a parameter must have at least 2 dimensions"):
        MuGrokfast([{"params": [matrix(4)], "algorithm": "muon"}])
    MuGrokfast([{"params": [matrix(4), matrix(3, 3)], "algorithm": "adamw"}])
    complex_ok = Parameter(torch.ones(3, 3, dtype=torch.complex64))
    MuGrokfast([{"params": [complex_ok], "algorithm": "adamw"}])
    with pytest.raises(TypeError, match="real and floating; got torch"):
        MuGrokfast([{"params": [complex_ok], "algorithm": "muon"}])


def test_learning_rates_by_algorithm_and_by_group() -> None:
    params = [matrix(4, 4, seed=i) for i in range(4)]
    optimizer = MuGrokfast(
        [
            {"params": params[:1], "algorithm": "muon"},
            {"params": params[1:2], "algorithm": "adamw"},
            {"params": params[2:3], "algorithm": "muon", "lr": 0.5},
        ],
        lr=0.01,
        muon_lr=0.02,
    )
    optimizer.add_param_group({"params": params[3:], "algorithm": "adamw", "betas": (0.5, 0.5)})
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01, 0.5, 0.01]
    assert [group["betas"] for group in optimizer.param_groups][2:] == [(0.9, 0.95), (0.5, 0.5)]
    alone = clone_params(params)
    rows = make_grads(params, 3)
    train(optimizer, rows)
    options = {"lamb": 0.3, "weight_decay": 0.0}
    singles = [
        Muon(alone[:1], lr=0.02, filter="ema", **options),
        GrokFastAdamW(alone[1:2], lr=0.01, betas=(0.9, 0.95), **options),
        Muon(alone[2:3], lr=0.5, filter="ema", **options),
        GrokFastAdamW(alone[3:], lr=0.01, betas=(0.5, 0.5), **options),
    ]
    for index, single in enumerate(singles):
        train(single, [row[index : index + 1] for row in rows])
    assert_same([p.detach() for p in params], [p.detach() for p in alone])


def test_schedulers_scale_both_learning_rates() -> None:
    model = block()
    optimizer = MuGrokfast(groups_of(model), muon_lr=0.02, lr=0.003)
    run(model, optimizer)
    halved = ExponentialLR(optimizer, 0.5)
    optimizer.step()
    halved.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.0015]
    apart = LambdaLR(optimizer, [lambda t: 1.0, lambda t: 0.5**t])
    optimizer.step()
    apart.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.0015]
    cycle = OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=9)
    optimizer.step()
    cycle.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[0] == pytest.approx(10 * rates[1])


def test_tensor_learning_rates() -> None:
    """Powers of two, which float32 holds."""
    ours, twin = block(), block()
    run(ours, MuGrokfast(groups_of(ours), muon_lr=torch.tensor(2.0**-5), lr=torch.tensor(2.0**-8)))
    run(twin, MuGrokfast(groups_of(twin), muon_lr=2.0**-5, lr=2.0**-8))
    for mine, theirs in zip(ours.parameters(), twin.parameters(), strict=True):
        assert_near(mine, theirs, "", 2**-22)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"muon_lr": -1.0}, "lr must be"),
    ({"lr": -1.0}, "lr must be"),
    ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in"),
    ({"betas": 0.9}, "betas must be two"),
    ({"adamw_eps": -1.0}, "eps must be"),
    ({"momentum": 1.0}, "momentum must be"),
    ({"ns_steps": 0}, "steps must be"),
    ({"row_splits": 5}, "row_splits=5"),
    ({"filter": "low"}, "filter must be"),
    ({"lamb": -1.0}, "lamb must be"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(o) for o, _ in BAD])
def test_bad_options_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuGrokfast(groups_of(block()), **options)


@pytest.mark.parametrize("position", [0, 1])
def test_bad_option_of_one_group_keeps_the_other_from_its_step(position: int) -> None:
    model = block()
    optimizer = MuGrokfast(groups_of(model)[:: 1 if position else -1])
    run(model, optimizer, seeds=range(2))
    backward(model, 7)
    before = snapshot(optimizer)
    optimizer.param_groups[1]["row_splits" if position == 0 else "adamw_eps"] = -1
    with pytest.raises(ValueError, match=r"row_splits|eps"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_unknown_options_are_no_arguments() -> None:
    for name in ("eps_adamw", "muon_momentum", "differentiable"):
        with pytest.raises(TypeError, match=name):
            MuGrokfast(groups_of(block()), **{name: 0.5})


def test_named_backend_binds_both_algorithms() -> None:
    model = block()
    optimizer = MuGrokfast(groups_of(model), backend="cpp", ns_dtype=torch.float32)
    backward(model, 0)
    before = snapshot(optimizer)
    with pytest.raises(BackendError, match="named backend 'cpp' cannot run"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


# Clipping, overflow, missing gradients


def test_clipping_takes_the_norm_over_both_kinds_of_group() -> None:
    ours, twin = block(), block()
    options: dict[str, Any] = {"muon_lr": 0.02, "lr": 0.003, **EXACT}
    ours.double()
    twin.double()
    clipping = MuGrokfast(groups_of(ours), clip_norm=0.05, **options)
    plain = MuGrokfast(groups_of(twin), **options)
    for seed in range(6):
        for model, optimizer in ((ours, clipping), (twin, plain)):
            optimizer.zero_grad()
            backward(model, seed)
            if optimizer is plain:
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                assert norm > 0.05
            optimizer.step()
        assert_near(clipping.grad_norm, norm.float(), "norm", 1e-5)
    for mine, theirs in zip(ours.parameters(), twin.parameters(), strict=True):
        # The factor is rounded to float32 in each step, and small singular values lift that.
        assert_near(mine, theirs, "param", 485 * 6 * 2**-24)


def test_overflow_in_one_group_stops_both() -> None:
    for position in range(2):
        model = block()
        optimizer = MuGrokfast(groups_of(model), weight_ema=0.9, muon_lr=0.02)
        run(model, optimizer, seeds=range(2))
        before = without_grads(snapshot(optimizer))
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(model(torch.zeros(1, 3, dtype=torch.long)).sum()).backward()
        optimizer.param_groups[position]["params"][0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert_same(without_grads(snapshot(optimizer)), before)


def test_groups_without_gradients_are_left_alone() -> None:
    for position in range(2):
        model, twin = block(), block()
        optimizer, other = MuGrokfast(groups_of(model)), MuGrokfast(groups_of(twin))
        idle = optimizer.param_groups[position]["params"]
        before = [row for row in without_grads(snapshot(optimizer))]
        for seed in range(2):
            for net in (model, twin):
                net.zero_grad()
                backward(net, seed)
            for param in idle:
                param.grad = None
            for param in other.param_groups[position]["params"]:
                param.grad = None
            optimizer.step()
            other.step()
        after = without_grads(snapshot(optimizer))
        for param, old, new in zip(
            (p for g in optimizer.param_groups for p in g["params"]), before, after, strict=True
        ):
            if any(param is one for one in idle):
                assert_same(new, old)
            else:
                assert not torch.equal(new["param"], old["param"])
        assert_same(after, without_grads(snapshot(other)))


# Saving and loading


@pytest.mark.parametrize("how", ["file", "pickle", "deepcopy"])
def test_resumed_training_equals_uninterrupted(how: str) -> None:
    options: dict[str, Any] = {"muon_lr": 0.02, "weight_ema": 0.9, "clip_norm": 1.0}
    model = block()
    optimizer = MuGrokfast(groups_of(model), **options)
    run(model, optimizer, seeds=range(3))
    if how == "file":
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        copy = block(seed=9)
        copy.load_state_dict(saved["model"])
        resumed = MuGrokfast(groups_of(copy), clip_norm=1.0)
        resumed.load_state_dict(saved["optimizer"])
    elif how == "pickle":
        copy, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        copy, resumed = deepcopy((model, optimizer))
    for net, its in ((model, optimizer), (copy, resumed)):
        run(net, its, seeds=range(3, 6))
    assert_same(without_grads(snapshot(resumed)), without_grads(snapshot(optimizer)))
    resumed.add_param_group({"params": [("w", matrix(4, 4))], "algorithm": "muon"})
    assert resumed.param_groups[-1]["lr"] == (1e-3 if how == "file" else 0.02)


def test_bfloat16_model_keeps_float32_states_through_a_file() -> None:
    model = block().bfloat16()
    optimizer = MuGrokfast(groups_of(model))
    run(model, optimizer, seeds=range(2))
    resumed = MuGrokfast(groups_of(model))
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    assert_same(snapshot(resumed), snapshot(optimizer))
    for state in resumed.state.values():
        assert {value.dtype for value in state.values()} == {torch.float32}


def test_state_dict_with_other_algorithms_is_refused_with_nothing_loaded() -> None:
    model = block()
    optimizer = MuGrokfast(groups_of(model))
    run(model, optimizer, seeds=range(2))
    before = snapshot(optimizer)
    swapped, foreign = deepcopy(optimizer.state_dict()), deepcopy(optimizer.state_dict())
    for group, name in zip(swapped["param_groups"], ("adamw", "muon"), strict=True):
        group["algorithm"] = name
    for group in foreign["param_groups"]:
        del group["algorithm"]
    for state_dict, came in ((swapped, "'adamw'"), (foreign, "None")):
        with pytest.raises(ValueError, match=f"algorithm of group 0 must be 'muon'.*got {came}"):
            optimizer.load_state_dict(state_dict)
        assert_same(snapshot(optimizer), before)


# Training


@pytest.mark.parametrize("options", [{}, {"filter": None}, {"lamb": 2.0}], ids=str)
def test_loss_falls(options: dict[str, Any]) -> None:
    model = block()
    optimizer = MuGrokfast(groups_of(model), muon_lr=0.02, lr=0.003, **options)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(backward(model, 0).item())
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_qk_clip_follows_the_step() -> None:
    """Weights of a head whose logits reach four times the threshold shrink by a half, after the
    step has moved them; nothing else changes."""
    model, plain = block(), block()
    optimizer, other = (MuGrokfast(groups_of(net), muon_lr=0.02) for net in (model, plain))
    clip = QKClip(threshold=1.0)
    report = clip.watch(QKRows(model.qkv, 0, 8), QKRows(model.qkv, 8, 8), heads=2)
    clip.attach(optimizer)
    for net, its in ((model, optimizer), (plain, other)):
        backward(net, 0)
        report(torch.tensor([4.0, 0.5]))
        its.step()
    shrink = torch.tensor([0.5, 1.0, 0.5, 1.0, 1.0, 1.0]).repeat_interleave(4)[:, None]
    assert torch.equal(model.qkv.weight, plain.qkv.weight * shrink)
    assert_same(snapshot(optimizer)[1:], snapshot(other)[1:])
    momenta = [o.state[net.qkv.weight] for o, net in ((optimizer, model), (other, plain))]
    assert_same(dict(momenta[0]), dict(momenta[1]))
