"""``Block``, a mixing layer and a feed-forward layer with their norms, and ``Blocks``, a stack."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import dropout

from trm_fast._dispatch import note_fallback
from trm_fast.nn._hooks import is_hooked, overrides
from trm_fast.nn._init import check_sizes
from trm_fast.nn.mixer import FusedMixer, make_mixer
from trm_fast.nn.norm import RMSNorm
from trm_fast.nn.swiglu import SwiGLU
from trm_fast.ops._latent_arguments import Network
from trm_fast.ops.latent_update import latent_update

MixerOption = str | nn.Module | Callable[..., nn.Module]


class FusedLayer(NamedTuple):
    """A block as ``latent_update`` runs it: its part of the ``Network``, and its weights."""

    form: FusedMixer
    eps: float
    weights: tuple[Tensor, ...]

    def is_like(self, other: "FusedLayer") -> bool:
        """Returns whether both are layers of one ``Network``."""
        mine, others = self.form, other.form
        same = mine.kind == others.kind and mine.heads == others.heads
        return same and mine.theta == others.theta and self.eps == other.eps


class Block(nn.Module):
    """One layer of a network over sequences, of shape [batch, length, width].

        post-norm    h <- rms(h + mix(h))           h <- rms(h + SwiGLU(h))
        pre-norm     h <- h + mix(rms(h))           h <- h + SwiGLU(rms(h))

    Each sum and the norm behind it are one op. With dropout, what is added to h is dropped.

    Args:
        width: features of each token.
        norm: "post", as in official TRM, or "pre".
        mixer: "attention"; "mlp_t", a gated layer over the tokens; another name of ``named_mixer``;
            a module; or a class or function that is called with the width and the options and
            returns a module. ``trm_fast.nn.Mixer`` says what a module may have. The norm behind
            "mlp_t" in post-norm runs over the tokens, with one scale for each channel of a sample.
        expansion: of the gated layers, as for ``inner_width``.
        inner: inner width of ``SwiGLU``; None computes it from ``expansion``.
        norm_weight: whether the norms have factors; None means no for "post" and yes for "pre".
        eps: of the norms.
        dropout: probability, in [0, 1), that a feature is dropped in training.
        **options: of the mixer: for "attention" ``heads`` (8), ``kv_heads``, ``theta``, ``causal``
            and ``window`` of ``Attention``; for "mlp_t" ``length``, the tokens of each sequence,
            which must be given.

    Raises:
        ValueError: a size, name or probability is out of range, or an option is missing or none of
            the mixer's.
        TypeError: the mixer is none of these.
    """

    def __init__(
        self,
        width: int,
        *,
        norm: Literal["post", "pre"] = "post",
        mixer: MixerOption = "attention",
        expansion: float = 4.0,
        inner: int | None = None,
        norm_weight: bool | None = None,
        eps: float = 1e-5,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        _check(norm, dropout)
        scaled = norm == "pre" if norm_weight is None else norm_weight
        self.norm, self.dropout = norm, dropout
        self.mixer, self.mix = make_mixer(mixer, width, expansion, options)
        self.mlp = SwiGLU(width, inner, expansion=expansion)
        over_tokens = norm == "post" and getattr(self.mix, "post_norm_axis", -1) == -2
        size, axis = (self._length(), -2) if over_tokens else (width, -1)
        self.mix_norm = RMSNorm(size, eps, scaled, axis=axis)
        self.mlp_norm = RMSNorm(width, eps, scaled)

    def forward(self, h: Tensor, padding: Tensor | None = None) -> Tensor:
        """Returns the next h.

        Args:
            h: [batch, length, width].
            padding: bool [batch, length], True for a real token; None means all, which mixers that
                take no padding need.

        Returns:
            [batch, length, width], in the dtype of h.

        Raises:
            ValueError: there is padding, and the mixer takes none.
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

    @property
    def draws_nothing(self) -> bool:
        """Whether a call draws no random numbers, which a recomputation would have to repeat."""
        if self.training and self.dropout:
            return False
        return getattr(self.mix, "draws_nothing", False)

    def fused_layer(self) -> FusedLayer | str:
        """Returns the block as ``trm_fast.ops.latent_update`` runs it, or why it cannot."""
        # Each attribute once: looking one up costs more than asking what it is.
        mix, mlp, mix_norm, mlp_norm = self.mix, self.mlp, self.mix_norm, self.mlp_norm
        if type(self) is not Block or type(mlp) is not SwiGLU:
            return f"{type(self).__name__} with {type(mlp).__name__} is not Block with SwiGLU"
        if self.norm == "pre":
            return "the blocks are pre-norm"
        if mlp.bias is not None:
            return "the gated layers have biases"
        if type(mix_norm) is not RMSNorm or type(mlp_norm) is not RMSNorm:
            return f"the norms are {type(mix_norm).__name__} and {type(mlp_norm).__name__}"
        if mix_norm.weight is not None or mlp_norm.weight is not None:
            return "the norms have weights"
        over_tokens = getattr(mix, "post_norm_axis", -1)
        if mix_norm.eps != mlp_norm.eps or (mix_norm.axis, mlp_norm.axis) != (over_tokens, -1):
            return "the norms differ in eps, or in what they run over"
        find = getattr(mix, "fused_form", None)
        form = f"the mixer {self.mixer} has no fused form" if find is None else find()
        if isinstance(form, str):
            return form
        if not self.draws_nothing:
            return "random numbers are drawn"
        if any(map(is_hooked, (self, mlp, mix_norm, mlp_norm, *mix.modules()))):
            return "a module has hooks"
        return FusedLayer(form, mlp_norm.eps, (*form.weights, mlp.gate_up, mlp.down))

    def _length(self) -> int:
        length: int | None = getattr(self.mix, "length", None)
        if length is None:
            raise ValueError(
                f"Block: the mixer {self.mixer!r} must have a length, as its norm runs over the "
                "tokens; got none"
            )
        return length

    def _mixed(self, h: Tensor, padding: Tensor | None) -> Tensor:
        if padding is None:
            return self._drop(self.mix(h))
        if not getattr(self.mix, "takes_padding", False):
            raise ValueError(
                f"Block: padding must be None for the mixer {self.mixer!r}; got a tensor"
            )
        return self._drop(self.mix(h, padding))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout) if self.training and self.dropout else x

    def extra_repr(self) -> str:
        return f"norm={self.norm!r}, mixer={self.mixer!r}, dropout={self.dropout}"


