"""QKClip on two ranks: every rank clips by the largest logit of all of them."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trm_fast.optim.qk_clip import QKClip, QKRows

from ..support.processes import needs_gloo, run_ranks


def clipped(rank: int) -> dict[str, list[Tensor]]:
    """Each rank reports other logits; the rows of the sharded fused weight are split unevenly."""
    mesh = init_device_mesh("cpu", (2,))
    logits = torch.tensor([[0.5, 4.0, 0.5], [2.25, 1.0, 0.5]])[rank]
    weights = {}
    for kind in ("replicated", "sharded"):
        layer = fused_layer()
        clip = QKClip(1.0)
        report = clip.watch(QKRows(layer, 0, 3), QKRows(layer, 3, 3), heads=3)
        if kind == "sharded":
            fully_shard(layer, mesh=mesh)
        report(logits)
        clip.step()
        full = [p.full_tensor() if kind == "sharded" else p for p in layer.parameters()]
        weights[kind] = [tensor.detach().clone() for tensor in full]
    return weights


def fused_layer() -> nn.Linear:
    layer = nn.Linear(2, 7)
    layer.weight.data = torch.arange(14.0).view(7, 2)
    layer.bias.data = torch.arange(7.0)
    return layer


@needs_gloo
def test_largest_logits_of_all_ranks_clip_replicated_and_sharded_weights() -> None:
    layer = fused_layer()
    gamma = torch.tensor([2.25, 4.0, 1.0]).reciprocal()
    factor = torch.cat([gamma.sqrt(), gamma.sqrt(), torch.ones(1)])
    expected = [layer.weight * factor[:, None], layer.bias * factor]
    for weights in run_ranks(clipped):
        assert weights.keys() == {"replicated", "sharded"}
        for found in weights.values():
            assert all(map(torch.equal, found, expected))
