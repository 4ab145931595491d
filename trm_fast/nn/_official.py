"""Checkpoints of the official code: their names, the config that fits their shapes, and loading.

Source: SamsungSAILMontreal/TinyRecursiveModels at e7b6871.
"""

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from trm_fast._paths import expanded
from trm_fast._pt import load_pt
from trm_fast.nn._config import CONFIGS, TRMConfig, config_of

# Of torch.compile, of DDP and averages of the weights, and of the official classes; in any order.
_PREFIXES = ("_orig_mod.", "module.", "model.", "inner.")
_AVERAGES = "n_averaged"  # how many torch's AveragedModel has taken
_TABLE = "puzzle_emb.weights"
_NAMES = {
    "H_init": "y_init",
    "L_init": "z_init",
    "embed_tokens.embedding_weight": "tokens.table",
    "embed_pos.embedding_weight": "positions.table",
    "lm_head.weight": "lm_head",
    "q_head.weight": "q_head.weight",
    "q_head.bias": "q_head.bias",
    _TABLE: "puzzles.table",
}
_LAYER = {
    "self_attn.qkv_proj.weight": "mix.qkv",
    "self_attn.o_proj.weight": "mix.out",
    "mlp_t.gate_up_proj.weight": "mix.gate_up",
    "mlp_t.down_proj.weight": "mix.down",
    "mlp.gate_up_proj.weight": "mlp.gate_up",
    "mlp.down_proj.weight": "mlp.down",
}


def named(model: nn.Module, config: TRMConfig) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a model under their official names, without prefix."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = {theirs: ours for theirs, ours in _NAMES.items() if ours in own}
    mixing = "mlp_t." if config.mlp_t else "self_attn."
    for layer in range(config.L_layers):
        for theirs, ours in _LAYER.items():
            if theirs.startswith((mixing, "mlp.")):
                names[f"L_level.layers.{layer}.{theirs}"] = f"recursion.net.blocks.{layer}.{ours}"
    return {theirs: own[ours] for theirs, ours in names.items()}


def read(source: str | PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state dict of a checkpoint, without the prefixes of its names.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no file of tensors, two names differ in their prefix only, or something is
            no dense tensor of real numbers.
    """
    given = source if isinstance(source, Mapping) else load_pt(expanded(source))
    if not isinstance(given, Mapping):
        raise _error(f"the checkpoint must be a state dict; got {type(given).__name__}")
    state: dict[str, Tensor] = {}
    for name, value in given.items():
        bare = _bare(name)
        if bare in state:
            raise _error(f"{bare} must be there once; got it with several prefixes")
        if not isinstance(value, Tensor):
            raise _error(f"{name} must be a tensor; got {type(value).__name__}")
        if value.is_complex() or value.is_meta or not _can_be_copied(value):
            raise _error(
                f"{name} must be a dense tensor of real numbers; got {value.dtype} in "
                f"{value.layout} on {value.device}"
            )
        if bare != _AVERAGES:
            state[bare] = value
    return state


def _can_be_copied(value: Tensor) -> bool:
    """Whether a tensor of numbers can be made of it: not of one that is sparse, nested, quantized
    or of bits, which would show only while a model is half loaded."""
    if value.layout != torch.strided or value.is_nested:
        return False
    try:
        value.detach().reshape(-1)[:1].to(torch.float64)
    except RuntimeError:
        return False
    return not value.is_quantized


def _bare(name: object) -> str:
    if not isinstance(name, str):
        raise _error(f"the checkpoint must have names that are strings; got {name!r:.80}")
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def config_from(state: Mapping[str, Tensor], config: TRMConfig | str | None) -> TRMConfig:
    """Returns a config whose sizes are those of the tensors of a checkpoint.

    Raises:
        ValueError: no published config has this vocabulary and mixer, and none is given.
    """
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    mlp_t = any(".mlp_t." in name for name in shapes)
    vocabulary, width = _shape(shapes, "embed_tokens.embedding_weight")
    if config is None:
        config = _published(vocabulary, mlp_t)
    config = config_of(config, {})
    layers = {name.split(".")[2] for name in shapes if name.startswith("L_level.layers.")}
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": width, "mlp_t": mlp_t}
    # Else a few names could ask for any number of layers.
    for layer in range(len(layers)):
        _shape(shapes, f"L_level.layers.{layer}.mlp.down_proj.weight")
    sizes["L_layers"] = max(len(layers), 1)
    sizes["puzzle_emb_ndim"] = 0
    if _TABLE in shapes:
        sizes["num_puzzle_identifiers"], sizes["puzzle_emb_ndim"] = _shape(shapes, _TABLE)
    else:
        sizes["puzzle_emb_len"] = 0
    if "embed_pos.embedding_weight" in shapes:
        sizes["pos_encodings"] = "learned"
    elif config.pos_encodings == "learned":
        sizes["pos_encodings"] = "none" if mlp_t else "rope"
    config = replace(config, **sizes)
    length = _length(shapes)
    return config if length is None else replace(config, seq_len=length - config.puzzle_positions)


def load(
    model: nn.Module, config: TRMConfig, state: Mapping[str, Tensor], mean_puzzle_row: bool
) -> None:
    """Copies a checkpoint into a model of this config, after all of it has been checked.

    Raises:
        ValueError: a name is missing or unknown, or a shape does not fit.
    """
    wanted = named(model, config)
    missing, unknown = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing:
        raise _error(f"the checkpoint must have {_listed(missing)}; got none")
    if unknown:
        raise _error(f"the checkpoint must have no more than the model; got {_listed(unknown)}")
    values = dict(state)
    if mean_puzzle_row and _TABLE in wanted and values[_TABLE].shape != wanted[_TABLE].shape:
        values[_TABLE] = _mean_row(values[_TABLE], wanted[_TABLE])
    for name, ours in wanted.items():
        if values[name].shape != ours.shape:
            hint = "; mean_puzzle_row=True fills it with the mean row" if name == _TABLE else ""
            raise _error(
                f"{name} must be {tuple(ours.shape)}; got {tuple(values[name].shape)}{hint}"
            )
    with torch.no_grad():
        for name, ours in wanted.items():
            ours.copy_(values[name])


def _mean_row(table: Tensor, ours: Tensor) -> Tensor:
    if table.dim() != 2 or table.shape[1] != ours.shape[1]:
        return table  # whose shape is then refused
    return table.to(torch.float64).mean(0, keepdim=True).expand(ours.shape)


def _published(vocabulary: int, mlp_t: bool) -> TRMConfig:
    for config in CONFIGS.values():
        if (config.vocab_size, config.mlp_t) == (vocabulary, mlp_t):
            return config
    mixer = "mlp_t" if mlp_t else "attention"
    raise _error(
        f"config must be given for a vocabulary of {vocabulary} and the mixer {mixer!r}, as no "
        "published one has them; got None"
    )


def _length(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """All positions of a sequence, where a shape depends on them."""
    if "embed_pos.embedding_weight" in shapes:
        return _shape(shapes, "embed_pos.embedding_weight")[0]
    name = "L_level.layers.0.mlp_t.down_proj.weight"
    return _shape(shapes, name)[0] if name in shapes else None


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    shape = shapes.get(name)
    if shape is None or len(shape) != 2:
        raise _error(f"{name} must be a matrix; got {'none' if shape is None else shape}")
    return shape[0], shape[1]


def _listed(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _error(what: str) -> ValueError:
    return ValueError(f"TinyRecursiveModel.load_official: {what}")
