"""WeightEMA: the formula, weights swapped in and out, and the averages that optimizers keep."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trm_fast.optim import AdamATan2, GrokFastAdamW, GrokFastSGD, WeightEMA

from .filter_checks import two_linear
from .registry import Case, each_averaging
from .torch_checks import assert_same, assert_within, make_grads, randn, set_grads, train

KINDS = {
    "adamw": GrokFastAdamW,
    "sgd": GrokFastSGD,
    "atan2": AdamATan2,
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What tells -0 from 0 and one NaN from another."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {k: v.detach().clone().view(ints[v.element_size()]) for k, v in tensors.items()}


def moved(model: nn.Module, ema: WeightEMA, steps: int, seed: int = 50) -> None:
    """Random weights, averaged once for each step."""
    with torch.no_grad():
        for step in range(steps):
            for index, param in enumerate(model.parameters()):
                param.copy_(randn(*param.shape, seed=seed + 10 * step + index))
            ema.update()


def started(model: nn.Module, decay: float = 0.999) -> WeightEMA:
    """An average that starts at the weights as they are."""
    ema = WeightEMA(model, decay)
    ema.update()
    return ema


# The formula


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_average_follows_its_formula(dtype: torch.dtype, decay: float) -> None:
    model = two_linear().to(dtype)
    ema = started(model, decay)
    truth = {name: param.detach().double().clone() for name, param in model.named_parameters()}
    for step in range(20):
        moved(model, WeightEMA(model, 1.0), 1, seed=10 * step)
        ema.update()
        for name, param in model.named_parameters():
            truth[name] = decay * truth[name] + (1 - decay) * param.detach().double()
    assert ema.average.keys() == truth.keys()
    for name, average in ema.average.items():
        # Three roundings a step, of at most twice the largest weight, which is below 5.
        eps = torch.finfo(average.dtype).eps
        assert_within(average, truth[name], 20 * 3 * eps / 2 * 10, name)
        assert average.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


def test_average_starts_at_the_weights_and_shares_no_memory() -> None:
    model = two_linear()
    ema = started(model)
    before = weights(model)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    assert_same(ema.average, before)


@pytest.mark.parametrize("found_inf", [None, torch.zeros(1), torch.ones(1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_average_is_the_weights_until_the_first_update(dtype: Any, found_inf: Any) -> None:
    model = two_linear().to(dtype)
    ema = WeightEMA(model, 0.9)
    moved(model, WeightEMA(model, 1.0), 1)
    own = weights(model)
    assert_same(
        ema.state_dict()["average"], {k: v.to(ema.average[k].dtype) for k, v in own.items()}
    )
    with ema.swapped():
        assert_same(weights(model), own)
    model.load_state_dict({name: torch.full_like(value, 5.0) for name, value in own.items()})
    ema.update(found_inf)
    moved(model, WeightEMA(model, 1.0), 1)
    assert all(bool((average == 5.0).all()) for average in ema.average.values())


def test_loaded_average_does_not_start_anew() -> None:
    model = two_linear()
    ema, other = WeightEMA(model, 0.5), WeightEMA(two_linear(seed=9), 0.5)
    ema.load_state_dict(other.state_dict())
    moved(model, WeightEMA(model, 1.0), 1)
    assert_same(ema.average, other.average)


def test_small_moves_of_a_bfloat16_model_are_not_lost() -> None:
    """In bfloat16 1.0 + 0.001 * (1.03 - 1.0) is 1.0, and the average would stall."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = started(model, 0.999)
    nn.init.constant_(model.weight, 1.03125)
    for _ in range(1000):
        ema.update()
    expected = 1.03125 - 0.03125 * 0.999**1000
    # 1000 times three roundings of values around 1.
    assert ema.average["weight"].item() == pytest.approx(expected, abs=3000 * 2**-24)


@pytest.mark.parametrize(("decay", "follows"), [(0.0, True), (1.0, False)])
def test_decay_0_and_1_are_exact(decay: float, follows: bool) -> None:
    model = two_linear()
    start = weights(model)
    ema = started(model, decay)
    moved(model, ema, 2)
    assert_same(ema.average, weights(model) if follows else start)


