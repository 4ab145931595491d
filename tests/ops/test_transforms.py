"""The functions of torch.func and forward-mode derivatives, through every op that has gradients:
what the formula gives, or an error that says what to do, and never a derivative of zero."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import trm_fast
from trm_fast import ops
from trm_fast._errors import BackendError
from trm_fast.ops.vector_latent_update import shapes_of

from ..conftest import skip_unless_usable

DOUBLE = torch.float64


class Case(NamedTuple):
    """A function of one tensor that calls an op, and where to take its derivatives."""

    call: Callable[[Tensor], Tensor]
    x: Tensor
    direction: Tensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# Drawn here, as nothing random may be drawn inside vmap.
MIXING = {"mlp_t": [(64, 3), (3, 32)], "attention": [(96, 32), (32, 32)]}
LAYERS = {
    mixer: [draw(*shape) / shape[1] ** 0.5 for shape in (*mix, (64, 32), (32, 32))]
    for mixer, mix in MIXING.items()
}
VECTORS = [draw(*shape) / 6 for shape in shapes_of(32)]
GATES = {size: (draw(8, size), draw(size, 4)) for size in (3, 8)}


def recursion(mixer: str, x: Tensor) -> Tensor:
    weights = [weight.to(x.dtype) for weight in LAYERS[mixer]]
    network = ops.Network(mixer, heads=2)
    return ops.latent_update(x, x, torch.zeros_like(x), weights, network, n=1, T=1)[0]


def vectors(x: Tensor) -> Tensor:
    weights = [weight.to(x.dtype) for weight in VECTORS]
    return ops.vector_latent_update(x, x, torch.zeros_like(x), weights, n=1, T=1)[0]


def gated(op: Callable[..., Tensor], size: int, x: Tensor) -> Tensor:
    gate_up, down = GATES[size]
    return op(x, gate_up.to(x.dtype), down.to(x.dtype))


def loss(x: Tensor) -> Tensor:
    return ops.stablemax_cross_entropy(x, torch.tensor([[0, 2, -100]] * x.shape[0])).loss


CALLS = {
    "mlp_t": (partial(recursion, "mlp_t"), (2, 3, 32)),
    "attention": (partial(recursion, "attention"), (2, 3, 32)),
    "vector": (vectors, (2, 32)),
    "norm": (lambda x: ops.rms_norm_residual(x, x.sin()), (2, 3, 8)),
    "rope": (lambda x: ops.rope_attention(x, x.sin(), x.cos(), causal=True), (2, 3, 2, 8)),
    "loss": (loss, (2, 3, 5)),
    "swiglu": (partial(gated, ops.swiglu, 8), (2, 3, 8)),
    "tokens": (partial(gated, ops.token_mixer, 3), (2, 3, 8)),
}


@pytest.fixture(params=CALLS)
def case(request):
    call, shape = CALLS[request.param]
    return Case(call, draw(*shape, seed=7).float(), draw(*shape, seed=8).float())


def slope(case: Case, function: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The derivative along the direction, by a central difference in float64."""
    x, step = case.x.to(DOUBLE), 1e-5 * case.direction.to(DOUBLE)
    function = function or case.call
    return (function(x + step) - function(x - step)) / 2e-5


def score(out: Tensor) -> Tensor:
    """A number that each element moves by its own share; squares of what is normed hardly move."""
    shares = torch.arange(out[0].numel(), dtype=out.dtype).cos().view_as(out[0])
    return (shares * out).sum()


def gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(score(call(x)), x)[0]


def close(found: Tensor, truth: Tensor) -> None:
    # Some hundred roundings of float32 on the way, each enlarged a few times by a norm; the
    # difference in float64 is exact to 1e-9.
    error = (found.to(DOUBLE) - truth).abs().max()
    assert error <= 1000 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_a_forward_mode_derivative_is_right(case):
    close(torch.func.jvp(case.call, (case.x,), (case.direction,))[1], slope(case))


def test_a_dual_tensor_carries_its_tangent_through(case):
    with forward_ad.dual_level():
        out = case.call(forward_ad.make_dual(case.x, case.direction))
        close(forward_ad.unpack_dual(out).tangent, slope(case))


def test_a_gradient_of_torch_func_is_that_of_backward(case):
    found = torch.func.grad(lambda x: score(case.call(x)))(case.x)
    close(found, gradient(case.call, case.x.to(DOUBLE)))


def test_gradients_per_sample_are_those_of_each_alone(case):
    def one(sample: Tensor) -> Tensor:
        return score(case.call(sample[None]))

    found = torch.func.vmap(torch.func.grad(one))(case.x)
    close(found, gradient(case.call, case.x.to(DOUBLE)))


