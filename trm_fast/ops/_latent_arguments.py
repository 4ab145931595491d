"""The arguments of ``latent_update``: network, weights by name and counts, and their checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LayerWeights(NamedTuple):
    """The weights of one layer, whose shapes ``Network`` lists."""

    mix_in: Tensor
    mix_out: Tensor
    gate_up: Tensor
    down: Tensor

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(weight.shape for weight in self)


WEIGHTS_PER_LAYER = len(LayerWeights._fields)


class Counts(NamedTuple):
    """How often the network is called: n updates of z in each of T cycles, the last of which carry
    gradients."""

    n: int
    T: int
    grad_cycles: int

    @property
    def calls(self) -> int:
        """Calls of the network that carry gradients."""
        return self.grad_cycles * (self.n + 1)


Mixer = Literal["mlp_t", "attention"]
MIXERS: tuple[Mixer, ...] = get_args(Mixer)


@dataclass(frozen=True)
class Network:
    """The settings of a network besides its weights.

    Args:
        mixer: "mlp_t", whose first two weights per layer are gate_up [2 Im, length] and down
            [length, Im], or "attention" with qkv [3 width, width] and out [width, width]. Both are
            followed by gate_up [2 I, width], gate rows first, and down [width, I].
        heads: of attention; they divide width.
        theta: base of the rotary frequencies, or None for no positions.
        eps: added to the mean square in each norm.
    """

    mixer: Mixer
    heads: int = 8
    theta: float | None = 10000.0
    eps: float = 1e-5

    def no_form(self) -> ValueError:
        """Returns the error of a place that knows other mixers than this one."""
        return ValueError(f"latent_update: there is no form of mixer {self.mixer!r}")


def layers_of(weights: Sequence[Tensor]) -> list[LayerWeights]:
    """Returns the weights layer by layer."""
    starts = range(0, len(weights), WEIGHTS_PER_LAYER)
    return [LayerWeights(*weights[i : i + WEIGHTS_PER_LAYER]) for i in starts]


def check_states(x: Tensor, y: Tensor, z: Tensor) -> None:
    for name, tensor in {"x": x, "y": y, "z": z}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"latent_update: {name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"latent_update: {name} must be a real floating point tensor; got {tensor.dtype}"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"latent_update: {name} must be a dense tensor; got {tensor.layout}")
        if tensor.device != x.device:
            raise ValueError(
                f"latent_update: {name} must be on {x.device} as x; got {tensor.device}"
            )
        if tensor.dim() != 3 or tensor.shape != x.shape:
            raise ValueError(
                "latent_update: x, y and z must be [batch, length, width] alike; got "
                f"{name} {tuple(tensor.shape)} and x {tuple(x.shape)}"
            )


def check_network(x: Tensor, weights: Sequence[Tensor], network: Network) -> None:
    if not isinstance(network, Network):
        raise TypeError(f"latent_update: network must be a Network; got {type(network).__name__}")
    if network.mixer not in MIXERS:
        known = " or ".join(map(repr, MIXERS))
        raise ValueError(f"latent_update: mixer must be {known}; got {network.mixer!r}")
    if not weights or len(weights) % WEIGHTS_PER_LAYER:
        raise ValueError(
            f"latent_update: weights must be 4 for each layer, one layer or more; got "
            f"{len(weights)}"
        )
    _check_numbers(network)
    heads = network.heads
    if network.mixer == "attention" and (heads < 1 or x.shape[2] % (2 * heads)):
        raise ValueError(
            f"latent_update: heads must divide width {x.shape[2]} into even parts; got {heads}"
        )
    for index, weight in enumerate(weights):
        _check_weight(x, f"weights[{index}]", weight)
    for number, layer in enumerate(layers_of(weights)):
        needed = _shapes(x, network, layer)
        if layer.shapes != needed:
            pairs = zip(layer.shapes, needed, strict=True)
            place = next(i for i, (shape, right) in enumerate(pairs) if shape != right)
            raise ValueError(
                f"latent_update: weights[{number * WEIGHTS_PER_LAYER + place}] must be "
                f"{needed[place]}; got {tuple(layer[place].shape)}"
            )


def _check_numbers(network: Network) -> None:
    heads, theta, eps = network.heads, network.theta, network.eps
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"latent_update: heads must be a whole number; got {heads!r}")
    for name, value in {"theta": 1.0 if theta is None else theta, "eps": eps}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"latent_update: {name} must be a number; got {value!r}")
        if not 0 < value < float("inf"):
            raise ValueError(f"latent_update: {name} must be finite and > 0; got {value!r}")


def _check_weight(x: Tensor, name: str, weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"latent_update: {name} must be a tensor; got {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"latent_update: {name} must be a real floating point tensor; got {weight.dtype}"
        )
    if weight.layout != torch.strided:
        raise TypeError(f"latent_update: {name} must be a dense tensor; got {weight.layout}")
    if weight.device != x.device:
        raise ValueError(f"latent_update: {name} must be on {x.device} as x; got {weight.device}")


def _shapes(x: Tensor, network: Network, layer: LayerWeights) -> tuple[tuple[int, int], ...]:
    """Returns the shapes that the weights of a layer must have, given their inner widths."""
    length, width = x.shape[1:]
    inner, mix_inner = _columns(layer.down), _columns(layer.mix_out)
    if network.mixer == "mlp_t":
        mix = (2 * mix_inner, length), (length, mix_inner)
    elif network.mixer == "attention":
        mix = (3 * width, width), (width, width)
    else:
        raise network.no_form()
    return *mix, (2 * inner, width), (width, inner)


def _columns(weight: Tensor) -> int:
    return weight.shape[-1] if weight.dim() else 0


def check_counts(counts: Counts) -> None:
    n, T, grad_cycles = counts
    for name, value in (("n", n), ("T", T), ("grad_cycles", grad_cycles)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"latent_update: {name} must be a whole number; got {value!r}")
    if n < 1 or T < 1:
        raise ValueError(f"latent_update: n and T must be >= 1; got n={n}, T={T}")
    if not 0 <= grad_cycles <= T:
        raise ValueError(f"latent_update: grad_cycles must be 0 to T={T}; got {grad_cycles}")
