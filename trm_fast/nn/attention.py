"""``Attention``: self-attention with rotary positions."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from trm_fast.nn._init import check_sizes, weight
from trm_fast.nn.mixer import FusedMixer, Mixer, named_mixer
from trm_fast.ops._autocast import activation
from trm_fast.ops.rope_attention import rope_attention


@named_mixer("attention")
class Attention(Mixer):
    """Self-attention without biases; ``trm_fast.ops.rope_attention`` defines what is between the
    projections.

    Parameter ``qkv`` [(heads + 2 kv_heads) head_dim, width] has the rows of the queries first, head
    after head, then keys and values; ``out`` is [width, heads head_dim].

    Args:
        width: features that come in and go out, a multiple of ``heads``.
        heads: number of heads.
        kv_heads: heads of keys and values, a divisor of ``heads``; None means ``heads``.
        theta: base of the rotary frequencies; None for no positions.
        causal: whether a token sees no later one.
        window: a token sees only those less than so many positions away; None for all.

    Attributes:
        report: called in training with the largest logit of each head, [heads], or None; what
            ``trm_fast.optim.QKClip.watch`` returns belongs here.

    Raises:
        ValueError: a size is not a whole number >= 1, or heads do not divide what they must.
    """

    takes_padding = True

    def __init__(
        self,
        width: int,
        heads: int = 8,
        kv_heads: int | None = None,
        *,
        theta: float | None = 10000.0,
        causal: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_sizes("Attention", width=width, heads=heads, kv_heads=kv_heads)
        if width % heads or heads % kv_heads:
            raise ValueError(
                "Attention: heads must divide width, and kv_heads must divide heads; got width "
                f"{width}, heads {heads}, kv_heads {kv_heads}"
            )
        self.width, self.heads, self.kv_heads, self.head_dim = (
            width, heads, kv_heads, width // heads,
        )  # fmt: skip
        self.theta, self.causal, self.window = theta, causal, window
        self.report: Callable[[Tensor], None] | None = None
        self.qkv = weight((heads + 2 * kv_heads) * self.head_dim, width)
        self.out = weight(width, width)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Returns the attention of each token to all that it sees.

        Args:
            x: [batch, length, width].
            padding: bool [batch, length], True for a real token; None means all.

        Returns:
            [batch, length, width], in the dtype of x.
        """
        x = activation(x)
        groups = (self.heads, self.kv_heads, self.kv_heads)
        every = linear(x, self.qkv.to(x.dtype)).unflatten(-1, (-1, self.head_dim))
        q, k, v = every.split(groups, 2)
        options: dict[str, Any] = {"theta": self.theta, "causal": self.causal}
        options |= {"window": self.window, "padding": padding}
        if self.report is not None and self.training:
            mixed, largest = rope_attention(q, k, v, return_max_logit=True, **options)
            self.report(largest)
        else:
            mixed = rope_attention(q, k, v, **options)
        return linear(mixed, self.out.to(x.dtype))

    @property
    def draws_nothing(self) -> bool:
        return type(self) is Attention

    def fused_form(self) -> FusedMixer | str:
        if type(self) is not Attention:  # whose forward may do something else
            return super().fused_form()
        if self.causal or self.window is not None or self.kv_heads != self.heads:
            return "attention is causal, has a window or shares keys"
        if self.head_dim % 2:
            return f"attention has an odd head dim, {self.head_dim}"
        if self.report is not None and self.training:
            return "attention reports its largest logits"
        return FusedMixer("attention", (self.qkv, self.out), self.heads, self.theta)

    def extra_repr(self) -> str:
        return (
            f"{self.width}, heads={self.heads}, kv_heads={self.kv_heads}, theta={self.theta}, "
            f"causal={self.causal}, window={self.window}"
        )