def test_dtype_of_the_average_may_be_chosen() -> None:
    assert WeightEMA(two_linear(), dtype=torch.float64).average["0.bias"].dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"decay": -0.1}, ValueError), ({"decay": 1.1}, ValueError),
        ({"decay": float("nan")}, ValueError), ({"decay": "x"}, TypeError),
        ({"decay": None}, TypeError), ({"dtype": torch.int64}, TypeError),
    ],
    ids=str,
)  # fmt: skip
def test_bad_option_is_refused_by_name(options: dict[str, Any], error: type[Exception]) -> None:
    (name,) = options
    with pytest.raises(error, match=f"WeightEMA: {name} must be"):
        WeightEMA(two_linear(), **options)


def test_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have parameters"):
        WeightEMA(nn.Tanh())


@pytest.mark.parametrize("found_inf", [1.0, 2.0, float("inf")])
def test_overflow_leaves_the_average_alone(found_inf: float) -> None:
    """Also where the weights are not numbers."""
    model = two_linear()
    ema = WeightEMA(model, 0.5)
    moved(model, ema, 2)
    before = bits(ema.average)
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    ema.update(found_inf=torch.tensor(found_inf))
    assert_same(bits(ema.average), before)


def test_no_overflow_averages_as_ever() -> None:
    models = [two_linear(), two_linear()]
    plain, scaled = (started(model, 0.5) for model in models)
    for model in models:
        moved(model, WeightEMA(model, 1.0), 1)
    plain.update()
    scaled.update(found_inf=torch.zeros(1))
    assert_same(scaled.average, plain.average)


# Swapped in and out


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swapped_model_has_the_averages_and_gets_its_own_back(
    dtype: torch.dtype, outer: Any
) -> None:
    model = two_linear().to(dtype)
    ema = WeightEMA(model, 0.9)
    moved(model, ema, 3)
    with torch.no_grad():
        model[0].weight[0, :2] = torch.tensor([float("nan"), -0.0])
    own, average = bits(weights(model)), bits(ema.average)
    places = [param.data_ptr() for param in model.parameters()]
    with outer(), ema.swapped():
        assert_same(weights(model), {k: v.to(dtype) for k, v in ema.average.items()})
    assert_same(bits(weights(model)), own)
    assert_same(bits(ema.average), average)
    assert [param.data_ptr() for param in model.parameters()] == places


