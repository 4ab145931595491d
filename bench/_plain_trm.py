"""The official tiny recursive model in plain torch, operator by operator as its code has them, and
under its names: what ``TinyRecursiveModel`` is compared with.

Source: SamsungSAILMontreal/TinyRecursiveModels at e7b6871, written anew.
"""

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    embedding,
    linear,
    pad,
    scaled_dot_product_attention,
    silu,
)

from trm_fast.nn import TRMConfig


class Linear(nn.Module):
    """A product whose weight is cast to the dtype of its input at each use."""

    def __init__(self, width: int, out: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width))
        start(self.weight, width**-0.5)
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Module):
    def __init__(self, count: int, width: int):
        super().__init__()
        self.embedding_weight = nn.Parameter(torch.empty(count, width))
        start(self.embedding_weight, width**-0.5)


class PuzzleRows(nn.Module):
    """A table that is no parameter, whose rows of the batch are a leaf in training."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.register_buffer("weights", torch.zeros(count, width))
        self.local_weights: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        if not self.training:
            return self.weights[ids]
        self.local_weights = self.weights[ids].detach().requires_grad_()
        return self.local_weights


class SwiGLU(nn.Module):
    def __init__(self, width: int, expansion: float):
        super().__init__()
        inner = -(-round(expansion * width * 2 / 3) // 256) * 256
        self.gate_up_proj = Linear(width, 2 * inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(silu(gate) * up)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_proj = Linear(width, 3 * width)
        self.o_proj = Linear(width, width)

    def forward(self, h: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, length, width = h.shape
        qkv = self.qkv_proj(h).view(batch, length, 3 * self.heads, width // self.heads)
        q, k, v = qkv.split(self.heads, dim=2)
        if positions is not None:
            q, k = rotated(q, *positions), rotated(k, *positions)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, config: TRMConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        if config.mlp_t:
            self.mlp_t = SwiGLU(config.length, config.expansion)
        else:
            self.self_attn = Attention(config.hidden_size, config.num_heads)
        self.mlp = SwiGLU(config.hidden_size, config.expansion)

    def forward(self, h: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
        if hasattr(self, "mlp_t"):
            h = h.transpose(1, 2)
            h = rms_norm(h + self.mlp_t(h), self.eps)
            h = h.transpose(1, 2)
        else:
            h = rms_norm(h + self.self_attn(h, positions), self.eps)
        return rms_norm(h + self.mlp(h), self.eps)


class Layers(nn.Module):
    def __init__(self, config: TRMConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.L_layers))

    def forward(
        self, h: Tensor, injection: Tensor, positions: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        h = h + injection
        for layer in self.layers:
            h = layer(h, positions)
        return h


class State(NamedTuple):
    """The carry of the plain model; ``data`` is inputs, labels and puzzle ids."""

    y: Tensor
    z: Tensor
    steps: Tensor
    halted: Tensor
    data: dict[str, Tensor]


class PlainTRM(nn.Module):
    """The model, its carry and its halting; ``state_dict`` is that of ``inner`` officially."""

    def __init__(self, config: TRMConfig):
        super().__init__()
        self.config = config
        width, dtype = config.hidden_size, config.dtype
        self.embed_tokens = Embedding(config.vocab_size, width)
        self.lm_head = Linear(width, config.vocab_size)
        self.q_head = Linear(width, 2, bias=True)
        if config.puzzle_width:
            self.puzzle_emb = PuzzleRows(config.num_puzzle_identifiers, config.puzzle_width)
        if config.pos_encodings == "learned":
            self.embed_pos = Embedding(config.length, width)
        self.L_level = Layers(config)
        self.register_buffer("H_init", start(torch.empty(width), 1.0).to(dtype))
        self.register_buffer("L_init", start(torch.empty(width), 1.0).to(dtype))
        with torch.no_grad():
            self.q_head.weight.zero_()
            self.q_head.bias.fill_(-5)

    def embedded(self, data: dict[str, Tensor]) -> Tensor:
        config = self.config
        dtype = self.H_init.dtype
        x = embedding(data["inputs"], self.embed_tokens.embedding_weight.to(dtype))
        if config.puzzle_positions:
            rows = self.puzzle_emb(data["puzzle_identifiers"]).to(dtype)
            rows = pad(rows, (0, config.puzzle_positions * config.hidden_size - rows.shape[-1]))
            x = torch.cat((rows.view(-1, config.puzzle_positions, config.hidden_size), x), dim=-2)
        if config.pos_encodings == "learned":
            x = sqrt(0.5) * (x + self.embed_pos.embedding_weight.to(dtype))
        return sqrt(config.hidden_size) * x

    def positions(self) -> tuple[Tensor, Tensor] | None:
        if self.config.pos_encodings != "rope":
            return None
        dim = self.config.hidden_size // self.config.num_heads
        device = self.H_init.device
        # float32 officially; float64 only where the model is to be the truth.
        dtype = torch.promote_types(self.H_init.dtype, torch.float32)
        pairs = torch.arange(0, dim, 2, dtype=dtype, device=device) / dim
        places = torch.arange(self.config.length, dtype=dtype, device=device)
        angles = torch.outer(places, 1.0 / self.config.rope_theta**pairs)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def step(
        self, y: Tensor, z: Tensor, data: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One supervision step: y and z without gradient, logits, and both q in float32."""
        x, places = self.embedded(data), self.positions()

        def cycle(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            for _ in range(self.config.L_cycles):
                z = self.L_level(z, y + x, places)
            return self.L_level(y, z, places), z

        with torch.no_grad():
            for _ in range(self.config.H_cycles - 1):
                y, z = cycle(y, z)
        y, z = cycle(y, z)
        logits = self.lm_head(y)[:, self.config.puzzle_positions :]
        q = self.q_head(y[:, 0])
        return y.detach(), z.detach(), logits, q.to(torch.promote_types(q.dtype, torch.float32))

    def initial_carry(self, batch: dict[str, Tensor]) -> State:
        count, device = batch["inputs"].shape[0], batch["inputs"].device
        empty = self.H_init.new_zeros(count, self.config.length, self.config.hidden_size)
        steps = torch.zeros(count, dtype=torch.int32, device=device)
        halted = torch.ones(count, dtype=torch.bool, device=device)
        data = {key: torch.zeros_like(value) for key, value in batch.items()}
        return State(empty, empty, steps, halted, data)

    def forward(self, carry: State, batch: dict[str, Tensor]) -> tuple[State, Tensor, Tensor]:
        new = carry.halted
        y = torch.where(new.view(-1, 1, 1), self.H_init, carry.y)
        z = torch.where(new.view(-1, 1, 1), self.L_init, carry.z)
        steps = torch.where(new, 0, carry.steps) + 1
        data = {
            key: torch.where(new.view(-1, *[1] * (value.dim() - 1)), batch[key], value)
            for key, value in carry.data.items()
        }
        y, z, logits, q = self.step(y, z, data)
        most = self.config.halt_max_steps
        with torch.no_grad():
            halted = steps >= most
            if self.training and most > 1:
                halted = halted | (q[:, 0] > 0)
                explores = torch.rand_like(q[:, 0]) < self.config.halt_exploration_prob
                halted = halted & (steps >= explores * torch.randint_like(steps, 2, most + 1))
        return State(y, z, steps, halted, data), logits, q


def plain_loss(logits: Tensor, labels: Tensor, q: Tensor) -> Tensor:
    """The official loss of a step, over the batch."""
    logits = logits.to(torch.float64)
    s = torch.where(logits < 0, 1 / (1 - logits + 1e-30), logits + 1)
    log_p = torch.log(s / s.sum(dim=-1, keepdim=True))
    valid = labels != -100
    chosen = log_p.gather(-1, torch.where(valid, labels, 0).long().unsqueeze(-1)).squeeze(-1)
    losses = -torch.where(valid, chosen, 0)
    count = valid.sum(-1)
    lm = (losses / count.clamp(min=1).unsqueeze(-1)).sum()
    right = (valid & (logits.argmax(-1) == labels)).sum(-1) == count
    halt = binary_cross_entropy_with_logits(q[:, 0], right.to(q.dtype), reduction="sum")
    return (lm + 0.5 * halt) / labels.shape[0]


def rms_norm(h: Tensor, eps: float) -> Tensor:
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(h.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, length, heads, dim] with its halves rotated by the angles of their positions."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(x.dtype)


@torch.no_grad()
def start(tensor: Tensor, std: float) -> Tensor:
    """Fills from a normal distribution cut off at two standard deviations, scaled back to std."""
    nn.init.trunc_normal_(tensor, std=1.0, a=-2.0, b=2.0)
    return tensor.mul_(1.13685 * std)
