"""The recursive classifier: its equations, its parameters, halting, and what is refused."""

import pytest
import torch
from torch import nn

import trm_fast
from trm_fast.losses import PHI
from trm_fast.recipes.classify import TinyRecursiveModel

from ...ops.vector_checks import assert_close, tolerance, truth

NO_CPP = trm_fast.backends()["vector_latent_update"]["cpu"]["cpp"] not in ("usable", "chosen")
needs_cpp = pytest.mark.skipif(NO_CPP, reason="the C++ form of vector_latent_update is not usable")


def make(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"input_dim": 12, "hidden_dim": 32, "output_dim": 4}
    return TinyRecursiveModel(**sizes, **options)


def expected(model, features, T, n, y_every_step=True):
    """The equations in float64; returns logits, y and z."""
    f = features.double()
    weight = {name: value.double() for name, value in model.named_parameters()}
    x = f @ weight["embed.weight"].T + weight["embed.bias"]
    zero = torch.zeros_like(x)
    # truth() computes in float64 and leaves gradients of the leaves as they are.
    leaves = [x, zero, zero, *model.recursion.net.weights()]
    scales = [PHI**-level for level in range(T)]
    y, z = truth(leaves, n=n, T=T, y_every_step=y_every_step, step_scales=scales)
    centred = y - y.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    normed = normed * weight["norm.weight"] + weight["norm.bias"]
    return normed @ weight["head.weight"].T + weight["head.bias"], y, z


SIZES = {
    (128, 256, 10, False): (496_906, 18),
    (128, 128, 10, False): (133_770, 18),
    (128, 256, 10, True): (529_931, 22),
}


@pytest.mark.parametrize(("size", "counts"), SIZES.items())
def test_the_number_of_parameters(size, counts):
    *sizes, halt = size
    parameters = [p.numel() for p in TinyRecursiveModel(*sizes, halt=halt).parameters()]
    assert (sum(parameters), len(parameters)) == counts


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("every", [True, False], ids=["every_step", "per_level"])
@pytest.mark.parametrize(("T", "n"), [(1, 2), (3, 3)])
def test_logits_and_gradients_are_those_of_the_equations(backend, every, T, n):
    model = make(y_every_step=every)
    features = torch.randn(5, 12)
    wanted, *_ = expected(model, features, T, n, every)
    grad = torch.randn(5, 4)
    parameters = [p for p in model.parameters()]
    true = torch.autograd.grad(wanted, parameters, grad.double())
    with trm_fast.use_backend(backend):
        logits = model(features, T, n)
        found = torch.autograd.grad(logits, parameters, grad)
    # Two products and a norm more than the updates; the defaults of torch keep products small, so
    # that norms enlarge errors about 4 times.
    bound = 4 * tolerance(torch.float32, T * n * 2 + 1)
    names = ["logits", *(name for name, _ in model.named_parameters())]
    assert_close([logits, *found], [wanted, *true], bound, names)


@pytest.mark.parametrize(("halt", "calls"), [(False, 1), (True, 3)])
def test_the_recursion_runs_as_one_op_or_one_per_level_with_halting(halt, calls, monkeypatch):
    model, found = make(halt=halt), []
    run = model.recursion.net.fused_recursion

    def fused(*args, **options):
        found.append(run(*args, **options))
        return found[-1]

    monkeypatch.setattr(model.recursion.net, "fused_recursion", fused)
    model(torch.randn(2, 12), return_state=True)
    assert len(found) == calls and None not in found


@pytest.mark.parametrize("halt", [False, True])
def test_every_parameter_gets_a_gradient(halt):
    model = make(halt=halt)
    logits, (_, _, probs) = model(torch.randn(6, 12), 3, 2, return_state=True)
    loss = logits.square().sum() + (0 if probs is None else probs[:, :-1].sum())
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_depth_and_micro_steps_change_the_output():
    model, features = make(), torch.randn(3, 12)
    outputs = [model(features, T, n) for T, n in [(3, 6), (2, 6), (3, 5)]]
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_a_call_does_not_depend_on_the_one_before():
    model, features = make(), torch.randn(3, 12)
    first = model(features, 2, 3)
    model(features, 5, 4)
    model.predict(features)
    assert torch.equal(model(features, 2, 3), first)


def test_states_are_returned_on_request():
    model, features = make(), torch.randn(3, 12)
    logits, (y, z, probs) = model(features, 2, 3, return_state=True)
    _, wanted_y, wanted_z = expected(model, features, 2, 3)
    assert probs is None and torch.equal(logits, model(features, 2, 3))
    assert_close([y, z], [wanted_y, wanted_z], 4 * tolerance(torch.float32, 12), ["y", "z"])


