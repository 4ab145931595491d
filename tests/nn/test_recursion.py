"""The recursion against a loop written out: schedules, gradients, memory, random numbers."""

import pytest
import torch
from torch import Tensor, nn

from trm_fast import use_backend
from trm_fast.nn import Blocks, Recursion, VectorNet

from ..conftest import skip_unless_usable
from .checks import DOUBLE, mixing

LENGTHS = (1, 7, 81, 97)


class Own(nn.Module):
    """A user's network of two inputs, without anything that the engine knows."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.layer = nn.Linear(width, width).double()

    def forward(self, state: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.layer(state + injection))


class OwnZ(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.layer = nn.Linear(3 * width, width).double()

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.cat((x, y, z), -1)))


class OwnY(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.layer = nn.Linear(2 * width, width).double()

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.cat((y, z), -1)))


def states(*shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]


def written_out(
    net_z, net_y, x, y, z, n, T, grad_cycles=1, every=False, scale=None, detach=False
) -> tuple[Tensor, Tensor]:
    for level in range(T):
        s = None if scale is None else scale[level]
        if level < T - grad_cycles or detach:
            y, z = y.detach(), z.detach()
        for step in range(n):
            new = net_z(x, y, z)
            z = new if s is None else z + s * new
            if every or step == n - 1:
                new = net_y(y, z)
                y = new if s is None else y + s * new
        if level < T - grad_cycles:
            y, z = y.detach(), z.detach()
    return y, z


def gradients(out: tuple[Tensor, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    loss = sum((k + 1) * (part * part.cos()).sum() for k, part in enumerate(out))
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in pairs]


def close(found: list[Tensor], truth: list[Tensor], steps: int) -> None:
    # Each step rounds about ten times; later ones of these contracting networks enlarge nothing,
    # and the gradients of the weights add up as many terms.
    for one, other in zip(found, truth, strict=True):
        bound = 10 * steps * steps * DOUBLE * max(other.abs().max().item(), 1.0)
        assert (one - other).abs().max() <= bound


@pytest.mark.parametrize("options", [
    {},
    {"grad_cycles": 0},
    {"grad_cycles": 2},
    {"grad_cycles": 3},
    {"grad_cycles": 3, "detach": True},
    {"grad_cycles": 2, "every": True},
    {"grad_cycles": 3, "scale": [0.5, 0.25, 2.0]},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("nets", [1, 2])
def test_any_network_runs_as_written_out(options, recompute, nets):
    torch.manual_seed(0)
    x, y, z = states(2, 3, 8)
    own = {
        "grad_cycles": options.get("grad_cycles", 1),
        "y_every_step": options.get("every", False),
        "step_scale": options.get("scale"),
        "detach": options.get("detach", False),
        "recompute": recompute,
    }
    if nets == 1:
        net = Own()
        recursion = Recursion(net, 2, 3, **own)
        found = recursion(x, y, z)
        truth = written_out(
            lambda x, y, z: net(z, y + x), lambda y, z: net(y, z), x, y, z, 2, 3, **options
        )
    else:
        net, net_y = OwnZ(), OwnY()
        recursion = Recursion(net, 2, 3, net_y=net_y, **own)
        found = recursion(x, y, z)
        truth = written_out(net, net_y, x, y, z, 2, 3, **options)
    close([*found], [*truth], 9)
    leaves = [x, y, z, *recursion.parameters()]
    close(gradients(found, leaves), gradients(truth, leaves), 9)


def test_a_network_may_say_its_updates_itself():
    torch.manual_seed(0)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.of_z, self.of_y = OwnZ(), OwnY()

        def inject(self, x, y):
            return x, y

        def update_z(self, z, injection, level):
            return self.of_z(*injection, z)

        def update_y(self, y, z, level):
            return self.of_y(y, z)

    net, (x, y, z) = Pair(), states(2, 8)
    found = Recursion(net, 2, 3)(x, y, z)
    close([*found], [*written_out(net.of_z, net.of_y, x, y, z, 2, 3)], 9)


def test_the_scale_may_be_a_function_or_be_trained():
    torch.manual_seed(0)
    net, (x, y, z) = Own(), states(2, 8)
    scale = nn.Parameter(torch.tensor([0.5, 0.25], dtype=torch.float64))
    trained = Recursion(net, 2, 2, step_scale=scale, grad_cycles=2)
    called = Recursion(net, 2, 2, step_scale=lambda level: 0.5 / (level + 1), grad_cycles=2)
    assert "step_scale" in dict(trained.named_parameters())
    found = trained(x, y, z)
    close([*found], [*called(x, y, z)], 6)
    assert all(grad.abs().min() > 0 for grad in gradients(found, [scale]))


@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_run_as_written_out(mixer, length, batch):
    torch.manual_seed(0)
    net = Blocks(16, 2, **mixing(mixer, length)).double()
    x, y, z = states(batch, length, 16)
    recursion = Recursion(net, 2, 2)
    found = recursion(x, y, z)
    truth = written_out(lambda x, y, z: net(z, y + x), lambda y, z: net(y, z), x, y, z, 2, 2)
    leaves = [x, *net.parameters()]
    pairs = [*zip(found, truth, strict=True)]
    pairs += zip(gradients(found, leaves), gradients(truth, leaves), strict=True)
    # Six calls of two layers with some 50 roundings each; sums over tokens add as many terms, and
    # norms of small vectors, of which there are many, enlarge a difference by some ten times.
    bound = 6 * 2 * 50 * 10 * DOUBLE * max(length, 10) ** 0.5
    for one, other in pairs:
        assert (one - other).abs().max() <= bound * other.abs().max()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
def test_the_fused_recursion_is_that_of_the_layers(backend, mixer):
    skip_unless_usable(backend)
    torch.manual_seed(0)
    net = Blocks(32, 2, **mixing(mixer, 9))
    wide = Blocks(32, 2, **mixing(mixer, 9)).double()
    wide.load_state_dict(net.state_dict())
    given = states(2, 9, 32)
    found, errors = {}, {}
    for name, taps in {"fused": None, "layers": []}.items():
        x, y, z = (state.detach().float().requires_grad_() for state in given)
        with use_backend(backend if taps is None else "reference"):
            out = Recursion(net, 2, 2, taps=taps)(x, y, z)
            found[name] = [*out, *gradients(out, [x, *net.parameters()])]
    out = Recursion(wide, 2, 2, taps=[])(*given)
    truth = [*out, *gradients(out, [given[0], *wide.parameters()])]
    for name, values in found.items():
        pairs = zip(values, truth, strict=True)
        errors[name] = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    single = torch.finfo(torch.float32).eps
    for fused, layers in zip(errors["fused"], errors["layers"], strict=True):
        assert fused <= 3 * layers + single


@pytest.mark.parametrize("grad_cycles", [1, 2])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_recomputed_gradients_are_equal_to_the_bit(norm, grad_cycles):
    torch.manual_seed(0)
    net = Blocks(16, 2, heads=2, norm=norm).double()
    x, y, z = states(2, 7, 16)
    leaves = [x, *net.parameters()]
    results = []
    for recompute in (False, True):
        out = Recursion(net, 3, 2, grad_cycles=grad_cycles, recompute=recompute)(x, y, z)
        results.append([*out, *gradients(out, leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
@pytest.mark.parametrize("grad_cycles", [0, 1])
def test_cycles_without_gradients_pass_none_on(grad_cycles, mixer, backend):
    skip_unless_usable(backend)
    net = Blocks(32, 2, **mixing(mixer, 9)).requires_grad_(False)
    x, y, z = (state.detach().float() for state in states(2, 9, 32))
    with use_backend(backend):
        recursion = Recursion(net, 2, 2, grad_cycles=grad_cycles)
        out = recursion(x, y.requires_grad_(), z.requires_grad_())
        assert not any(state.requires_grad for state in out)
        every = Recursion(net, 2, 2, grad_cycles=2)(x, y, z)
    assert all(grad.abs().max() > 0 for grad in gradients(every, [y, z]))


def saved_bytes(run) -> int:
    """Bytes of the distinct memory that is kept for the backward pass."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()  # alive, so that no address is used twice
    del out
    return sum(kept.values())


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
def test_recomputation_keeps_the_inputs_of_the_calls_only(backend, mixer):
    skip_unless_usable(backend)
    torch.manual_seed(0)
    n, net = 6, Blocks(32, 2, **mixing(mixer, 97))
    x, y, z = (torch.randn(4, 97, 32) for _ in range(3))
    with use_backend(backend):
        kept = {
            recompute: saved_bytes(lambda r=recompute: Recursion(net, n, 2, recompute=r)(x, y, z))
            for recompute in (False, True)
        }
    state = x.numel() * x.element_size()
    weights = sum(weight.numel() * weight.element_size() for weight in net.parameters())
    # The fused form keeps the inputs of 2 layers for each of the n + 1 calls, and one scale for
    # each token; the loop of the reference keeps those of the calls.
    assert kept[True] <= (2 * (n + 1) + 4) * state * 1.1 + weights
    assert kept[False] > 4 * (kept[True] - weights)


