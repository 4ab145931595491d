"""The modules against their formulas in float64, and what they refuse."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from trm_fast import use_backend
from trm_fast.nn import Attention, Block, Blocks, RMSNorm, SwiGLU, TokenMixer, inner_width
from trm_fast.nn._init import truncated_normal_

from .checks import DOUBLE, mixing, plain

LENGTHS = (1, 7, 81, 97)

# A layer has fewer than 20 roundings in a row; sums of up to 300 products of random sign add about
# sqrt(300), and quotients by a norm or a softmax enlarge that by a few.
LAYER = 20 * 17 * 4 * DOUBLE


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(h: Tensor, dim: int = -1, eps: float = 1e-5) -> Tensor:
    return h / (h.square().mean(dim, keepdim=True) + eps).sqrt()


def gated(x: Tensor, layer: SwiGLU | TokenMixer) -> Tensor:
    gate, up = layer.gate_up.chunk(2)
    return (silu(x @ gate.T) * (x @ up.T)) @ layer.down.T


def attended(x: Tensor, layer: Attention, visible: Tensor | None = None) -> Tensor:
    batch, length, _ = x.shape
    heads, kv_heads, dim = layer.heads, layer.kv_heads, layer.head_dim
    parts = (x @ layer.qkv.T).view(batch, length, -1, dim)
    q, k, v = parts.split((heads, kv_heads, kv_heads), 2)
    if layer.theta is not None:
        angles = torch.arange(length)[:, None] * layer.theta ** (
            -torch.arange(0, dim, 2, dtype=torch.float64) / dim
        )
        angles = torch.cat((angles, angles), -1)
        q, k = (plain.rotated(part, angles.cos(), angles.sin()) for part in (q, k))
    shared = torch.arange(heads) * kv_heads // heads
    logits = torch.einsum("bihd,bjhd->bhij", q, k[:, :, shared]) / dim**0.5
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    mixed = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v[:, :, shared])
    return mixed.flatten(2) @ layer.out.T


def close(found: Tensor, truth: Tensor, bound: float = LAYER) -> None:
    assert found.shape == truth.shape
    assert (found - truth).abs().max() <= bound * truth.abs().max()


@pytest.mark.parametrize(("width", "inner"), [(512, 1536), (97, 512), (81, 256), (916, 2560)])
def test_inner_width_is_that_of_the_official_model(width, inner):
    assert inner_width(width) == inner


def test_a_truncated_normal_has_its_deviation_and_no_tails():
    drawn = torch.empty(200_000)
    truncated_normal_(drawn, 0.5, torch.Generator().manual_seed(0))
    # The deviation of n draws is off by about 1 / sqrt(2 n) = 0.16 %; four times that.
    assert abs(drawn.std().item() - 0.5) < 0.5 * 4 * 0.0016
    assert 0.99 * 2.2737 * 0.5 < drawn.abs().max().item() < 2.2738 * 0.5


def test_weights_start_with_the_variance_of_their_inputs():
    torch.manual_seed(0)
    layer = SwiGLU(64, 400)
    for weight, inputs in ((layer.gate_up, 64), (layer.down, 400)):
        # 25,000 numbers or more: 1 / sqrt(2 n) is 0.5 %.
        assert abs(weight.std().item() * inputs**0.5 - 1) < 4 * 0.005


@pytest.mark.parametrize("axis", [-1, -2])
def test_rms_norm_is_its_formula(axis):
    layer = RMSNorm(6 if axis == -1 else 5, 1e-3, axis=axis).double()
    weight = draw(layer.dim, seed=3)
    layer.weight.data.copy_(weight)
    x, residual = draw(2, 5, 6), draw(2, 5, 6, seed=1)
    factor = weight if axis == -1 else weight[:, None]
    close(layer(x, residual), norm(x + residual, axis, 1e-3) * factor)
    close(layer(x), norm(x, axis, 1e-3) * factor)
    assert torch.equal(layer.with_sum(x, residual)[1], x + residual)
    assert RMSNorm(4, weight=False).weight is None


def test_rms_norm_names_a_wrong_size():
    with pytest.raises(ValueError) as error:
        RMSNorm(4)(torch.zeros(2, 5))
    assert str(error.value) == "RMSNorm: dimension -1 of x must be 4; got (2, 5)"


def test_swiglu_is_its_formula_with_bias():
    layer = SwiGLU(7, 12, bias=True).double()
    layer.bias.data.copy_(draw(7, seed=2))
    x = draw(3, 5, 7)
    close(layer(x), gated(x, layer) + layer.bias)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_token_mixer_is_swiglu_over_tokens(length):
    layer, x = TokenMixer(length).double(), draw(2, length, 8)
    close(layer(x), gated(x.transpose(1, 2), layer).transpose(1, 2))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("kv_heads", "theta"), [(None, 10000.0), (2, 100.0), (1, None)])
def test_attention_is_its_formula(length, kv_heads, theta):
    layer = Attention(16, 4, kv_heads, theta=theta).double()
    x = draw(2, length, 16)
    close(layer(x), attended(x, layer))


def test_attention_sees_what_its_options_say():
    layer, x = Attention(16, 2, causal=True, window=3).double(), draw(2, 9, 16)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, 8:] = False
    i, j = torch.arange(9)[:, None], torch.arange(9)
    visible = (j <= i) & (i - j < 3) & padding[:, None, None, :]
    close(layer(x, padding), attended(x, layer, visible))


def test_attention_reports_its_largest_logits_in_training():
    layer, x, reports = Attention(16, 2, theta=None).double(), draw(2, 9, 16), []
    layer.report = reports.append
    layer(x)
    layer.eval()
    layer(x)
    q, k, _ = (x @ layer.qkv.T).view(2, 9, 3, 2, 8).unbind(2)
    truth = torch.einsum("bihd,bjhd->hbij", q, k).flatten(1).amax(1) / 8**0.5
    assert len(reports) == 1
    close(reports[0], truth)


@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_post_norm_block_is_its_formula(mixer, weighted):
    block = Block(16, **mixing(mixer, 9), norm_weight=weighted).double()
    h = draw(2, 9, 16)
    factors = {}
    for name in ("mix_norm", "mlp_norm"):
        layer = getattr(block, name)
        factors[name] = draw(layer.dim, seed=4) if weighted else torch.ones(layer.dim)
        if weighted:
            layer.weight.data.copy_(factors[name])
    if mixer == "mlp_t":
        mixed = gated(h.transpose(1, 2), block.mix).transpose(1, 2)
        m = norm(h + mixed, -2) * factors["mix_norm"][:, None]
    else:
        m = norm(h + attended(h, block.mix)) * factors["mix_norm"]
    close(block(h), norm(m + gated(m, block.mlp)) * factors["mlp_norm"], 2 * LAYER)


def pre_norm(h: Tensor, block: Block) -> Tensor:
    normed = norm(h) * block.mix_norm.weight
    if isinstance(block.mix, TokenMixer):
        h = h + gated(normed.transpose(1, 2), block.mix).transpose(1, 2)
    else:
        h = h + attended(normed, block.mix)
    return h + gated(norm(h) * block.mlp_norm.weight, block.mlp)


@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
def test_pre_norm_blocks_are_their_formula(mixer):
    net = Blocks(16, 3, **mixing(mixer, 9), norm="pre").double()
    state, injection = draw(2, 9, 16), draw(2, 9, 16, seed=1)
    with torch.no_grad():
        for number, weight in enumerate(net.parameters()):
            if weight.dim() == 1:
                weight.copy_(draw(16, seed=number))
    h = state + injection
    close(net.blocks[0](h), pre_norm(h, net.blocks[0]), 2 * LAYER)
    for block in net.blocks:
        h = pre_norm(h, block)
    close(net(state, injection), h, 6 * LAYER)


def test_dropout_drops_in_training_only():
    torch.manual_seed(0)
    net, h = Blocks(16, 1, heads=2, norm="pre", dropout=0.5).double(), draw(4, 50, 16)
    assert not torch.equal(net(h), net(h))
    net.eval()
    assert torch.equal(net(h), net(h)) and net.draws_nothing


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    block, h = Block(16, heads=2, dropout=0.5).double(), torch.ones(2, 4000, 16).double()
    kept = block._drop(h)
    assert {*kept.unique().tolist()} == {0.0, 2.0}
    assert abs(kept.mean().item() - 1) < 4 / (2 * 4000 * 16) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_dtype_of_the_activations_decides(dtype, norm):
    net = Blocks(32, heads=2, norm=norm)
    h = draw(2, 5, 32).to(dtype).requires_grad_()
    net(h).sum().backward()
    assert net(h).dtype == h.grad.dtype == dtype
    assert all(weight.grad.dtype == torch.float32 for weight in net.parameters())


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_autocast_decides_the_dtype(norm):
    net, h = Blocks(32, heads=2, norm=norm), draw(2, 5, 32).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = net(h)
    assert found.dtype == torch.bfloat16
    # Twelve roundings to bfloat16 in a row.
    close(found.float(), net(h), 12 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwiGLU(0), "SwiGLU: width must be a whole number >= 1; got 0"),
        (lambda: SwiGLU(4, -1), "SwiGLU: inner must be a whole number >= 1; got -1"),
        (lambda: TokenMixer(True), "TokenMixer: length must be a whole number >= 1; got True"),
        (
            lambda: Attention(16, 3),
            "Attention: heads must divide width, and kv_heads must divide heads; got width 16, "
            "heads 3, kv_heads 3",
        ),
        (
            lambda: Attention(16, 4, 3),
            "Attention: heads must divide width, and kv_heads must divide heads; got width 16, "
            "heads 4, kv_heads 3",
        ),
        (lambda: Block(16, norm="mid"), "Block: norm must be 'post' or 'pre'; got 'mid'"),
        (
            lambda: Block(16, mixer="mlp_t"),
            "Block: length must be given for the mixer 'mlp_t'; got none",
        ),
        (lambda: Block(16, dropout=1.0), "Block: dropout must be in [0, 1); got 1.0"),
        (lambda: Blocks(16, 0), "Blocks: layers must be a whole number >= 1; got 0"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


def test_a_token_mixer_takes_no_padding():
    block = Block(16, mixer="mlp_t", length=3)
    with pytest.raises(ValueError) as error:
        block(torch.zeros(1, 3, 16), torch.ones(1, 3, dtype=torch.bool))
    message = "Block: padding must be None for the mixer 'mlp_t'; got a tensor"
    assert str(error.value) == message


def test_blocks_are_one_op_only_where_the_op_is_the_same():
    x = torch.zeros(1, 3, 32)
    counts = {"n": 1, "T": 1, "grad_cycles": 1, "recompute": True}
    plain_options = {"heads": 2}
    special = [
        {"norm": "pre"},
        {"norm_weight": True},
        {"causal": True},
        {"window": 2},
        {"kv_heads": 1},
        {"dropout": 0.1},
    ]
    assert Blocks(32, **plain_options).fused_recursion(x, x, x, **counts) is not None
    for options in special:
        assert Blocks(32, **plain_options, **options).fused_recursion(x, x, x, **counts) is None
    net = Blocks(32, dropout=0.1).eval()
    assert net.fused_recursion(x, x, x, **counts) is not None
    net.blocks[1].mlp.register_forward_hook(lambda *_: None)
    assert net.fused_recursion(x, x, x, **counts) is None


def test_blocks_run_without_any_backend_but_the_reference():
    net, h = Blocks(32, heads=2), draw(2, 5, 32).float()
    with use_backend("reference"):
        expected = net(h)
    close(net(h), expected, 40 * torch.finfo(torch.float32).eps)
