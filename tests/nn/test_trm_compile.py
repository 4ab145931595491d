"""The training step under torch.compile, and as a CUDA graph that nothing waits in."""

import pytest
import torch
from torch import Tensor, nn

from trm_fast import _native, use_backend
from trm_fast._dispatch import OPS
from trm_fast.nn import Blocks, Recursion, TinyRecursiveModel
from trm_fast.optim import SparseSignSGD

from ..conftest import skip_unless_usable
from .checks import DOUBLE, SINGLE, batch_of, make, small


def train(model: TinyRecursiveModel, compiler: str | None) -> list[Tensor]:
    """Losses, gradients and states of three steps, in which slots halt and are filled again."""

    def step(carry, batch):
        carry, outputs = model(carry, batch)
        return carry, model.loss(carry, outputs)

    run = step if compiler is None else torch.compile(step, backend=compiler, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = SparseSignSGD([model.puzzles.table], lr=1e-2)
    carry, found = None, []
    for number in range(3):
        batch = batch_of(model.config, seed=number)
        carry = model.initial_carry(batch) if carry is None else carry
        carry, loss = run(carry, batch)
        loss.loss.backward()
        found += [loss.loss.detach(), carry.y, carry.z, *loss.metrics.values()]
        found += [parameter.grad.clone() for parameter in model.parameters()]
        found.append(model.puzzles.table.grad.to_dense())
        for each in (optimizer, rows):
            each.step()
            each.zero_grad()
    return found


@pytest.mark.parametrize(
    "backend", [pytest.param("reference", marks=pytest.mark.long), "cpp", None]
)
@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
def test_a_step_is_one_graph(mixer, backend):
    skip_unless_usable(backend or "reference")
    torch._dynamo.reset()
    config = small(mixer, "float32", halt_max_steps=2, halt_exploration_prob=0.0)
    with use_backend(backend):
        eager, traced = train(make(config), None), train(make(config), "aot_eager")
    for one, other in zip(traced, eager, strict=True):
        # Traced operators are the same ones but for fused multiply-adds and the order of sums: 36
        # layers in the last step, of which the norms keep errors from growing.
        bound = 36 * 20 * SINGLE * max(other.abs().max().item(), 1e-3)
        assert one.shape == other.shape and (one - other).abs().max() <= bound


def test_the_next_steps_are_no_new_graphs():
    torch._dynamo.reset()
    config = small(dtype="float32", L_layers=1, H_cycles=1)
    model, graphs = make(config), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda carry, batch: model(carry, batch), backend=count, fullgraph=True)
    carry = model.initial_carry(batch_of(config))
    with use_backend("reference"):
        for number in range(4):
            carry, _ = step(carry, batch_of(config, seed=number))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_the_first_call_of_a_process_may_be_a_compiled_one(backend):
    """What opens libraries and chooses implementations is no part of the graph."""
    skip_unless_usable(backend)
    torch._dynamo.reset()
    _native.unusable.cache_clear()
    recursion, given = Recursion(Blocks(32, heads=2), 1, 1), torch.randn(3, 2, 5, 32).unbind()
    with use_backend(backend):
        found = torch.compile(recursion, backend="aot_eager", fullgraph=True)(*given)
        assert {choice.backend for choice in OPS["latent_update"].choices.values()} == {backend}
        expected = recursion(*given)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 4 * 20 * SINGLE * other.abs().max()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_states_and_layers_may_be_the_same_tensors(backend):
    skip_unless_usable(backend)
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, x = Blocks(32, heads=2), torch.randn(2, 5, 32)
    net.blocks[1] = net.blocks[0]
    recursion, zeros = Recursion(net, 1, 1), torch.zeros(2, 5, 32)
    results = []
    with use_backend(backend):
        for run in (recursion, torch.compile(recursion, backend="aot_eager", fullgraph=True)):
            y, z = run(x, zeros, zeros)
            results.append([y, z, *torch.autograd.grad((y * z).sum(), [*net.parameters()])])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 4 * 20 * SINGLE * other.abs().max()