def test_recomputation_serves_any_network():
    net, (x, y, z) = Own(256), states(64, 256)
    kept = {
        recompute: saved_bytes(lambda r=recompute: Recursion(net, 6, 1, recompute=r)(x, y, z))
        for recompute in (False, True)
    }
    # Of each call the input and the injection or a state, instead of sum and tanh besides them.
    assert 0 < kept[True] <= (7 + 3) * x.nbytes < kept[False]


def test_dropout_is_the_same_in_the_recomputation():
    net = Blocks(16, 2, heads=2, norm="pre", dropout=0.5).double()
    x, y, z = states(2, 7, 16)
    leaves, results = [x, *net.parameters()], []
    for recompute in (False, True):
        torch.manual_seed(5)
        out = Recursion(net, 3, 2, recompute=recompute)(x, y, z)
        results.append([*out, *gradients(out, leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    torch.manual_seed(6)
    assert not torch.equal(Recursion(net, 3, 2)(x, y, z)[0], results[0][0])


def test_functional_dropout_in_a_users_network_is_the_same_too():
    class Dropping(Own):
        def forward(self, state, injection):
            return torch.nn.functional.dropout(super().forward(state, injection), 0.5)

    net, (x, y, z) = Dropping(), states(4, 8)
    results = []
    for recompute in (False, True):
        torch.manual_seed(5)
        out = Recursion(net, 3, 2, recompute=recompute)(x, y, z)
        results.append(gradients(out, [x, *net.parameters()]))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_taps_see_the_states_of_each_cycle():
    net, (x, y, z) = Blocks(16, heads=2).double(), states(2, 5, 16)
    seen, listed = [], []
    Recursion(net, 2, 3, taps=lambda level, y, z: seen.append((level, y, z)))(x, y, z)
    recursion = Recursion(net, 2, 3, taps=listed)
    out = recursion(x, y, z)
    recursion(x, y, z)
    assert [level for level, *_ in seen] == [0, 1, 2]
    assert len(listed) == 3
    for level in range(3):
        shorter = Recursion(net, 2, level + 1, taps=[])(x, y, z)
        for one, two, three in zip(shorter, seen[level][1:], listed[level], strict=True):
            assert torch.equal(one, two) and torch.equal(one, three)
    assert torch.equal(listed[-1][0], out[0])


def test_padding_reaches_every_call():
    net, (x, y, z) = Blocks(16, heads=2).double(), states(2, 5, 16)
    padding = torch.ones(2, 5, dtype=torch.bool)
    padding[:, 3:] = False
    long = Recursion(net, 2, 2)(x, y, z, padding=padding)
    short = Recursion(net, 2, 2)(x[:, :3], y[:, :3], z[:, :3])
    for one, other in zip(long, short, strict=True):
        # Six calls of two layers, some 50 roundings each, enlarged by small norms.
        assert (one[:, :3] - other).abs().max() <= 6 * 2 * 50 * 10 * DOUBLE
    assert not torch.equal(Recursion(net, 2, 2)(x, y, z)[0][:, :3], long[0][:, :3])


class Fused(Own):
    """Counts what it is asked for."""

    fused_options = ("y_every_step",)

    def __init__(self):
        super().__init__()
        self.asked = []

    def fused_recursion(self, x, y, z, **options):
        self.asked.append(options)
        return y, z


def test_a_fused_network_is_asked_for_what_it_can():
    net, (x, y, z) = Fused(), states(2, 8)
    counts = {"n": 2, "T": 3, "grad_cycles": 1, "recompute": True}
    assert Recursion(net, 2, 3)(x, y, z) == (y, z)
    assert Recursion(net, 2, 3, y_every_step=True)(x, y, z) == (y, z)
    assert net.asked == [counts, {**counts, "y_every_step": True}]
    for options in ({"taps": []}, {"detach": True}, {"step_scale": [1, 1, 1]}, {"net_y": Own()}):
        net_y = options.pop("net_y", None)
        recursion = Recursion(net if net_y is None else OwnFusedZ(), 2, 3, net_y=net_y, **options)
        assert recursion(x, y, z)[0] is not y
    assert len(net.asked) == 2


class OwnFusedZ(OwnZ):
    def fused_recursion(self, *_, **__):
        raise AssertionError("two networks are not one op")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept_and_nothing_differs(context):
    net, (x, y, z) = Blocks(16, heads=2).double(), states(2, 5, 16)
    expected = Recursion(net, 2, 2)(x, y, z)
    with context():
        found = Recursion(net, 2, 2)(x, y, z)
        assert saved_bytes(lambda: Recursion(net, 2, 2)(x, y, z)) == 0
    assert not found[0].requires_grad
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # What inference mode has looked up must still serve a backward pass.
    assert all(torch.isfinite(grad).all() for grad in gradients(Recursion(net)(x, y, z), [x]))


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_decides_the_dtype(fused):
    torch.manual_seed(0)
    net = Blocks(32, heads=2)
    x, y, z = (torch.randn(2, 5, 32) for _ in range(3))
    recursion = Recursion(net, 2, 2, taps=None if fused else [])
    exact = recursion(x, y, z)
    with torch.autocast("cpu", torch.bfloat16):
        out = recursion(x, y, z)
        sum(state.float().sum() for state in out).backward()
    assert {state.dtype for state in out} == {torch.bfloat16}
    assert {weight.grad.dtype for weight in net.parameters()} == {torch.float32}
    # Six calls of two layers with six roundings each, which add up like random ones.
    bound = 4 * (6 * 2 * 6) ** 0.5 * torch.finfo(torch.bfloat16).eps
    for low, high in zip(out, exact, strict=True):
        assert (low - high).square().mean().sqrt() <= bound * high.square().mean().sqrt()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "Recursion: n must be a whole number >= 1; got 0"),
        ({"T": -1}, "Recursion: T must be a whole number >= 1; got -1"),
        ({"n": 1.5}, "Recursion: n must be a whole number >= 1; got 1.5"),
        (
            {"T": 2, "grad_cycles": 3},
            "Recursion: grad_cycles must be a whole number from 0 to T=2; got 3",
        ),
        (
            {"grad_cycles": -1},
            "Recursion: grad_cycles must be a whole number from 0 to T=3; got -1",
        ),
        ({"step_scale": [1.0]}, "Recursion: step_scale must have T=3 numbers; got 1"),
    ],
)
def test_wrong_counts_are_named(options, message):
    with pytest.raises(ValueError) as error:
        Recursion(Own(), **options)
    assert str(error.value) == message


