"""VectorNet: its parameters, its updates, and when they run as one op."""

import pytest
import torch
from torch import nn

from trm_fast.nn.vector_net import VectorNet
from trm_fast.ops import _recurse

from ..ops.vector_checks import assert_close, gradients, tolerance, truth

SCALES = [1.0, 0.6, 0.4]
COUNTS = {"n": 2, "T": 3, "grad_cycles": 2}


def make(hidden=32, batch=5, **options):
    torch.manual_seed(0)
    states = [torch.randn(batch, hidden, requires_grad=True) for _ in range(3)]
    return VectorNet(hidden, **options), states


class Stepwise:
    """The single updates of a network as the loop of a recursion calls them, with scales."""

    def __init__(self, net):
        self.net = net

    def inject(self, x, y):
        return self.net.inject(x, y)

    def update_z(self, z, injection, level):
        return z + SCALES[level] * self.net.update_z(z, injection, level)

    def update_y(self, y, z, level):
        return y + SCALES[level] * self.net.update_y(y, z, level)


@pytest.mark.parametrize(("hidden", "parameters"), [(128, 115_712), (256, 460_800)])
def test_the_number_of_parameters(hidden, parameters):
    weights = VectorNet(hidden).weights()
    assert len(weights) == 12 == len(list(VectorNet(hidden).parameters()))
    assert sum(weight.numel() for weight in weights) == parameters


def test_parameters_start_as_those_of_torch():
    net, _ = make()
    torch.manual_seed(0)
    for _ in range(3):
        torch.randn(5, 32)
    layers = [nn.Linear(96, 32), nn.Linear(32, 32), nn.LayerNorm(32)]
    layers += [nn.Linear(64, 32), nn.Linear(32, 32), nn.LayerNorm(32)]
    expected = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    assert all(map(torch.equal, net.weights(), expected))


@pytest.mark.parametrize("every", [False, True], ids=["per_level", "every_step"])
def test_one_op_does_what_the_updates_do(every):
    net, states = make()
    leaves = [*states, *net.weights()]
    expected = truth(leaves, **COUNTS, y_every_step=every, step_scales=SCALES)
    fused = net.fused_recursion(*states, **COUNTS, y_every_step=every, step_scale=SCALES)
    stepwise = _recurse.recurse(Stepwise(net), *states, **COUNTS, y_every_step=every)
    grads = [torch.randn_like(state) for state in fused]
    true = gradients(expected, leaves, [grad.double() for grad in grads])
    names = ["y", "z", *map(str, range(len(leaves)))]
    for out in (fused, stepwise):
        found = gradients(out, leaves, grads)
        # The defaults of torch keep products small, so that norms enlarge errors about 4 times.
        bound = 4 * tolerance(torch.float32, 12)
        assert_close([*out, *found], [*expected, *true], bound, names)


def test_every_parameter_gets_a_gradient():
    net, states = make()
    y, _ = net.fused_recursion(*states, n=2, T=3, step_scale=SCALES)
    y.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in net.parameters())


def test_scales_may_be_a_function():
    net, states = make()
    listed = net.fused_recursion(*states, **COUNTS, step_scale=SCALES)
    called = net.fused_recursion(*states, **COUNTS, step_scale=lambda level: SCALES[level])
    assert all(map(torch.equal, listed, called))


def test_dropout_is_not_fused_in_training():
    net, states = make(dropout=0.5)
    counts = COUNTS | {"step_scale": SCALES}
    assert not net.draws_nothing
    assert net.fused_recursion(*states, **counts) is None
    dropped = net.update_z(states[2], net.inject(*states[:2]), 0)
    net.eval()
    assert net.draws_nothing
    assert net.fused_recursion(*states, **counts) is not None
    assert not torch.equal(net.update_z(states[2], net.inject(*states[:2]), 0), dropped)


@pytest.mark.parametrize("scale", [None, torch.ones(3), lambda level: torch.ones(())])
def test_other_scales_are_not_fused(scale):
    net, states = make()
    assert net.fused_recursion(*states, **COUNTS, step_scale=scale) is None


def test_other_states_are_not_fused():
    net, (x, y, z) = make()
    counts = COUNTS | {"step_scale": SCALES}
    assert net.fused_recursion(x, y[:1], z, **counts) is None
    assert net.fused_recursion(x, y, z.double(), **counts) is None
    assert net.fused_recursion(*(s.unflatten(0, (1, 5)) for s in (x, y, z)), **counts) is None


def test_changed_layers_are_not_fused():
    counts = COUNTS | {"step_scale": SCALES}
    net, states = make()
    handle = net.y_out.register_forward_hook(lambda *_: None)
    assert net.fused_recursion(*states, **counts) is None
    handle.remove()
    assert net.fused_recursion(*states, **counts) is not None
    nn.utils.parametrizations.spectral_norm(net.z_in)
    assert net.fused_recursion(*states, **counts) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden must be a whole number >= 1; got 0"),
        ({"hidden": 2.0}, "hidden must be a whole number >= 1; got 2.0"),
        ({"hidden": 4, "dropout": 1.0}, "dropout must be 0 <= dropout < 1; got 1.0"),
        ({"hidden": 4, "dropout": -0.1}, "dropout must be 0 <= dropout < 1; got -0.1"),
    ],
)
def test_sizes_out_of_range(options, message):
    with pytest.raises(ValueError) as error:
        VectorNet(**options)
    assert str(error.value) == f"VectorNet: {message}"


def test_it_says_what_it_is():
    assert "hidden=32, dropout=0.5" in repr(VectorNet(32, 0.5))
