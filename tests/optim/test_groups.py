"""Parameter groups by component and by algorithm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trm_fast import GrokFastAdamW
from trm_fast.optim.groups import component_groups, describe, split_params


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.positions = nn.Parameter(torch.zeros(6, 4))
        self.core = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm((2, 4))])
        self.memory = nn.Linear(4, 4, bias=False)
        self.halt = nn.Linear(4, 1)


def names(groups: list[dict[str, Any]], key: str) -> dict[str, list[str]]:
    return {group[key]: [name for name, _ in group["params"]] for group in groups}


CORE = ["core.0.weight", "core.0.bias", "core.1.weight", "core.1.bias"]
HALT = ["halt.weight", "halt.bias"]


# component_groups


def test_components_take_their_parameters_and_other_the_rest() -> None:
    model = Model()
    groups = component_groups(model, {"core": model.core, "halting": [model.halt]})
    assert names(groups, "component") == {
        "core": CORE,
        "halting": HALT,
        "other": ["positions", "embed.weight", "memory.weight"],
    }
    params = dict(model.named_parameters())
    assert all(param is params[name] for group in groups for name, param in group["params"])


def test_options_go_to_their_group() -> None:
    model = Model()
    options = {"core": {"lr": 3e-4, "lamb": 2.0}, "halting": {"filter": None}, "other": {"lr": 1.0}}
    groups = component_groups(model, {"core": model.core, "halting": model.halt}, options)
    found = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    assert found == [
        {"component": "core", "lr": 3e-4, "lamb": 2.0},
        {"component": "halting", "filter": None},
        {"component": "other", "lr": 1.0},
    ]


def test_groups_train_and_survive_a_checkpoint() -> None:
    model = Model()
    groups = component_groups(model, {"core": model.core}, {"core": {"lamb": 0.5}})
    optimizer = GrokFastAdamW(groups, lr=0.1)
    before = [param.detach().clone() for param in model.parameters()]
    model.halt(model.memory(model.core[0](model.embed(torch.arange(4))))).sum().backward()
    optimizer.step()
    moved = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
    assert moved == [param.grad is not None for param in model.parameters()]
    assert optimizer.param_groups[0]["param_names"] == CORE
    optimizer.load_state_dict(optimizer.state_dict())
    assert [group["component"] for group in optimizer.param_groups] == ["core", "other"]


def test_components_may_be_single_parameters_and_generators() -> None:
    model = Model()
    components = {"positions": model.positions, "core": (layer for layer in model.core)}
    groups = component_groups(model, components)
    assert names(groups, "component") == {
        "positions": ["positions"],
        "core": CORE,
        "other": ["embed.weight", "memory.weight", *HALT],
    }


def test_slices_of_module_lists_are_modules_of_the_model() -> None:
    model = Model()
    groups = component_groups(model, {"first": model.core[:1], "second": model.core[1:]})
    assert names(groups, "component") == {
        "first": CORE[:2],
        "second": CORE[2:],
        "other": ["positions", "embed.weight", "memory.weight", *HALT],
    }


def test_module_and_its_part_in_one_component_count_once() -> None:
    model = Model()
    groups = component_groups(model, {"core": [model.core, model.core[0]]})
    assert names(groups, "component")["core"] == CORE


def test_no_group_other_without_a_rest() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    groups = component_groups(model, {"all": model}, {"other": {"lr": 1.0}})
    assert names(groups, "component") == {"all": ["0.weight", "0.bias"]}


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.core[0].weight.requires_grad_(False)
    model.embed.requires_grad_(False)
    groups = component_groups(model, {"core": model.core})
    assert names(groups, "component") == {
        "core": CORE[1:],
        "other": ["positions", "memory.weight", *HALT],
    }


def test_shared_parameter_counts_once() -> None:
    model = Model()
    model.core.append(nn.Linear(4, 4, bias=False))
    model.core[2].weight = model.core[0].weight
    groups = component_groups(model, {"core": model.core})
    assert names(groups, "component")["core"] == CORE


def test_parameter_of_two_components_is_refused() -> None:
    model = Model()
    model.memory.weight = model.core[0].weight
    with pytest.raises(ValueError, match=r"got 'core\.0\.weight' in 'a' and 'b'"):
        component_groups(model, {"a": model.core, "b": model.memory})


@pytest.mark.parametrize(
    ("components", "options", "text"),
    [
        (lambda m: {"x": nn.Linear(2, 2)}, {}, "component_groups: 'x' must hold .*; got a Linear"),
        (lambda m: {"x": [m.core, None]}, {}, "'x' must hold .*; got a NoneType that is not"),
        (lambda m: {"x": torch.ones(2, 3)}, {}, r"'x' must hold .*Tensor of shape \(2, 3\)"),
        (lambda m: {"x": []}, {}, r"must have parameters to train; got none in \['x'\]"),
        (lambda m: {"x": m.core[1:1]}, {}, r"must have parameters to train; got none in \['x'\]"),
        (lambda m: {"other": m.core}, {}, "'other' is the rest"),
        (lambda m: {"x": m.core}, {"y": {}}, r"one of \['x', 'other'\]; got \['y'\]"),
        (lambda m: {"x": m.core}, {"x": {"params": []}}, r"options of 'x' .*; got \['params'\]"),
    ],
)
def test_wrong_components_are_refused(
    components: Callable[[Model], Any], options: dict[str, Any], text: str
) -> None:
    model = Model()
    with pytest.raises(ValueError, match=text):
        component_groups(model, components(model), options)


def test_component_with_nothing_but_frozen_parameters_is_refused() -> None:
    model = Model()
    model.core.requires_grad_(False)
    with pytest.raises(ValueError, match=r"got none in \['core'\]"):
        component_groups(model, {"core": model.core})


# split_params


def test_matrices_of_linear_layers_go_to_muon_and_the_rest_to_adamw() -> None:
    model = Model()
    groups = split_params(model, heads=[model.halt])
    assert names(groups, "algorithm") == {
        "muon": ["core.0.weight", "memory.weight"],
        "adamw": ["positions", "embed.weight", *CORE[1:], *HALT],
    }
    params = dict(model.named_parameters())
    assert all(param is params[name] for group in groups for name, param in group["params"])


def test_heads_have_to_be_named() -> None:
    with pytest.raises(TypeError, match="heads"):
        split_params(Model())
    assert "halt.weight" in names(split_params(Model(), heads=()), "algorithm")["muon"]


def test_head_that_is_tied_to_an_embedding_needs_no_name() -> None:
    model = Model()
    model.lm_head = nn.Linear(4, 11, bias=False)
    model.lm_head.weight = model.embed.weight
    muon = names(split_params(model, heads=model.halt), "algorithm")["muon"]
    assert muon == ["core.0.weight", "memory.weight"]


@pytest.mark.parametrize("embedding_first", [True, False])
def test_matrix_tied_to_an_embedding_is_none_in_either_order(embedding_first: bool) -> None:
    layers = [nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)]
    layers[1].weight = layers[0].weight
    model = nn.Sequential(*(layers if embedding_first else layers[::-1]), nn.Linear(4, 4))
    groups = split_params(model, heads=())
    assert names(groups, "algorithm") == {"muon": ["2.weight"], "adamw": ["0.weight", "2.bias"]}


class LowRank(nn.Linear):
    """A linear layer with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.extra = nn.Parameter(torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("layer", "muon"),
    [
        (nn.Conv1d(4, 4, 3), ["1.weight"]),
        (nn.Conv2d(4, 4, 3), ["1.weight"]),
        (nn.ConvTranspose2d(4, 4, 3), ["1.weight"]),
        (nn.Conv2d(4, 4, 3, groups=4), []),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["1.in_proj_weight", "1.out_proj.weight"]),
        (
            nn.MultiheadAttention(4, 2, kdim=3),
            ["1.q_proj_weight", "1.k_proj_weight", "1.v_proj_weight", "1.out_proj.weight"],
        ),
        (nn.Embedding(5, 4), []),
        (nn.EmbeddingBag(5, 4), []),
        (nn.LayerNorm((3, 4)), []),
        (nn.BatchNorm1d(4), []),
        (nn.GRU(4, 4), []),
        (nn.PReLU(4), []),
        (LowRank(), ["1.weight"]),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_type_of_a_module_decides(layer: nn.Module, muon: list[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), layer)
    found = names(split_params(model, heads=()), "algorithm")
    assert found["muon"] == ["0.weight", *muon]
    everything = [name for name, _ in model.named_parameters()]
    assert sorted(found["muon"] + found.get("adamw", [])) == sorted(everything)


def test_matrices_and_exclude_overrule_the_type() -> None:
    model = Model()
    groups = split_params(
        model, heads=model.halt, matrices=model.positions, exclude=[model.memory.weight]
    )
    assert names(groups, "algorithm")["muon"] == ["positions", "core.0.weight"]


def test_matrices_of_a_module_are_its_parameters_of_two_dimensions() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2))
    muon = names(split_params(model, heads=(), matrices=[model[1]]), "algorithm")["muon"]
    assert muon == ["0.weight", "1.weight_ih_l0", "1.weight_hh_l0"]


