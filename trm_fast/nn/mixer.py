"""``Mixer``: the layer of a ``Block`` that exchanges values between tokens, and the named ones."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor, nn

Factory = Callable[..., nn.Module]
AnyFactory = TypeVar("AnyFactory", bound=Factory)

MIXERS: dict[str, Factory] = {}


class FusedMixer(NamedTuple):
    """A mixer as ``trm_fast.ops.latent_update`` runs it.

    Args:
        kind: its name there, as in ``trm_fast.ops.Network``.
        weights: its first and its second weight, of the shapes that ``Network`` lists.
        heads, theta: as in ``Network``.
    """

    kind: Literal["mlp_t", "attention"]
    weights: tuple[Tensor, Tensor]
    heads: int = 8
    theta: float | None = 10000.0


class Mixer(nn.Module):
    """What a ``Block`` asks of its mixer. Any module that maps h [batch, length, width] to the same
    shape is a mixer; if it does not derive from this class, what it lacks is as here.

    Attributes:
        takes_padding: whether ``forward`` takes ``padding``, bool [batch, length], as its second
            argument. Otherwise a block refuses padding.
        post_norm_axis: what the norm behind the mixer in a post-norm block runs over: -1, the
            features of each token, or -2, the tokens, for which ``length`` says how many there are.
        draws_nothing: whether a call draws no random numbers. Otherwise recomputation saves and
            restores their state.

    Example:
        >>> class Shift(trm_fast.nn.Mixer):
        ...     def forward(self, h):
        ...         return h.roll(1, dims=1)
        >>> blocks = trm_fast.nn.Blocks(64, 2, mixer=lambda width: Shift())
    """

    takes_padding: bool = False
    post_norm_axis: Literal[-1, -2] = -1

    @property
    def draws_nothing(self) -> bool:
        return False

    def fused_form(self) -> FusedMixer | str:
        """Returns what ``trm_fast.ops.latent_update`` needs to run this mixer, or why it cannot."""
        return f"the mixer {type(self).__name__} has no fused form"


def named_mixer(name: str) -> Callable[[AnyFactory], AnyFactory]:
    """Returns a decorator that puts a mixer on the list, from which ``Block(mixer=name)`` takes it.

    Args:
        name: the name.

    Returns:
        A decorator of a class or function that is called with the width and the options of the
        mixer by name. One of them may be ``expansion``, which a block hands on.

    Raises:
        ValueError: the name is taken.
    """

    def add(factory: AnyFactory) -> AnyFactory:
        if name in MIXERS:
            raise ValueError(f"named_mixer: name must be a new one; got {name!r}")
        MIXERS[name] = factory
        return factory

    return add


def make_mixer(
    mixer: str | nn.Module | Factory, width: int, expansion: float, options: Mapping[str, Any]
) -> tuple[str, nn.Module]:
    """Returns the name and the module of a block's mixer.

    Args:
        mixer: a name, a module, or a class or function that is called with width and options.
        width: features of each token.
        expansion: of the block's gated layers, for a mixer that has such an option.
        options: all others.

    Raises:
        ValueError: the name is unknown, an option is unknown or missing, or a module has options.
        TypeError: ``mixer`` is none of these, or what it returns is no module.
    """
    if isinstance(mixer, nn.Module):
        if options:
            raise ValueError(
                "Block: a mixer that is a module must come without options; got "
                f"{', '.join(options)}"
            )
        return type(mixer).__name__, mixer
    name = mixer if isinstance(mixer, str) else getattr(mixer, "__name__", repr(mixer))
    factory = _factory(mixer)
    made = factory(width, **_checked_options(name, factory, expansion, options))
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"Block: the mixer {name!r} must return a module; got {type(made).__name__}"
        )
    return name, made


def _factory(mixer: object) -> Factory:
    if isinstance(mixer, str):
        if mixer not in MIXERS:
            known = ", ".join(repr(name) for name in sorted(MIXERS))
            raise ValueError(
                f"Block: mixer must be one of {known}, a module or a function that makes one; got "
                f"{mixer!r}"
            )
        return MIXERS[mixer]
    if not callable(mixer):
        raise TypeError(
            f"Block: mixer must be a name, a module or a function that makes one; got {mixer!r}"
        )
    return mixer


def _checked_options(
    name: str, factory: Factory, expansion: float, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of a factory behind the width."""
    parameters = [*signature(factory).parameters.values()][1:]
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    unknown = [option for option in options if option not in named]
    if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters):
        known = ", ".join(sorted(named)) or "none"
        raise ValueError(
            f"Block: options of the mixer {name!r} must be among {known}; got {', '.join(unknown)}"
        )
    given = {"expansion": expansion, **options} if "expansion" in named else dict(options)
    for option, parameter in named.items():
        if parameter.default is Parameter.empty and option not in given:
            raise ValueError(f"Block: {option} must be given for the mixer {name!r}; got none")
    return given
