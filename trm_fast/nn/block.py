"""``Block``, a mixing layer and a feed-forward layer with their norms, and ``Blocks``, a stack."""

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import dropout

from trm_fast.nn._hooks import is_hooked
from trm_fast.nn._init import check_sizes
from trm_fast.nn.attention import Attention
from trm_fast.nn.norm import RMSNorm
from trm_fast.nn.swiglu import SwiGLU
from trm_fast.nn.token_mixer import TokenMixer
from trm_fast.ops.latent_update import Network, latent_update


class Block(nn.Module):
    """One layer of a network over sequences, of shape [batch, length, width].

        post-norm    h <- rms(h + mix(h))           h <- rms(h + SwiGLU(h))
        pre-norm     h <- h + mix(rms(h))           h <- h + SwiGLU(rms(h))

    Each sum and the norm behind it are one op. With dropout, what is added to h is dropped.

    Args:
        width: features of each token.
        heads: of attention; a divisor of ``width``.
        length: tokens of each sequence, for the mixer "mlp_t", which needs it.
        norm: "post", as in official TRM, or "pre".
        mixer: "attention", or "mlp_t", a gated layer over the tokens. The norm behind the latter in
            post-norm runs over the tokens, with one scale for each channel of a sample; all others
            run over the features.
        expansion: of the gated layers, as for ``inner_width``.
        inner: inner width of ``SwiGLU``; None computes it from ``expansion``.
        norm_weight: whether the norms have factors; None means no for "post" and yes for "pre".
        kv_heads: as for ``Attention``, like ``theta``, ``causal`` and ``window``.
        theta: base of the rotary frequencies; None for no positions.
        causal: whether a token sees no later one.
        window: a token sees only those less than so many positions away; None for all.
        eps: of the norms.
        dropout: probability, in [0, 1), that a feature is dropped in training.

    Raises:
        ValueError: a size, name or probability is out of range, or ``length`` is missing.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 8,
        length: int | None = None,
        norm: Literal["post", "pre"] = "post",
        mixer: Literal["attention", "mlp_t"] = "attention",
        expansion: float = 4.0,
        inner: int | None = None,
        norm_weight: bool | None = None,
        kv_heads: int | None = None,
        theta: float | None = 10000.0,
        causal: bool = False,
        window: int | None = None,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(norm, mixer, length, dropout)
        tokens = mixer == "mlp_t" and length is not None
        over_tokens = tokens and norm == "post"
        scaled = norm == "pre" if norm_weight is None else norm_weight
        self.norm, self.mixer, self.dropout = norm, mixer, dropout
        self.mix: Attention | TokenMixer
        if tokens and length is not None:
            self.mix = TokenMixer(length, expansion=expansion)
        else:
            options: dict[str, Any] = {"theta": theta, "causal": causal, "window": window}
            self.mix = Attention(width, heads, kv_heads, **options)
        self.mlp = SwiGLU(width, inner, expansion=expansion)
        size, axis = (length, -2) if over_tokens and length is not None else (width, -1)
        self.mix_norm = RMSNorm(size, eps, scaled, axis=axis)
        self.mlp_norm = RMSNorm(width, eps, scaled)

    def forward(self, h: Tensor, padding: Tensor | None = None) -> Tensor:
        """Returns the next h.

        Args:
            h: [batch, length, width].
            padding: bool [batch, length], True for a real token; only for attention.

        Returns:
            [batch, length, width], in the dtype of h.

        Raises:
            ValueError: the mixer is "mlp_t" and there is padding.
        """
        if self.norm == "pre":
            h, last = self.pre_norm(h, None, padding)
            return h + last
        h = self.mix_norm(self._mixed(h, padding), h)
        out: Tensor = self.mlp_norm(self._drop(self.mlp(h)), h)
        return out

    def pre_norm(
        self, h: Tensor, last: Tensor | None, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs a pre-norm block, whose two sums belong to the norms behind them.

        Args:
            h: [batch, length, width].
            last: what is still to be added to h; None for nothing.
            padding: as for ``forward``.

        Returns:
            h, and what is still to be added to it.
        """
        if last is None:
            normed = self.mix_norm(h)
        else:
            normed, h = self.mix_norm.with_sum(last, h)
        normed, h = self.mlp_norm.with_sum(self._mixed(normed, padding), h)
        return h, self._drop(self.mlp(normed))

    def _mixed(self, h: Tensor, padding: Tensor | None) -> Tensor:
        if isinstance(self.mix, Attention):
            return self._drop(self.mix(h, padding))
        if padding is not None:
            raise ValueError("Block: padding must be None for the mixer 'mlp_t'; got a tensor")
        return self._drop(self.mix(h))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout) if self.training and self.dropout else x

    def extra_repr(self) -> str:
        return f"norm={self.norm!r}, mixer={self.mixer!r}, dropout={self.dropout}"


