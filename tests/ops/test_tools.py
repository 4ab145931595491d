"""What torch's tools see of a fused op: counters of FLOPs, profilers, graphs."""

import pytest
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import trm_fast
from trm_fast import ops
from trm_fast.nn import Blocks, Recursion, VectorNet

from ..conftest import skip_unless_usable


@pytest.fixture(autouse=True)
def cpp():
    skip_unless_usable("cpp")


def recursion(kind: str, recompute: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "vectors":
        net, x = VectorNet(32), torch.randn(3, 32)
    else:
        options = {"length": 6} if kind == "mlp_t" else {"heads": 2}
        net, x = Blocks(32, 2, mixer=kind, **options), torch.randn(2, 6, 32)
    scale = [1.0, 0.5] if kind == "vectors" else None
    return Recursion(net, n=2, T=2, step_scale=scale, recompute=recompute), x


def counted(backend: str, kind: str, recompute: bool, trained: bool) -> int:
    module, x = recursion(kind, recompute)
    with trm_fast.use_backend(backend), FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(trained):
            y, z = module(x.requires_grad_(trained), torch.zeros_like(x), torch.zeros_like(x))
        if trained:
            (y.sum() + z.sum()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["mlp_t", "attention", "vectors"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_fused_recursion_counts_as_the_reference(kind, trained, recompute):
    case = (kind, recompute, trained)
    assert counted("cpp", *case) == counted("reference", *case) > 0


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("coefficients", ["polar_express", "cubic"])
def test_products_of_newton_schulz_count_as_the_reference(method, coefficients):
    if reason := ops.OPS["newton_schulz"].reason("cpp", "cpu", frozenset({torch.bfloat16})):
        pytest.skip(reason)
    x, found = torch.randn(24, 40).bfloat16(), []
    for backend in ("cpp", "reference"):
        with FlopCounterMode(display=False) as counter:
            ops.newton_schulz(x, 5, coefficients, method, backend=backend)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


def test_a_profile_and_a_graph_name_the_ops():
    module, x = recursion("attention", True)
    x.requires_grad_()
    with profile() as found:
        y, _ = module(x, torch.zeros_like(x), torch.zeros_like(x))
        assert y.grad_fn.name() == "_LatentUpdateBackward"
        y.sum().backward()
    names = {event.key for event in found.key_averages()}
    wanted = {"trm_fast::latent_update_forward_", "trm_fast::latent_update_backward_"}
    assert wanted | {"_LatentUpdateBackward"} <= names