def test_frozen_matrices_are_left_out() -> None:
    model = Model()
    model.memory.requires_grad_(False)
    groups = split_params(model, heads=model.halt)
    assert names(groups, "algorithm")["muon"] == ["core.0.weight"]
    assert "memory.weight" not in names(groups, "algorithm")["adamw"]


def test_group_that_would_be_empty_is_left_out() -> None:
    groups = split_params(nn.Linear(3, 3, bias=False), heads=())
    assert names(groups, "algorithm") == {"muon": ["weight"]}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (lambda m: {"heads": nn.Linear(2, 2)}, "split_params: heads must hold"),
        (lambda m: {"heads": (), "exclude": [None]}, "split_params: exclude must hold"),
        (lambda m: {"heads": (), "matrices": torch.ones(2, 2)}, "split_params: matrices must hold"),
        (lambda m: {"heads": (), "matrices": m.halt.bias}, r"got 'halt.bias' of shape \(1,\)"),
        (lambda m: {"heads": m.halt, "matrices": m.halt.weight}, "in heads.*got 'halt.weight'"),
        (lambda m: {"heads": (), "exclude": m.core, "matrices": m.core}, "got 'core.0.weight'"),
        (lambda m: {"heads": m}, "must have a hidden matrix to train; got 9 other"),
    ],
)
def test_wrong_split_is_refused(options: Callable[[Model], dict[str, Any]], text: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=text):
        split_params(model, **options(model))


