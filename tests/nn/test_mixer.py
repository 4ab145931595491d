"""Own mixers in blocks and recursions, the list of those with a name, and what is refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad

import trm_fast
from trm_fast._dispatch import OPS
from trm_fast.nn import Attention, Block, Blocks, Mixer, Recursion, TokenMixer, named_mixer
from trm_fast.nn.mixer import MIXERS

from .checks import DOUBLE, SINGLE, mixing


class GatedConv(Mixer):
    """Each token sees itself and the ones before it."""

    def __init__(self, width: int, kernel: int = 3):
        super().__init__()
        self.kernel, self.gate = kernel, nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, kernel, groups=width)

    def forward(self, h: Tensor) -> Tensor:
        past = pad(h.transpose(1, 2), (self.kernel - 1, 0))
        return self.gate(h).sigmoid() * self.conv(past).transpose(1, 2)


class Shift(nn.Module):
    """A module of someone else, which knows nothing of blocks."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, h: Tensor) -> Tensor:
        return h.roll(1, dims=1)


class OverTokens(Mixer):
    """A product over the tokens, with the post-norm over them too."""

    post_norm_axis = -2

    def __init__(self, width: int, length: int):
        super().__init__()
        self.length, self.weight = length, nn.Parameter(torch.randn(length, length))

    def forward(self, h: Tensor) -> Tensor:
        return self.weight @ h


class Masked(Mixer):
    """The mean over the real tokens."""

    takes_padding = True

    def forward(self, h: Tensor, padding: Tensor | None = None) -> Tensor:
        if padding is None:
            return h.mean(1, keepdim=True).expand_as(h)
        real = padding[..., None].to(h.dtype)
        return ((h * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)).expand_as(h)


class Dropping(Mixer):
    def forward(self, h: Tensor) -> Tensor:
        return dropout(h, 0.5)


class Doubled(Attention):
    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, padding)


NORMS = ("post", "pre")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(h: Tensor, dim: int = -1) -> Tensor:
    return h / (h.square().mean(dim, keepdim=True) + 1e-5).sqrt()


def written_out(block: Block, h: Tensor, axis: int = -1) -> Tensor:
    if block.norm == "post":
        h = rms(h + block.mix(h), axis)
        return rms(h + block.mlp(h))
    h = h + block.mix(rms(h))
    return h + block.mlp(rms(h))


def close(found: Tensor, truth: Tensor, layers: int, eps: float = DOUBLE) -> None:
    # Fewer than 20 roundings in a layer, with sums of up to 256 products, enlarged by a few norms.
    assert (found - truth).abs().max() <= layers * 20 * 16 * 4 * eps * truth.abs().max()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("mixer", "options", "axis"),
    [(GatedConv, {"kernel": 2}, -1), (Shift, {}, -1), (OverTokens, {"length": 7}, -2)],
)
def test_a_block_of_an_own_mixer_is_its_formula(mixer, options, axis, norm):
    torch.manual_seed(0)
    block, h = Block(16, mixer=mixer, norm=norm, **options).double(), draw(2, 7, 16)
    close(block(h), written_out(block, h, axis), 2)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("grad_cycles", [0, 1, 2])