def test_gradients_may_be_taken_inside() -> None:
    """Of the averaged weights; the graph of an earlier loss knows that its weights are gone."""
    model = two_linear()
    ema = WeightEMA(model, 0.9)
    moved(model, ema, 1)
    with ema.swapped():
        model(randn(4, 6)).sum().backward()
        assert all(param.grad is not None and param.requires_grad for param in model.parameters())
    loss = model(randn(4, 6)).sum()
    with ema.swapped(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_exception_inside_brings_the_weights_back() -> None:
    model = two_linear()
    ema = WeightEMA(model, 0.9)
    moved(model, ema, 1)
    own = weights(model)
    with pytest.raises(KeyError), ema.swapped():
        raise KeyError
    assert_same(weights(model), own)
    ema.update()


def test_nested_swaps_and_updates_inside_are_refused() -> None:
    model = two_linear()
    ema = WeightEMA(model, 0.9)
    moved(model, ema, 1)
    own = weights(model)
    with ema.swapped():
        inside, average = weights(model), deepcopy(ema.average)
        with pytest.raises(RuntimeError, match="must not be nested"), ema.swapped():
            pass
        with pytest.raises(RuntimeError, match=r"update must run outside swapped\(\)"):
            ema.update()
        assert_same((weights(model), ema.average), (inside, average))
    assert_same(weights(model), own)


def test_copy_to_model_exports_the_averages() -> None:
    model = two_linear()
    ema = WeightEMA(model, 0.9)
    moved(model, ema, 2)
    ema.copy_to_model()
    assert_same(weights(model), ema.average)


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def test_tied_weights_are_averaged_once() -> None:
    model = tied()
    ema = started(model, 0.5)
    start = model[0].weight.detach().clone()
    nn.init.zeros_(model[0].weight)
    ema.update()
    assert_same(ema.average, {"0.weight": 0.5 * start})
    with ema.swapped():
        assert_same(model[1].weight.detach(), 0.5 * start)
    assert not model[1].weight.any()


# State dicts


def test_state_dict_goes_through_a_file(tmp_path: Any) -> None:
    model = two_linear().bfloat16()
    ema = WeightEMA(model, 0.75)
    moved(model, ema, 3)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other = WeightEMA(two_linear(seed=9).bfloat16(), 0.9)
    memory = [average.data_ptr() for average in other.average.values()]
    other.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert other.decay == 0.75
    assert_same(other.average, ema.average)
    assert [average.data_ptr() for average in other.average.values()] == memory


def no_bias(state_dict: dict[str, Any]) -> None:
    del state_dict["average"]["0.bias"]


def another_name(state_dict: dict[str, Any]) -> None:
    state_dict["average"]["x"] = torch.zeros(1)


def another_shape(state_dict: dict[str, Any]) -> None:
    state_dict["average"]["2.bias"] = torch.zeros(4)


def another_decay(state_dict: dict[str, Any]) -> None:
    state_dict["decay"] = 1.5


@pytest.mark.parametrize("spoil", [no_bias, another_name, another_shape, another_decay])
def test_spoilt_state_dict_changes_nothing(spoil: Callable[[dict[str, Any]], None]) -> None:
    ema, other = WeightEMA(two_linear(), 0.75), WeightEMA(two_linear(seed=9), 0.9)
    before = deepcopy(other.state_dict())
    state_dict = deepcopy(ema.state_dict())
    spoil(state_dict)
    with pytest.raises(ValueError, match="WeightEMA"):
        other.load_state_dict(state_dict)
    assert_same(other.state_dict(), before)


# The averages that optimizers keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_averaging
def test_average_of_an_optimizer_equals_the_one_beside_it(case: Case, dtype: torch.dtype) -> None:
    """Both start at the weights and see them after each step; one sees them before they are rounded
    to bfloat16, which is at most 2**-9 of a weight, and each of the 10 steps adds up to 0.1 of it.
    """
    model = two_linear().to(dtype)
    optimizer = case(model.parameters(), weight_ema=0.9)
    inside, beside = WeightEMA.of(optimizer, model), started(model, 0.9)
    assert (inside.decay, inside.average.keys()) == (0.9, beside.average.keys())
    for row in make_grads(list(model.parameters()), 10):
        train(optimizer, [row])
        beside.update()
    rounded = 2**-9 if dtype == torch.bfloat16 else 0.0
    for name, average in inside.average.items():
        largest = 1 + beside.average[name].abs().max()
        assert_within(average, beside.average[name], largest * (rounded + 10 * 4 * 2**-24), name)
        assert average.dtype == torch.float32


@each_kind
def test_average_of_an_optimizer_is_swapped_and_left_to_it(kind: Any) -> None:
    model = two_linear()
    optimizer = kind(model.parameters(), lr=0.1, weight_ema=0.5)
    ema = WeightEMA.of(optimizer, model)
    train(optimizer, make_grads(list(model.parameters()), 3))
    own = weights(model)
    with ema.swapped():
        assert_same(weights(model), ema.average)
    assert_same(weights(model), own)
    with pytest.raises(RuntimeError, match="left to the step of the optimizer"):
        ema.update()


@each_kind
def test_average_of_an_optimizer_survives_its_load(kind: Any) -> None:
    """The tensors are new ones then; the names lead to them."""
    model = two_linear()
    optimizer = kind(model.parameters(), lr=0.1, weight_ema=0.5)
    ema = WeightEMA.of(optimizer, model)
    train(optimizer, make_grads(list(model.parameters()), 3))
    saved = deepcopy((optimizer.state_dict(), ema.average))
    train(optimizer, make_grads(list(model.parameters()), 3))
    optimizer.load_state_dict(saved[0])
    assert_same(ema.average, saved[1])
    train(optimizer, make_grads(list(model.parameters()), 1))
    assert not torch.equal(ema.average["0.bias"], saved[1]["0.bias"])


def test_average_after_a_dict_of_torch_is_the_weights() -> None:
    """It starts at the next step, at the weights before it."""
    model = two_linear()
    theirs = torch.optim.AdamW(model.parameters())
    train(theirs, make_grads(list(model.parameters()), 2))
    optimizer = GrokFastAdamW(model.parameters(), weight_ema=0.5)
    ema = WeightEMA.of(optimizer, model)
    state_dict = deepcopy(ema.state_dict())
    optimizer.load_state_dict(deepcopy(theirs.state_dict()))
    own = weights(model)
    assert_same(ema.average, own)
    with ema.swapped():
        assert_same(weights(model), own)
    with pytest.raises(RuntimeError, match="take one step first"):
        ema.load_state_dict(state_dict)
    assert_same(weights(model), own)


def test_loaded_average_is_that_of_the_optimizer() -> None:
    """Its decay stays in the groups, which are what the step reads."""
    model = two_linear()
    optimizer = GrokFastAdamW(model.parameters(), weight_ema=0.5)
    ema, other = WeightEMA.of(optimizer, model), WeightEMA(two_linear(seed=9), 0.9)
    with pytest.raises(RuntimeError, match="take one step first"):
        ema.load_state_dict(other.state_dict())
    train(optimizer, make_grads(list(model.parameters()), 1))
    ema.load_state_dict(other.state_dict())
    kept = {name: optimizer.state[p]["weight_ema"] for name, p in model.named_parameters()}
    assert_same(kept, other.average)
    assert (ema.decay, optimizer.param_groups[0]["weight_ema"]) == (0.5, 0.5)


def load_fives(model: nn.Module) -> dict[str, Tensor]:
    """Loads weights in place of those that an average was made with, and returns them."""
    model.load_state_dict({k: torch.full_like(v, 5.0) for k, v in model.state_dict().items()})
    return weights(model)


def follow(model: nn.Module, ema: WeightEMA, loaded: bool, step: Callable[[], object]) -> None:
    """Reads an average before the first step, and compares it with float64 after each of five."""
    if loaded:
        load_fives(model)
    own = weights(model)
    with ema.swapped():
        assert_same(weights(model), own)
    assert_same(ema.average, own)
    truth = {name: value.double() for name, value in own.items()}
    for _ in range(5):
        step()
        for name, value in weights(model).items():
            truth[name] = 0.9 * truth[name] + 0.1 * value.double()
    for name, average in ema.average.items():
        # Three roundings a step, of values below 6.
        assert_within(average, truth[name], 5 * 3 * 2**-24 * 6, name)


@pytest.mark.parametrize("loaded", [False, True])
@each_averaging
def test_average_of_an_optimizer_starts_at_the_weights_of_its_first_step(
    case: Case, loaded: bool
) -> None:
    model = two_linear()
    optimizer = case(model.parameters(), lr=0.1, weight_ema=0.9)
    rows = iter(make_grads(list(model.parameters()), 5))
    follow(model, WeightEMA.of(optimizer, model), loaded, lambda: train(optimizer, [next(rows)]))


@pytest.mark.parametrize("loaded", [False, True])
def test_average_of_a_plain_loop_starts_at_the_weights_of_its_first_update(loaded: bool) -> None:
    model = two_linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = iter(make_grads(list(model.parameters()), 5))
    ema = WeightEMA(model, 0.9)

    def step() -> None:
        if not ema.started:
            ema.update()
        train(optimizer, [next(rows)])
        ema.update()

    follow(model, ema, loaded, step)


def test_parameters_without_average_stand_for_themselves() -> None:
    model = two_linear()
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "weight_ema": None},
    ]
    optimizer = GrokFastAdamW(groups, weight_ema=0.5)
    ema = WeightEMA.of(optimizer, model)
    assert ema.average.keys() == {"0.weight", "0.bias"}
    set_grads(list(model.parameters()), make_grads(list(model.parameters()), 1)[0])
    optimizer.step()
    own = weights(model)
    with ema.swapped():
        assert_same(model[2].weight.detach(), own["2.weight"])
        assert not torch.equal(model[0].weight, own["0.weight"])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, GrokFastAdamW])
def test_optimizer_without_averages_is_refused(kind: Any) -> None:
    model = two_linear()
    with pytest.raises(ValueError, match=f"{kind.__name__} must keep averages"):
        WeightEMA.of(kind(model.parameters()), model)


def test_a_parameter_without_gradients_does_not_keep_the_others_from_loading() -> None:
    model = two_linear()
    optimizer = GrokFastAdamW(model.parameters(), weight_ema=0.5)
    ema, other = WeightEMA.of(optimizer, model), WeightEMA(two_linear(seed=9), 0.9)
    unused = list(model.parameters())[-1]
    grads = make_grads(list(model.parameters()), 1)[0]
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = None if param is unused else grad
    optimizer.step()
    ema.load_state_dict(other.state_dict())
    *names, last = ema.average
    assert_same(*({name: each.average[name] for name in names} for each in (ema, other)))
    assert torch.equal(ema.average[last], unused)