# describe

TABLE = """\
group   shape  name
muon    4 x 4  core.0.weight
muon    4 x 4  memory.weight
adamw   6 x 4  positions
adamw  11 x 4  embed.weight
adamw       4  core.0.bias
adamw   2 x 4  core.1.weight
adamw   2 x 4  core.1.bias
adamw   1 x 4  halt.weight
adamw       1  halt.bias
muon: 2 tensors, 32 parameters
adamw: 7 tensors, 93 parameters"""


def test_description_lists_every_parameter() -> None:
    model = Model()
    assert describe(split_params(model, heads=model.halt)) == TABLE


def test_description_of_an_optimizer_is_that_of_its_groups() -> None:
    model = Model()
    groups = component_groups(model, {"core": model.core})
    described = describe(groups)
    assert "core    4 x 4  core.0.weight" in described
    assert describe(GrokFastAdamW(groups).param_groups) == described


def test_description_of_plain_groups_counts_them() -> None:
    def plain(*tensors: Tensor) -> dict[str, Any]:
        return {"params": list(tensors)}

    described = describe([plain(torch.ones(2, 3)), plain(torch.ones(()), torch.ones(1000))])
    assert described.splitlines() == [
        "group   shape  name",
        "0       2 x 3  -",
        "1      scalar  -",
        "1        1000  -",
        "0: 1 tensors, 6 parameters",
        "1: 2 tensors, 1,001 parameters",
    ]
