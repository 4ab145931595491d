"""QKClip on two ranks: every rank clips by the largest logit of all of them."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trm_fast.optim.qk_clip import QKClip, QKRows


def two_ranks(rank: int, folder: Path) -> None:
    """Each rank reports other logits; the rows of the sharded fused weight are split unevenly."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), world_size=2, rank=rank)
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
    torch.save(weights, folder / f"{rank}.pt")
    dist.destroy_process_group()


def fused_layer() -> nn.Linear:
    layer = nn.Linear(2, 7)
    layer.weight.data = torch.arange(14.0).view(7, 2)
    layer.bias.data = torch.arange(7.0)
    return layer


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
def test_largest_logits_of_all_ranks_clip_replicated_and_sharded_weights(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    layer = fused_layer()
    gamma = torch.tensor([2.25, 4.0, 1.0]).reciprocal()
    factor = torch.cat([gamma.sqrt(), gamma.sqrt(), torch.ones(1)])
    expected = [layer.weight * factor[:, None], layer.bias * factor]
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt").values():
            assert all(map(torch.equal, found, expected))


if __name__ == "__main__":
    two_ranks(int(sys.argv[1]), Path(sys.argv[2]))
