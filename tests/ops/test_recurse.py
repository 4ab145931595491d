"""The loop that every recursive model runs, with cells that tell what they were called with."""

import pytest
import torch
from torch import Tensor

from trm_fast.ops._recurse import recurse

X, Y, Z = 10.0, 1.0, 2.0


class Recorder:
    """Writes down each call; states are sums, so that they say where they came from."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def inject(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls.append(("inject", y.item(), torch.is_grad_enabled()))
        return x + y

    def update_z(self, z: Tensor, injection: Tensor, level: int) -> Tensor:
        self.calls.append(("z", level, torch.is_grad_enabled()))
        return 0.5 * z + 0.25 * injection

    def update_y(self, y: Tensor, z: Tensor, level: int) -> Tensor:
        self.calls.append(("y", level, torch.is_grad_enabled()))
        return 0.5 * y + 0.125 * z


def start(**requires: bool) -> list[Tensor]:
    return [
        torch.tensor(value, dtype=torch.float64, requires_grad=requires.get(name, True))
        for name, value in (("x", X), ("y", Y), ("z", Z))
    ]


def by_hand(
    x: Tensor, y: Tensor, z: Tensor, n: int, T: int, every: bool = False
) -> tuple[Tensor, Tensor]:
    for _ in range(T):
        injection = x + y
        for _ in range(n):
            z = 0.5 * z + 0.25 * injection
            if every:
                y = 0.5 * y + 0.125 * z
                injection = x + y
        if not every:
            y = 0.5 * y + 0.125 * z
    return y, z


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("n", "T"), [(1, 1), (1, 3), (3, 2), (6, 1)])
@pytest.mark.parametrize("every", [True, False])
def test_the_states_are_those_of_the_formula(n, T, every, recompute):
    given = start()
    options = {"n": n, "T": T, "grad_cycles": T, "y_every_step": every, "recompute": recompute}
    found = recurse(Recorder(), *given, **options)
    expected = by_hand(*given, n, T, every)
    grads = [torch.autograd.grad(sum(pair), given) for pair in (found, expected)]
    assert found == expected and grads[0] == grads[1]


@pytest.mark.parametrize("every", [True, False])
def test_the_order_of_calls(every):
    cell = Recorder()
    recurse(cell, *start(), n=2, T=2, y_every_step=every, recompute=False)
    kinds = [call[0] for call in cell.calls]
    cycle = ["inject", "z", "y", "inject", "z", "y"] if every else ["inject", "z", "z", "y"]
    assert kinds == cycle * 2
    levels = [call[1] for call in cell.calls if call[0] != "inject"]
    assert levels == sorted(levels) and set(levels) == {0, 1}


@pytest.mark.parametrize("grad_cycles", [0, 1, 2, 3])
def test_only_the_last_cycles_carry_gradients(grad_cycles):
    cell = Recorder()
    given = start()
    y, z = recurse(cell, *given, n=1, T=3, grad_cycles=grad_cycles, recompute=False)
    enabled = [call[2] for call in cell.calls]
    assert enabled == [False] * 3 * (3 - grad_cycles) + [True] * 3 * grad_cycles
    assert torch.is_grad_enabled()
    assert y.requires_grad == z.requires_grad == (grad_cycles > 0)
    plain = by_hand(*(tensor.detach() for tensor in given), 1, 3 - grad_cycles)
    held = [given[0], *plain] if grad_cycles < 3 else given
    expected = by_hand(*held, 1, grad_cycles)
    assert (y, z) == expected
    if grad_cycles:
        found, wanted = (
            torch.autograd.grad(sum(pair), given, allow_unused=True) for pair in ((y, z), expected)
        )
        assert found == wanted
        assert (found[1] is None) == (grad_cycles < 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_no_cycle_turns_them_on(mode):
    cell = Recorder()
    with mode():
        y, z = recurse(cell, *start(), n=2, T=2, grad_cycles=2)
        assert not torch.is_grad_enabled()
    assert not any(call[2] for call in cell.calls)
    assert not y.requires_grad and not z.requires_grad
    expected = by_hand(*start(), 2, 2)
    assert y.item() == expected[0].item() and z.item() == expected[1].item()


@pytest.mark.parametrize("recompute", [True, False])
def test_detached_cycles_give_the_gradient_of_the_last_alone(recompute):
    given = start()
    options = {"n": 2, "T": 3, "grad_cycles": 3, "recompute": recompute}
    y, z = recurse(Recorder(), *given, **options, detach=True)
    before = by_hand(*(tensor.detach() for tensor in given), 2, 2)
    expected = by_hand(given[0], *before, 2, 1)
    assert (y, z) == expected
    found = torch.autograd.grad(y + z, given, allow_unused=True)
    assert found[0] == torch.autograd.grad(sum(expected), given[0])[0]
    assert found[1] is None and found[2] is None


def test_a_tap_sees_each_cycle_and_its_gradients():
    seen = []
    given = start()

    def tap(level: int, y: Tensor, z: Tensor) -> None:
        seen.append((level, y, z, torch.is_grad_enabled()))

    out = recurse(Recorder(), *given, n=2, T=3, grad_cycles=2, tap=tap)
    assert [entry[0] for entry in seen] == [0, 1, 2]
    assert [entry[1].requires_grad for entry in seen] == [False, True, True]
    assert seen[-1][1] is out[0] and seen[-1][2] is out[1]
    assert all(entry[3] for entry in seen)  # what a tap computes may have gradients of its own
    for level, y, z, _ in seen:
        assert (y, z) == by_hand(*given, 2, level + 1)


def test_taps_of_detached_cycles_train_each_cycle():
    """Deep supervision within one call: each loss goes back through its own cycle."""
    given, losses = start(), []
    recurse(
        Recorder(), *given, n=1, T=3, grad_cycles=3, detach=True,
        tap=lambda level, y, z: losses.append(y),
    )  # fmt: skip
    (found,) = torch.autograd.grad(sum(losses), given[:1])
    # y = 0.5 y0 + 0.125 (0.5 z0 + 0.25 (x + y0)) in each cycle
    assert found.item() == 3 * 0.125 * 0.25


class Net(torch.nn.Module):
    """A cell with dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.linear, self.drop = torch.nn.Linear(8, 8, dtype=torch.float64), torch.nn.Dropout(p)

    def inject(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def update_z(self, z: Tensor, injection: Tensor, level: int) -> Tensor:
        return self(z + injection)

    def update_y(self, y: Tensor, z: Tensor, level: int) -> Tensor:
        return self(y + z)

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.drop(self.linear(h)))