def test_exploration_takes_part_in_the_graph():
    torch._dynamo.reset()
    config = small(dtype="float32", halt_exploration_prob=1.0, L_layers=1, H_cycles=1)
    model, batch = make(config), batch_of(config, 4)
    with torch.no_grad():
        model.q_head.bias.fill_(100)  # all want to halt at once, and none may
    step = torch.compile(
        lambda carry, batch: model(carry, batch), backend="aot_eager", fullgraph=True
    )
    with use_backend("reference"):
        carry, _ = step(model.initial_carry(batch), batch)
    assert not carry.halted.any()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_users_network_is_one_graph(recompute):
    torch._dynamo.reset()

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8).double()

        def forward(self, state, injection):
            return torch.tanh(self.layer(state + injection))

    torch.manual_seed(0)
    recursion, x = Recursion(Own(), 2, 2, recompute=recompute), torch.randn(3, 8).double()
    results = []
    for run in (recursion, torch.compile(recursion, backend="aot_eager", fullgraph=True)):
        y, z = run(x, torch.zeros_like(x), torch.zeros_like(x))
        grads = torch.autograd.grad((y * z).sum(), [*recursion.parameters()])
        results.append([y, z, *grads])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 6 * 10 * DOUBLE * other.abs().max()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_nothing_waits_for_the_gpu():
    config = small(dtype="float32")
    model = make(config).cuda()
    batches = [{k: v.cuda() for k, v in batch_of(config, seed=n).items()} for n in range(4)]
    carry = model.initial_carry(batches[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = SparseSignSGD([model.puzzles.table], lr=1e-2)
    for number, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            carry, outputs = model(carry, batch)
            model.loss(carry, outputs).loss.backward()
            for each in (optimizer, rows):
                each.step()
                each.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_whole_step_is_a_cuda_graph():
    config = small(dtype="float32", halt_max_steps=2, halt_exploration_prob=0.0)
    batches = [{k: v.cuda() for k, v in batch_of(config, seed=n).items()} for n in range(6)]
    models = [make(config).cuda() for _ in range(2)]
    eager, losses = list(run_eager(models[0], batches)), []
    model, static = models[1], {k: v.clone() for k, v in batches[0].items()}
    optimizer, rows = optimizers(model)
    carry = model.initial_carry(static)
    parts = (carry.y, carry.z, carry.steps, carry.halted, *carry.data.values())
    kept = [part.clone() for part in parts]
    held = carry._replace(
        y=kept[0], z=kept[1], steps=kept[2], halted=kept[3],
        data=dict(zip(carry.data, kept[4:], strict=True)),
    )  # fmt: skip

    def step() -> Tensor:
        new, outputs = model(held, static)
        loss = model.loss(new, outputs).loss
        loss.backward()
        for each in (optimizer, rows):
            each.step()
            each.zero_grad()
        torch._foreach_copy_(kept, [new.y, new.z, new.steps, new.halted, *new.data.values()])
        return loss.detach()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for batch in batches[:3]:
            for key, value in batch.items():
                static[key].copy_(value)
            losses.append(step().item())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for batch in batches[3:]:
        for key, value in batch.items():
            static[key].copy_(value)
        graph.replay()
        losses.append(loss.item())
    for one, other in zip(losses, eager, strict=True):
        assert abs(one - other) <= 36 * 20 * SINGLE * abs(other)


def optimizers(model: TinyRecursiveModel) -> tuple[torch.optim.Optimizer, SparseSignSGD]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    return optimizer, SparseSignSGD([model.puzzles.table], lr=1e-3)


def run_eager(model: TinyRecursiveModel, batches: list[dict[str, Tensor]]):
    optimizer, rows = optimizers(model)
    carry = model.initial_carry(batches[0])
    for batch in batches:
        carry, outputs = model(carry, batch)
        loss = model.loss(carry, outputs).loss
        loss.backward()
        for each in (optimizer, rows):
            each.step()
            each.zero_grad()
        yield loss.item()


def test_a_frozen_network_compiles_where_gradients_are_on():
    """The compiler stops at a recomputation that no gradient asks for."""
    torch._dynamo.reset()
    recursion = Recursion(Blocks(32, heads=2, norm="pre"), n=1, T=2)
    recursion.requires_grad_(False)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = recursion(x, x, x)
    found = torch.compile(recursion, fullgraph=True, backend="aot_eager")(x, x, x)
    # Eight sublayers, whose fused norms may differ by two roundings each, of values below 16.
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * 2 * 16 * 2.0**-24)