class Blocks(nn.Module):
    """A stack of blocks as the network of a recursion: ``layers(state + injection)``.

    In ``trm_fast.nn.Recursion`` the whole recursion is one call of
    ``trm_fast.ops.latent_update`` where the blocks are post-norm without factors, dropout, masks
    or grouped keys, which are those of official TRM. Others run layer by layer, and
    ``trm_fast.backends()["latent_update"]["fallbacks"]`` then says why.

    Args:
        width: features of each token.
        layers: number of blocks.
        **options: of each ``Block``.

    Raises:
        ValueError: ``layers`` is not a whole number >= 1, several layers are given one module as
            their mixer, or as for ``Block``.
    """

    fused_op = "latent_update"

    def __init__(self, width: int, layers: int = 2, **options: Any) -> None:
        super().__init__()
        check_sizes("Blocks", layers=layers)
        if layers > 1 and isinstance(options.get("mixer"), nn.Module):
            raise ValueError(
                "Blocks: mixer must be a name or a function for several layers, each of which has "
                f"its own; got a module for {layers} layers"
            )
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
        return all(block.draws_nothing for block in self._stack())

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
            (y, z) after it; None where the op does not do what these blocks do, and the reason is
            then among the fallbacks in ``trm_fast.backends()``.
        """
        layers = self._fused_layers(x, y, z)
        if isinstance(layers, str):
            note_fallback("latent_update", x.device.type, x.dtype, "layer by layer", layers)
            return None
        form, eps, _ = layers[0]
        return latent_update(
            x,
            y,
            z,
            [weight for layer in layers for weight in layer.weights],
            Network(form.kind, form.heads, form.theta, eps),
            n=n,
            T=T,
            grad_cycles=grad_cycles,
            recompute=recompute,
            backend=backend,
        )

    def _stack(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _fused_layers(self, x: Tensor, y: Tensor, z: Tensor) -> list[FusedLayer] | str:
        """Returns the blocks as the op runs them, or why it cannot."""
        changed = overrides(self, Blocks, "forward", "inject", "update_z", "update_y")
        if changed is not None:
            return f"{type(self).__name__} has a {changed} of its own"
        layers = []
        for block in self._stack():
            layer = block.fused_layer()
            if isinstance(layer, str):
                return layer
            layers.append(layer)
        if not all(layer.is_like(layers[0]) for layer in layers[1:]):
            return "the blocks differ"
        if is_hooked(self):
            return "a module has hooks"
        if x.dim() != 3 or not x.shape == y.shape == z.shape:
            return "x, y and z are not [batch, length, width] alike"
        return layers if x.dtype == y.dtype == z.dtype else "x, y and z have several dtypes"


def _check(norm: str, dropout: float) -> None:
    if norm not in ("post", "pre"):
        raise ValueError(f"Block: norm must be 'post' or 'pre'; got {norm!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"Block: dropout must be in [0, 1); got {dropout!r}")