@pytest.mark.parametrize("scale", [0.5, "1.0", {1.0, 2.0, 3.0}])
def test_a_scale_that_is_no_sequence_is_named(scale):
    wanted = "Recursion: step_scale must be a sequence of numbers, a function of the level or None"
    with pytest.raises(TypeError) as error:
        Recursion(Own(), step_scale=scale)
    assert str(error.value) == f"{wanted}; got {scale!r}"


@pytest.mark.parametrize("kind", ["own", "two networks", "blocks", "vectors", "op of vectors"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_may_have_counts_of_its_own(kind, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    options = {"step_scale": lambda level: 1 / (level + 1)}
    if kind == "own":
        net, shape = Own(), (2, 8)
    elif kind == "two networks":
        net, shape, options["net_y"] = OwnZ(), (2, 8), OwnY()
    elif kind == "blocks":
        net, shape, options = Blocks(32, 1, heads=2), (2, 5, 32), {}
    else:
        net, shape = VectorNet(32), (2, 32)
        options |= {"taps": []} if kind == "vectors" else {}
    given = states(*shape)
    if kind not in ("own", "two networks"):
        given = [state.detach().float().requires_grad_() for state in given]
    leaves = [given[0], *net.parameters()]
    recursion = Recursion(net, 2, 1, **options)
    # One step of the loop is traced as it stands, without the fusions of a real compiler.
    run = torch.compile(recursion, backend="eager", fullgraph=True) if compiled else recursion
    for n, T, grad_cycles in ((1, 3, 2), (3, 2, 1), (2, 1, 0)):
        counts = {"n": n, "T": T, "grad_cycles": grad_cycles}
        found = run(*given, **counts)
        fixed = Recursion(net, **counts, **options)(*given)
        assert all(map(torch.equal, found, fixed))
        assert all(map(torch.equal, gradients(found, leaves), gradients(fixed, leaves)))
    assert (recursion.n, recursion.T, recursion.grad_cycles) == (2, 1, 1)
    assert all(map(torch.equal, run(*given), Recursion(net, 2, 1, **options)(*given)))


def test_a_call_may_have_a_scale_of_its_own():
    net, given = VectorNet(32), [state.detach().float() for state in states(2, 32)]
    recursion = Recursion(net, 2, 3, step_scale=[1.0, 0.5, 0.25])
    found = recursion(*given, T=2, step_scale=[0.3, 0.1])
    fixed = Recursion(net, 2, 2, step_scale=[0.3, 0.1])(*given)
    assert all(map(torch.equal, found, fixed))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"n": 0}, "Recursion: n must be a whole number >= 1; got 0"),
        ({"n": True}, "Recursion: n must be a whole number >= 1; got True"),
        ({"T": 1.0}, "Recursion: T must be a whole number >= 1; got 1.0"),
        ({"T": 1}, "Recursion: grad_cycles must be a whole number from 0 to T=1; got 2"),
        ({"grad_cycles": 4}, "Recursion: grad_cycles must be a whole number from 0 to T=3; got 4"),
        ({"T": 4}, "Recursion: step_scale must have T=4 numbers; got 3"),
        ({"step_scale": [1.0]}, "Recursion: step_scale must have T=3 numbers; got 1"),
    ],
)
def test_wrong_counts_of_a_call_are_named(counts, message, fused):
    net = VectorNet(32) if fused else Own(32)
    recursion = Recursion(net, 2, 3, grad_cycles=2, step_scale=[1.0, 0.5, 0.25])
    with pytest.raises(ValueError) as error:
        recursion(*states(2, 32), **counts)
    assert str(error.value) == message
