"""``TokenMixer``: a gated layer over the tokens of a sequence, in place of attention."""

from torch import Tensor

from trm_fast.nn._init import check_sizes, weight
from trm_fast.nn.mixer import FusedMixer, Mixer, named_mixer
from trm_fast.nn.swiglu import inner_width
from trm_fast.ops.token_mixer import token_mixer


class TokenMixer(Mixer):
    """SwiGLU over the sequence axis, which ``trm_fast.ops.token_mixer`` defines.

    Args:
        length: tokens of each sequence, which is fixed.
        inner: inner width; None computes it from ``expansion``, as for ``SwiGLU``.
        expansion: of the plain layer of equal size, > 0.

    Raises:
        ValueError: a size is not a whole number >= 1.
    """

    post_norm_axis = -2

    def __init__(self, length: int, inner: int | None = None, *, expansion: float = 4.0) -> None:
        super().__init__()
        check_sizes("TokenMixer", length=length)
        inner = inner_width(length, expansion) if inner is None else inner
        check_sizes("TokenMixer", inner=inner)
        self.length, self.inner = length, inner
        self.gate_up = weight(2 * inner, length)
        self.down = weight(length, inner)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer of x [batch, length, width], of its shape and dtype."""
        return token_mixer(x, self.gate_up, self.down)

    @property
    def draws_nothing(self) -> bool:
        return type(self) is TokenMixer

    def fused_form(self) -> FusedMixer | str:
        if type(self) is not TokenMixer:  # whose forward may do something else
            return super().fused_form()
        return FusedMixer("mlp_t", (self.gate_up, self.down))

    def extra_repr(self) -> str:
        return f"{self.length}, inner={self.inner}"


@named_mixer("mlp_t")
def _of_width(width: int, length: int, *, expansion: float = 4.0) -> TokenMixer:
    """Returns the token mixer of a block, whose weights do not depend on the width."""
    return TokenMixer(length, expansion=expansion)
