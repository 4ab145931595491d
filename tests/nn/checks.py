"""What the tests of the modules share: the plain model, small settings, batches, comparisons."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from trm_fast.nn import TinyRecursiveModel, TRMConfig

SINGLE = torch.finfo(torch.float32).eps
DOUBLE = torch.finfo(torch.float64).eps


def _plain() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "_plain_trm.py"
    spec = spec_from_file_location("plain_trm", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


plain = _plain()


def small(mixer: str = "attention", dtype: str = "float64", **settings) -> TRMConfig:
    """The official model in small; widths that every backend takes."""
    chosen = {
        "vocab_size": 7,
        "seq_len": 9,
        "num_puzzle_identifiers": 5,
        "puzzle_emb_len": 2,
        "H_cycles": 2,
        "L_cycles": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_t": mixer == "mlp_t",
        "pos_encodings": "none" if mixer == "mlp_t" else "rope",
        "forward_dtype": dtype,
    }
    return TRMConfig(**chosen | settings)


def mixing(mixer: str, length: int, heads: int = 2) -> dict[str, object]:
    """The options of a block for one of the official mixers."""
    options = {"length": length} if mixer == "mlp_t" else {"heads": heads}
    return {"mixer": mixer, **options}


def make(config: TRMConfig, seed: int = 0) -> TinyRecursiveModel:
    """A model whose weights are those of its seed in float32, in any dtype of the activations.

    Heads and puzzle rows, which start at 0, get values, so that they matter.
    """
    torch.manual_seed(seed)
    model = TinyRecursiveModel(config)
    with torch.no_grad():
        model.q_head.weight.copy_(0.2 * torch.randn(2, config.hidden_size))
        model.q_head.bias.copy_(torch.tensor([-0.1, 0.1]))
        if model.puzzles is not None:
            model.puzzles.table.copy_(0.1 * torch.randn(model.puzzles.table.shape))
        for start in (model.y_init, model.z_init):
            start.copy_(torch.randn(config.hidden_size).bfloat16())
    return model.double() if config.forward_dtype == "float64" else model


def make_plain(model: TinyRecursiveModel, config: TRMConfig | None = None) -> nn.Module:
    """The plain model with the weights of another, and perhaps in another dtype."""
    config = model.config if config is None else config
    twin = plain.PlainTRM(config)
    twin.load_state_dict(model.official_state_dict(""))
    return twin.double() if config.forward_dtype == "float64" else twin


def batch_of(config: TRMConfig, batch: int = 3, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, config.seq_len)
    labels = torch.randint(config.vocab_size, shape, generator=generator)
    labels[:, 1::4] = -100
    return {
        "inputs": torch.randint(config.vocab_size, shape, generator=generator),
        "labels": labels,
        "puzzle_identifiers": torch.randint(
            config.num_puzzle_identifiers, (batch,), generator=generator
        ),
    }


def distance(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The error of each tensor, relative to its largest true value."""
    assert found.keys() == truth.keys()
    errors = {}
    for name, value in found.items():
        true = truth[name].double()
        assert value.shape == true.shape
        errors[name] = ((value.double() - true).abs().max() / true.abs().max()).item()
    return errors
