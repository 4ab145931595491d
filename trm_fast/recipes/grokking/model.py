"""The decoder of the grokking experiment, as published in ironjr/grokfast at commit 93b2248."""

from torch import Tensor, nn


class DecoderLayer(nn.Module):
    """Causal attention and a GELU MLP on [length, batch, width].

    The residual path starts from the normalised input, as in the published code:

        x <- LayerNorm(x);  x <- x + attention(x);  x <- x + mlp(LayerNorm(x))
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns all positions under a causal ``mask``, or only the last one without a mask."""
        x = self.attention_norm(x)
        # The last position sees every other one, so it needs no mask.
        query = x[-1:] if mask is None else x
        mixed, _ = self.attention(query, x, x, attn_mask=mask, need_weights=False)
        x = query + mixed
        x = x + self.mlp(self.mlp_norm(x))
        return x


class Decoder(nn.Module):
    """Decoder-only transformer that predicts the token after the last one.

    Parts are built in the published order, so one seed gives the published initial weights.

    Args:
        tokens: size of the vocabulary.
        positions: number of learned positions, >= the longest input.
        width: size of a hidden vector.
        layers: number of layers, >= 1.
        heads: attention heads; divides ``width``.
    """

    def __init__(
        self, tokens: int, positions: int = 5, width: int = 128, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(tokens, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens [length, batch], int64, to the logits [batch, tokens] of what comes next."""
        length = tokens.shape[0]
        x = self.token_embedding(tokens) + self.position_embedding.weight[:length, None]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        # Only the last position is read: the last layer saves 3/4 of its queries and of its MLP.
        x = self.layers[-1](x, None)
        logits: Tensor = self.head(self.norm(x[0]))
        return logits