def test_a_second_derivative_of_torch_func_is_right(case):
    def gradients(x: Tensor) -> Tensor:
        return torch.func.grad(lambda given: score(case.call(given)))(x)

    found = torch.func.jvp(gradients, (case.x,), (case.direction,))[1]
    close(found, slope(case, gradients))


def test_a_jacobian_is_that_of_backward(case):
    found = torch.func.jacrev(lambda x: case.call(x).flatten()[:2])(case.x)
    truth = torch.autograd.functional.jacobian(
        lambda x: case.call(x).flatten()[:2], case.x.to(DOUBLE)
    )
    close(found, truth)


def test_functionalised_calls_are_the_same(case):
    close(torch.func.functionalize(case.call)(case.x), case.call(case.x.to(DOUBLE)))
    # Nothing of it is left in what an op keeps between calls.
    close(case.call(case.x), case.call(case.x.to(DOUBLE)))


@pytest.mark.parametrize("name", ["mlp_t", "attention", "vector", "norm", "loss"])
def test_gradients_of_gradients_through_a_fused_form_are_refused_by_name(name):
    skip_unless_usable("cpp")
    call, shape = CALLS[name]
    x = draw(*shape, seed=7).float().requires_grad_()
    # A constant arrives at the op, and torch alone would give up the second derivative in silence.
    (grad,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    with pytest.raises(BackendError, match='backend="reference"'):
        (grad.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("name", ["mlp_t", "vector", "norm", "loss", "swiglu", "tokens"])
def test_the_reference_has_gradients_of_gradients(name):
    call, shape = CALLS[name]
    case = Case(call, draw(*shape, seed=7).float(), draw(*shape, seed=8).float())
    x = case.x.clone().requires_grad_()
    with trm_fast.use_backend("reference"):
        (grad,) = torch.autograd.grad(score(call(x)), x, create_graph=True)
        (second,) = torch.autograd.grad(grad, x, case.direction)
    close(second, slope(case, partial(gradient, call)))


def test_a_named_fused_form_refuses_a_transform():
    skip_unless_usable("cpp")
    with trm_fast.use_backend("cpp"), pytest.raises(BackendError, match=r"norm_residual.*func"):
        torch.func.jvp(lambda x: ops.rms_norm_residual(x), (torch.ones(8),), (torch.ones(8),))


IN_PLACE = {
    "adaptive_step_": lambda x: ops.adaptive_step_(
        [x], [x], [], [], [torch.zeros(())], settings=ops.Settings(0.1, rule="sgd")
    ),
    "newton_schulz_": lambda x: ops.newton_schulz_([x]),
    "filter_sums": lambda x: ops.filter_sums([x]),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_op_that_writes_by_address_refuses_wrappers(name):
    with pytest.raises(BackendError, match=rf"{name}: must be called outside of torch.func"):
        torch.func.vmap(IN_PLACE[name])(torch.ones(2, 3, 3))


def test_matrices_are_orthogonalised_one_by_one_inside_vmap():
    x = draw(2, 4, 4).float()
    close(torch.func.vmap(ops.newton_schulz)(x), ops.newton_schulz(x.to(DOUBLE)))


def small_model(dtype: str) -> trm_fast.TinyRecursiveModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 2, "vocab_size": 7, "seq_len": 3}
    sizes |= {"H_cycles": 1, "L_cycles": 1, "puzzle_emb_ndim": 0, "puzzle_emb_len": 0}
    model = trm_fast.TinyRecursiveModel("sudoku_attention", forward_dtype=dtype, **sizes)
    return model.to(getattr(torch, dtype))


def test_a_model_has_the_forward_mode_derivative_of_its_parameters():
    batch = {"inputs": torch.randint(7, (2, 3)), "labels": torch.randint(7, (2, 3))}

    def logits(model: trm_fast.TinyRecursiveModel, params: dict[str, Tensor]) -> Tensor:
        given = (params, (model.initial_carry(batch), batch))
        return torch.func.functional_call(model, *given)[1].logits

    model, exact = small_model("float32"), small_model("float64")
    params = {name: param.detach() for name, param in model.named_parameters()}
    ways = {name: draw(*param.shape).float() for name, param in params.items()}
    found = torch.func.jvp(partial(logits, model), (params,), (ways,))[1]
    moved = [{k: p.to(DOUBLE) + s * ways[k] for k, p in params.items()} for s in (1e-5, -1e-5)]
    close(found, (logits(exact, moved[0]) - logits(exact, moved[1])) / 2e-5)