def test_halting_probabilities_are_those_of_z_after_each_level():
    model, features = make(halt=True), torch.randn(3, 12)
    logits, (_, _, probs) = model(features, 3, 2, return_state=True)
    assert probs.shape == (3, 3)
    first, second = model.halt_head[0], model.halt_head[2]
    for level in range(3):
        _, _, z = expected(model, features, level + 1, 2)
        inner = z @ first.weight.double().T + first.bias.double()
        inner = inner * 0.5 * torch.special.erfc(-inner / 2**0.5)
        wanted = torch.sigmoid(inner @ second.weight.double().T + second.bias.double())[:, 0]
        assert_close([probs[:, level]], [wanted], 4 * tolerance(torch.float32, 12), ["p"])
    # The head changes nothing of the states; level by level rounds as all at once.
    assert_close(
        [logits], [expected(model, features, 3, 2)[0]], 4 * tolerance(torch.float32, 12), ["l"]
    )


def test_the_halting_head_learns_and_the_states_do_not_hear_of_it():
    model = make(halt=True)
    _, (_, _, probs) = model(torch.randn(3, 12), 3, 2, return_state=True)
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(probs[:, :-1].sum(), list(model.parameters()), allow_unused=True)
    touched = {
        name for name, grad in zip(names, found, strict=True) if grad is not None and grad.any()
    }
    assert touched == {name for name in names if name.startswith("halt_head")}


def test_predictions_are_the_largest_logits():
    model, features = make(dropout=0.5), torch.randn(20, 12)
    model.train()
    found = model.predict(features, 2, 3)
    assert model.training and not found.classes.requires_grad
    assert torch.equal(found.classes, expected(model, features, 2, 3)[0].argmax(1))
    assert found.levels.tolist() == [2] * 20


def test_early_exit_takes_each_sample_where_it_halts():
    model, features = make(halt=True), torch.randn(60, 12)
    # Spread around 1/2, so that samples halt after every level.
    model.halt_head[2].weight.data *= 40
    _, (_, _, probs) = model(features, 4, 2, return_state=True)
    halts = torch.cat((probs[:, :-1] > 0.5, torch.ones(60, 1, dtype=torch.bool)), 1)
    levels = halts.int().argmax(1) + 1
    assert levels.unique().numel() >= 3
    found = model.predict(features, 4, 2, early_exit=True)
    assert torch.equal(found.levels, levels)
    for level in levels.unique().tolist():
        rows = levels == level
        logits = expected(model, features[rows], level, 2)[0]
        assert torch.equal(found.classes[rows], logits.argmax(1))


def test_dropout_acts_in_training_only():
    model, features = make(dropout=0.5), torch.randn(3, 12)
    assert not torch.equal(model(features), model(features))
    model.eval()
    wanted = expected(model, features, 3, 6)[0]
    assert_close([model(features)], [wanted], 4 * tolerance(torch.float32, 37), ["logits"])


def test_parameters_start_as_torch_starts_its_layers():
    model = make(seed=3)
    torch.manual_seed(3)
    first = nn.Linear(12, 32)
    assert torch.equal(model.embed.weight, first.weight)
    assert model.norm.weight.eq(1).all() and model.norm.bias.eq(0).all() and model.norm.eps == 1e-5


def test_complexity_of_the_model():
    # The table has three decimals.
    found = [make().get_complexity(T) for T in range(1, 6)]
    assert found == pytest.approx([6.000, 15.708, 31.416, 56.833, 97.957], abs=5e-4)


DEPTH = "T must be a whole number from 1 to max_depth=5 and n >= 1; got"
WRONG = {
    "T": (lambda m, f: m(f, T=0), f": {DEPTH} T=0, n=6"),
    "deep": (lambda m, f: m(f, T=6), f": {DEPTH} T=6, n=6"),
    "n": (lambda m, f: m(f, n=0), f": {DEPTH} T=3, n=0"),
    "half": (lambda m, f: m.get_complexity(1.5), f": {DEPTH} T=1.5, n=6"),
    "shape": (lambda m, f: m(f[0]), ": features must be [batch, 12]; got (12,)"),
    "width": (lambda m, f: m.predict(f[:, 1:]), ": features must be [batch, 12]; got (3, 11)"),
    "exit": (
        lambda m, f: m.predict(f, early_exit=True),
        ".predict: early_exit needs halt=True; got a model without",
    ),
    "size": (
        lambda m, f: TinyRecursiveModel(hidden_dim=0),
        ": hidden_dim must be a whole number >= 1; got 0",
    ),
    "halt": (
        lambda m, f: TinyRecursiveModel(hidden_dim=1, halt=True),
        ": hidden_dim must be a whole number >= 2; got 1",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError) as error:
        call(make(), torch.randn(3, 12))
    assert str(error.value) == f"TinyRecursiveModel{message}"