def test_a_recursion_of_an_own_mixer_is_written_out(norm, recompute, grad_cycles):
    torch.manual_seed(0)
    net = Blocks(16, 2, mixer=GatedConv, norm=norm, norm_weight=False).double()
    x, y, z = (draw(2, 7, 16, seed=seed).requires_grad_() for seed in range(3))
    found = Recursion(net, 2, 2, grad_cycles=grad_cycles, recompute=recompute)(x, y, z)

    def layers(h: Tensor) -> Tensor:
        for block in net.blocks:
            h = written_out(block, h)
        return h

    y_true, z_true = y, z
    for cycle in range(2):
        with torch.set_grad_enabled(cycle >= 2 - grad_cycles):
            for _ in range(2):
                z_true = layers(z_true + (y_true + x))
            y_true = layers(y_true + z_true)
    close(found[0], y_true, 12), close(found[1], z_true, 12)
    assert found[0].requires_grad == bool(grad_cycles)
    if not grad_cycles:
        return
    leaves = [x, *net.parameters()]
    grads = [torch.autograd.grad((a * b.cos()).sum(), leaves) for a, b in (found, (y_true, z_true))]
    for one, other in zip(*grads, strict=True):
        close(one, other, 3 * 12)  # back through each layer, which is computed once more


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_an_own_mixer_compiles_without_graph_breaks(norm, recompute, trained):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Blocks(16, 1, mixer=GatedConv, norm=norm).requires_grad_(trained)
    recursion = Recursion(net, 1, 2, recompute=recompute)
    x, y, z = (draw(2, 7, 16, seed=seed).float() for seed in range(3))
    compiled = torch.compile(recursion, fullgraph=True, backend="aot_eager")
    results = []
    for run in (recursion, compiled):
        out = run(x, y, z)
        leaves = [*net.parameters()] if trained else []
        results.append([*out, *(torch.autograd.grad(out[0].sum(), leaves) if trained else ())])
    for found, truth in zip(*reversed(results), strict=True):
        close(found, truth, 3 * 4, SINGLE)


def fallback() -> str:
    return trm_fast.backends()["latent_update"]["fallbacks"]["cpu float64 ran layer by layer"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mixer": GatedConv}, "the mixer GatedConv has no fused form"),
        ({"mixer": Shift}, "the mixer Shift has no fused form"),
        ({"mixer": Doubled}, "the mixer Doubled has no fused form"),
        ({"mixer": GatedConv, "norm": "pre"}, "the blocks are pre-norm"),
        ({"norm_weight": True}, "the norms have weights"),
        ({"causal": True}, "attention is causal, has a window or shares keys"),
        ({"heads": 16, "theta": None}, "attention has an odd head dim, 1"),
        ({"dropout": 0.5}, "random numbers are drawn"),
    ],
)
def test_what_runs_layer_by_layer_says_why(options, reason, compiled):
    torch._dynamo.reset()
    OPS["latent_update"].notes.clear()
    net, x = Blocks(16, 1, **options).double(), draw(2, 7, 16)
    run = Recursion(net, 1, 1)
    run = torch.compile(run, backend="eager", fullgraph=True) if compiled else run
    run(x, x, x)
    assert fallback() == reason


def test_each_reason_is_kept_once():
    OPS["latent_update"].notes.clear()
    x = draw(2, 7, 16)
    for mixer in (GatedConv, Shift, GatedConv):
        Recursion(Blocks(16, 1, mixer=mixer).double(), 1, 1)(x, x, x)
    assert fallback() == (
        "the mixer GatedConv has no fused form; the mixer Shift has no fused form"
    )


def test_a_subclass_is_not_taken_for_the_mixer_it_changes():
    torch.manual_seed(0)
    net, x = Blocks(32, 1, mixer=Doubled, heads=2), draw(2, 7, 32).float()
    block = net.blocks[0]
    close(Recursion(net, 1, 1)(x, x, x)[1], written_out(block, x + (x + x)), 2, SINGLE)
    assert not block.draws_nothing  # as its forward may draw some


def test_random_numbers_of_an_own_mixer_are_the_same_in_the_recomputation():
    net, x = Blocks(16, 2, mixer=lambda width: Dropping()).double(), draw(2, 7, 16)
    grads = []
    for recompute in (False, True):
        torch.manual_seed(5)
        y, _ = Recursion(net, 2, 2, recompute=recompute)(x, x, x)
        grads.append(torch.autograd.grad(y.square().sum(), [*net.parameters()]))
    assert all(map(torch.equal, *grads))


def test_padding_reaches_a_mixer_that_takes_it():
    torch.manual_seed(0)
    net, x = Blocks(16, 1, mixer=Masked()).double(), draw(2, 7, 16)
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[:, 5:] = False
    long = Recursion(net, 1, 1)(x, x, x, padding=padding)[0]
    short = Recursion(net, 1, 1)(x[:, :5], x[:, :5], x[:, :5])[0]
    close(long[:, :5], short, 4)


