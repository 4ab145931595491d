"""A network that somebody has changed runs as changed: no fused form stands for it."""

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

import trm_fast
from trm_fast.nn import Blocks, Recursion, RMSNorm, VectorNet


class Halved(VectorNet):
    def update_z(self, z: Tensor, injection: Tensor, level: int) -> Tensor:
        return super().update_z(z, injection, level) * 0.5


class Shifted(Blocks):
    def forward(self, state, injection=None, padding=None):
        return super().forward(state, injection, padding) + 1


class Louder(RMSNorm):
    def forward(self, x, residual=None):
        return 2 * super().forward(x, residual)


def blocks(kind: type[Blocks] = Blocks) -> Blocks:
    torch.manual_seed(0)
    return kind(32, 2, heads=2)


def vectors(kind: type[VectorNet] = VectorNet) -> VectorNet:
    torch.manual_seed(0)
    return kind(32)


def patched(module: nn.Module, method: str = "forward") -> None:
    before = getattr(module, method)
    setattr(module, method, lambda *args: before(*args) * 0.5)


def other_norm(net: Blocks, name: str, norm: nn.Module) -> None:
    setattr(net.blocks[1], name, norm)


CHANGES = {
    "a class with its own update": (lambda: vectors(Halved), None),
    "a class with its own forward": (lambda: blocks(Shifted), None),
    "a forward set on the blocks": (blocks, patched),
    "a forward set on a layer": (blocks, lambda net: patched(net.blocks[0].mlp)),
    "a forward set on a mixer": (blocks, lambda net: patched(net.blocks[0].mix)),
    "an update set on the net": (vectors, lambda net: patched(net, "update_y")),
    "a forward set on a norm": (vectors, lambda net: patched(net.z_norm)),
    "another eps": (blocks, lambda net: other_norm(net, "mix_norm", RMSNorm(32, 0.5, False))),
    "a norm of another class": (
        blocks, lambda net: other_norm(net, "mlp_norm", Louder(32, weight=False)),
    ),
    "another eps of a vector's norm": (vectors, lambda net: setattr(net.y_norm, "eps", 0.5)),
}  # fmt: skip


def both(net: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The recursion, and the loop that it means."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, 32) if isinstance(net, VectorNet) else (3, 5, 32)
    x, y, z = (torch.randn(shape, generator=generator) for _ in range(3))
    step_scale = [1.0, 0.5] if isinstance(net, VectorNet) else None
    found = Recursion(net, 2, 2, step_scale=step_scale)(x, y, z)
    for level in range(2):
        if isinstance(net, VectorNet):
            scale = step_scale[level]
            injection = net.inject(x, y)
            for _ in range(2):
                z = z + scale * net.update_z(z, injection, level)
            y = y + scale * net.update_y(y, z, level)
        else:
            for _ in range(2):
                z = net(z, y + x)
            y = net(y, z)
    return list(found), [y, z]


def fallbacks() -> int:
    ops = ("latent_update", "vector_latent_update")
    return sum(len(trm_fast.backends()[op].get("fallbacks", ())) for op in ops)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_runs_as_changed(change):
    make, alter = CHANGES[change]
    plain = both(blocks() if isinstance(make(), Blocks) else vectors())[0]
    net = make()
    if alter is not None:
        alter(net)
    found, expected = both(net)
    for one, other, unchanged in zip(found, expected, plain, strict=True):
        assert torch.equal(one, other)
        assert (one - unchanged).abs().max() > 1e-3
    assert fallbacks() > 0


def test_hooks_of_all_modules_are_called():
    called: list[str] = []
    register = torch.nn.modules.module.register_module_forward_hook
    with ExitStack() as stack:
        hook = register(lambda module, *_: called.append(type(module).__name__))
        stack.callback(hook.remove)
        both(blocks())
    # Three calls in each of two cycles, of two layers, in the recursion and in the loop.
    assert called.count("SwiGLU") == 2 * 3 * 2 * 2