class Blocks(nn.Module):
    """A stack of blocks as the network of a recursion: ``layers(state + injection)``.

    In ``trm_fast.nn.Recursion`` the whole recursion is one call of
    ``trm_fast.ops.latent_update`` where the blocks are post-norm without factors, dropout, masks
    or grouped keys, which are those of official TRM.

    Args:
        width: features of each token.
        layers: number of blocks.
        **options: of each ``Block``.

    Raises:
        ValueError: ``layers`` is not a whole number >= 1, or as for ``Block``.
    """

    def __init__(self, width: int, layers: int = 2, **options: Any) -> None:
        super().__init__()
        check_sizes("Blocks", layers=layers)
        self.blocks = nn.ModuleList(Block(width, **options) for _ in range(layers))

    def forward(
        self, state: Tensor, injection: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """Returns the layers of ``state + injection``.

        Args:
            state: [batch, length, width].
            injection: of the shape of ``state``; None adds nothing.
            padding: bool [batch, length], True for a real token; None means all.

        Returns:
            [batch, length, width].
        """
        h, last = state if injection is None else state + injection, None
        for block in self._stack():
            if block.norm == "pre":
                h, last = block.pre_norm(h, last, padding)
            else:
                h = block(h, padding)
        return h if last is None else h + last

    @property
    def draws_nothing(self) -> bool:
        """Whether a call draws no random numbers, which a recomputation would have to repeat."""
        return not any(block.training and block.dropout for block in self._stack())

    def fused_recursion(
        self,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        *,
        n: int,
        T: int,
        grad_cycles: int,
        recompute: bool,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Runs the recursion as one op.

        Args:
            x, y, z: input and states, [batch, length, width].
            n, T, grad_cycles, recompute, backend: as for ``trm_fast.ops.latent_update``.

        Returns:
            (y, z) after it; None where the op does not do what these blocks do.
        """
        network = self._network()
        if network is None or not _alike(x, y, z):
            return None
        weights = [weight for block in self._stack() for weight in _weights(block)]
        counts: dict[str, Any] = {"n": n, "T": T, "grad_cycles": grad_cycles}
        last: dict[str, Any] = {"recompute": recompute, "backend": backend}
        return latent_update(x, y, z, weights, network, **counts, **last)

    def _stack(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _network(self) -> Network | None:
        """The blocks as the op knows them, or None."""
        found = {_as_network(block) for block in self._stack()}
        if not self.draws_nothing or any(is_hooked(module) for module in self.modules()):
            return None
        return found.pop() if len(found) == 1 else None


def _weights(block: Block) -> tuple[Tensor, ...]:
    mix, mlp = block.mix, block.mlp
    mixing = (mix.qkv, mix.out) if isinstance(mix, Attention) else (mix.gate_up, mix.down)
    return *mixing, mlp.gate_up, mlp.down


def _as_network(block: Block) -> Network | None:
    if type(block) is not Block or block.norm == "pre" or block.mlp.bias is not None:
        return None
    if block.mix_norm.weight is not None or block.mlp_norm.weight is not None:
        return None
    eps, mix = block.mlp_norm.eps, block.mix
    if isinstance(mix, TokenMixer):
        return Network("mlp_t", eps=eps)
    special = mix.causal or mix.window is not None or mix.kv_heads != mix.heads
    # An odd head dim has no rotary positions, and the op takes only even ones.
    if special or mix.head_dim % 2 or (mix.report is not None and mix.training):
        return None
    return Network("attention", heads=mix.heads, theta=mix.theta, eps=eps)


def _alike(x: Tensor, y: Tensor, z: Tensor) -> bool:
    return x.dim() == 3 and x.shape == y.shape == z.shape and x.dtype == y.dtype == z.dtype


def _check(norm: str, mixer: str, length: int | None, dropout: float) -> None:
    for name, value, known in (
        ("norm", norm, ("post", "pre")),
        ("mixer", mixer, ("attention", "mlp_t")),
    ):
        if value not in known:
            names = " or ".join(repr(each) for each in known)
            raise ValueError(f"Block: {name} must be {names}; got {value!r}")
    if mixer == "mlp_t" and length is None:
        raise ValueError("Block: length must be given for the mixer 'mlp_t'; got None")
    if not 0 <= dropout < 1:
        raise ValueError(f"Block: dropout must be in [0, 1); got {dropout!r}")