def trained(p: float, **options) -> tuple[list[Tensor], int, Tensor]:
    """Returns states and gradients, the calls of the network, and a draw after all of it."""
    torch.manual_seed(0)
    net, calls = Net(p), []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    x, y, z = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = recurse(net, x, y, z, n=2, T=2, grad_cycles=2, **options)
    grads = torch.autograd.grad(sum(t.square().sum() for t in out), [x, y, z, *net.parameters()])
    return [*out, *grads], len(calls), torch.rand(3)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_is_computed_again_has_the_same_bits(p, every):
    again, calls, draw = trained(p, recompute=True, y_every_step=every)
    kept, fewer, other = trained(p, recompute=False, y_every_step=every)
    assert all(map(torch.equal, again, kept))
    assert calls == 2 * fewer == 2 * 2 * (4 if every else 3)
    assert torch.equal(draw, other)  # the generator goes on as if nothing were computed again


def test_without_the_state_of_the_generator_dropout_differs():
    """The option does something: without it, the second computation draws anew."""
    again, *_ = trained(0.5, recompute=True, preserve_rng_state=False)
    kept, *_ = trained(0.5, recompute=False)
    assert torch.equal(again[0], kept[0]) and not torch.equal(again[2], kept[2])
    assert all(map(torch.equal, *(trained(0.0, recompute=r, preserve_rng_state=False)[0]
                                  for r in (True, False))))  # fmt: skip


def kept_tensors(recompute: bool, n: int, T: int, grad_cycles: int) -> int:
    """How many storages autograd keeps, beside parameters and the leaves."""
    net = Net(0.0)
    given = [torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    own = {t.untyped_storage().data_ptr() for t in (*given, *net.parameters())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel():  # older versions of torch's checkpoint keep an empty one
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = recurse(net, *given, n=n, T=T, grad_cycles=grad_cycles, recompute=recompute)
        assert out[0].requires_grad
    return len(kept.keys() - own)


def test_recomputing_keeps_the_inputs_of_updates_alone():
    """Of a cycle: n injected ones are one, n + 1 of z and one of y."""
    for n, T, cycles in ((1, 2, 1), (3, 2, 1), (3, 5, 1)):
        assert kept_tensors(True, n, T, cycles) == n + 3
    # Of the second of two cycles y and z are those at the end of the first, z of which is kept.
    assert kept_tensors(True, 3, 3, 2) == 2 * (3 + 3) - 1
    assert kept_tensors(False, 3, 2, 1) > 3 + 3


def test_a_failing_cell_leaves_gradients_on():
    class Failing(Recorder):
        def update_z(self, z: Tensor, injection: Tensor, level: int) -> Tensor:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        recurse(Failing(), *start(), n=1, T=2)
    assert torch.is_grad_enabled()


def test_injections_may_be_anything():
    """Also what no tensor holds, such as several tensors."""

    class Pair(Recorder):
        def inject(self, x: Tensor, y: Tensor):
            return {"x": x, "y": y}

        def update_z(self, z: Tensor, injection, level: int) -> Tensor:
            return 0.5 * z + 0.25 * (injection["x"] + injection["y"])

    given = start()
    options = {"n": 2, "T": 2, "grad_cycles": 2}
    found, expected = recurse(Pair(), *given, **options), by_hand(*given, 2, 2)
    assert found == expected
    grads = [torch.autograd.grad(sum(pair), given) for pair in (found, expected)]
    assert grads[0] == grads[1]


def test_compiled_equals_eager():
    torch._dynamo.reset()
    net = Net(0.0)
    given = [torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return recurse(net, x, y, z, n=2, T=3, grad_cycles=2)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*given), call(*given), strict=True):
        torch.testing.assert_close(found, expected)
    leaves = [given[0], *net.parameters()]
    grads = [torch.autograd.grad(f(*given)[0].sum(), leaves) for f in (compiled, call)]
    torch.testing.assert_close(*grads)
    torch._dynamo.reset()