@pytest.mark.parametrize("mixer", [GatedConv, Shift, OverTokens, TokenMixer])
def test_padding_is_refused_for_the_others(mixer):
    options = {"length": 3} if mixer is OverTokens else {}
    block = Block(16, mixer=TokenMixer(3) if mixer is TokenMixer else mixer, **options)
    with pytest.raises(ValueError) as error:
        block(torch.zeros(1, 3, 16), torch.ones(1, 3, dtype=torch.bool))
    message = f"Block: padding must be None for the mixer '{mixer.__name__}'; got a tensor"
    assert str(error.value) == message


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
def test_a_module_does_what_its_name_does(mixer, norm):
    made = {"attention": lambda: Attention(16, 2), "mlp_t": lambda: TokenMixer(7)}[mixer]
    torch.manual_seed(0)
    by_name = Block(16, norm=norm, **mixing(mixer, 7)).double()
    torch.manual_seed(0)
    by_module = Block(16, norm=norm, mixer=made()).double()
    h = draw(2, 7, 16)
    assert torch.equal(by_name(h), by_module(h))


def test_a_name_stands_for_a_mixer_and_its_options(monkeypatch):
    monkeypatch.setattr("trm_fast.nn.mixer.MIXERS", dict(MIXERS))
    assert named_mixer("a test")(GatedConv) is GatedConv
    block = Block(16, mixer="a test", kernel=5)
    assert isinstance(block.mix, GatedConv) and block.mix.kernel == 5
    assert "mixer='a test'" in repr(block)
    with pytest.raises(ValueError) as error:
        named_mixer("a test")(GatedConv)
    assert str(error.value) == "named_mixer: name must be a new one; got 'a test'"


def test_the_expansion_of_a_block_is_that_of_a_mixer_that_has_one():
    assert Block(512, mixer="mlp_t", length=200, expansion=8.0).mix.inner == 1280
    seen = []

    def make(width: int, **options) -> nn.Module:
        seen.append((width, options))
        return Shift(width)

    Block(16, mixer=make, anything=3)
    assert seen == [(16, {"anything": 3})]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"mixer": "mlp"},
            ValueError,
            f"Block: mixer must be one of {', '.join(map(repr, sorted(MIXERS)))}, a module or a "
            "function that makes one; got 'mlp'",
        ),
        (
            {"mixer": 3},
            TypeError,
            "Block: mixer must be a name, a module or a function that makes one; got 3",
        ),
        (
            {"mixer": "mlp_t", "length": 3, "heads": 2},
            ValueError,
            "Block: options of the mixer 'mlp_t' must be among expansion, length; got heads",
        ),
        (
            {"length": 3, "window": 2, "kernel": 1},
            ValueError,
            "Block: options of the mixer 'attention' must be among causal, heads, kv_heads, theta, "
            "window; got length, kernel",
        ),
        (
            {"mixer": Shift, "kernel": 3},
            ValueError,
            "Block: options of the mixer 'Shift' must be among none; got kernel",
        ),
        (
            {"mixer": OverTokens},
            ValueError,
            "Block: length must be given for the mixer 'OverTokens'; got none",
        ),
        (
            {"mixer": Masked(), "heads": 2},
            ValueError,
            "Block: a mixer that is a module must come without options; got heads",
        ),
        (
            {"mixer": lambda width: width},
            TypeError,
            "Block: the mixer '<lambda>' must return a module; got int",
        ),
    ],
)
def test_wrong_mixers_and_options_are_named(options, error, message):
    with pytest.raises(error) as caught:
        Block(16, **options)
    assert str(caught.value) == message


def test_a_norm_over_tokens_needs_their_number():
    mixer = OverTokens(16, 3)
    del mixer.length
    with pytest.raises(ValueError) as error:
        Block(16, mixer=mixer)
    assert str(error.value) == (
        "Block: the mixer 'OverTokens' must have a length, as its norm runs over the tokens; got "
        "none"
    )


def test_layers_do_not_share_a_mixer_by_accident():
    with pytest.raises(ValueError) as error:
        Blocks(16, 2, mixer=GatedConv(16))
    assert str(error.value) == (
        "Blocks: mixer must be a name or a function for several layers, each of which has its own; "
        "got a module for 2 layers"
    )
    assert isinstance(Blocks(16, 1, mixer=GatedConv(16)).blocks[0].mix, GatedConv)
