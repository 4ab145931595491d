"""Checkpoints of the official code: names, prefixes, both ways, and all or nothing."""

import pytest
import torch
from torch import Tensor

from trm_fast.nn import CONFIGS, TinyRecursiveModel

from .checks import batch_of, make, make_plain, small

PREFIXES = ("_orig_mod.model.inner.", "model.inner.", "")
WRAPPED = ("module.", "module._orig_mod.model.inner.", "_orig_mod.module.model.inner.")
LAYER = "L_level.layers.1.mlp.gate_up_proj.weight"


def official(config, prefix: str = PREFIXES[0], seed: int = 0) -> dict[str, Tensor]:
    """The state dict of the plain model, whose names are the official ones."""
    twin = make_plain(make(config, seed))
    return {prefix + name: value for name, value in twin.state_dict().items()}


def same(model: TinyRecursiveModel, other: TinyRecursiveModel) -> bool:
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(one, two) for (a, one), (b, two) in pairs)


@pytest.mark.parametrize("prefix", PREFIXES + WRAPPED)
@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_checkpoint_is_loaded_with_any_prefix(prefix, mixer, as_file, tmp_path):
    config = small(mixer, "bfloat16")
    state = official(config, prefix)
    model = make(config, seed=9)
    if as_file:
        torch.save(state, tmp_path / "step_100")
        model.load_official(tmp_path / "step_100")
        model.load_official(str(tmp_path / "step_100"))
    else:
        model.load_official(state)
    assert same(model, make(config))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "settings", [{}, {"mixer": "mlp_t"}, {"pos_encodings": "learned"},
                 {"puzzle_emb_ndim": 0, "puzzle_emb_len": 0}], ids=str,
)  # fmt: skip
def test_what_is_written_is_what_the_official_code_has(prefix, settings):
    config = small(dtype="bfloat16", **settings)
    model = make(config)
    written, truth = model.official_state_dict(prefix), official(config, prefix)
    assert written.keys() == truth.keys()
    for name, value in written.items():
        assert value.dtype == truth[name].dtype and torch.equal(value, truth[name])


def test_a_published_checkpoint_has_these_names_and_shapes():
    with torch.device("meta"):
        model = TinyRecursiveModel("sudoku_mlp")
    shapes = {name: tuple(value.shape) for name, value in model.official_state_dict("").items()}
    layers = {
        f"L_level.layers.{layer}.{name}.weight": shape
        for layer in (0, 1)
        for name, shape in {
            "mlp_t.gate_up_proj": (1024, 97),
            "mlp_t.down_proj": (97, 512),
            "mlp.gate_up_proj": (3072, 512),
            "mlp.down_proj": (512, 1536),
        }.items()
    }
    assert shapes == layers | {
        "H_init": (512,),
        "L_init": (512,),
        "embed_tokens.embedding_weight": (11, 512),
        "lm_head.weight": (11, 512),
        "q_head.weight": (2, 512),
        "q_head.bias": (2,),
        "puzzle_emb.weights": (1, 512),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixer": "mlp_t", "seq_len": 7},
        {"pos_encodings": "learned", "seq_len": 5},
        {"L_layers": 3, "hidden_size": 64, "vocab_size": 11},
        {"num_puzzle_identifiers": 2},
        {"puzzle_emb_ndim": 0, "puzzle_emb_len": 0},
    ],
    ids=str,
)
def test_a_model_is_made_from_the_shapes(settings):
    config = small(dtype="bfloat16", **settings)
    base = small(settings.get("mixer", "attention"), "bfloat16")
    given = {"seq_len": config.seq_len} if "pos_encodings" not in settings else {}
    model = TinyRecursiveModel.from_official(official(config), base, **given)
    assert same(model, make(config))
    batch = batch_of(config)
    found = model(model.initial_carry(batch), batch)[1]
    expected = make(config)
    assert torch.equal(found.logits, expected(expected.initial_carry(batch), batch)[1].logits)


def test_a_published_config_is_found_by_vocabulary_and_mixer():
    for name in ("sudoku_mlp", "sudoku_attention", "maze"):
        config = CONFIGS[name]
        state = TinyRecursiveModel(config, hidden_size=64, num_puzzle_identifiers=3)
        made = TinyRecursiveModel.from_official(state.official_state_dict())
        assert made.config.L_cycles == config.L_cycles and made.config.seq_len == config.seq_len
        assert made.config.num_puzzle_identifiers == 3 and made.config.hidden_size == 64
    with pytest.raises(ValueError) as error:
        TinyRecursiveModel.from_official(official(small("mlp_t")))
    assert str(error.value) == (
        "TinyRecursiveModel.load_official: config must be given for a vocabulary of 7 and the "
        "mixer 'mlp_t', as no published one has them; got None"
    )


def broken(change) -> dict[str, Tensor]:
    state = official(small())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(PREFIXES[0] + LAYER), f"the checkpoint must have {LAYER}; got none"),
        (
            lambda s: [s.pop(PREFIXES[0] + name) for name in
                       ("H_init", "L_init", "lm_head.weight", "q_head.bias", LAYER)],
            f"the checkpoint must have H_init, L_init, {LAYER} and 2 more; got none",
        ),
        (
            lambda s: s.update({"model.inner.more": torch.zeros(1)}),
            "the checkpoint must have no more than the model; got more",
        ),
        (
            lambda s: s.update({PREFIXES[0] + LAYER: torch.zeros(512, 31)}),
            f"{LAYER} must be (512, 32); got (512, 31)",
        ),
        (
            lambda s: s.update({PREFIXES[0] + "puzzle_emb.weights": torch.zeros(8, 32)}),
            "puzzle_emb.weights must be (5, 32); got (8, 32); mean_puzzle_row=True fills it with "
            "the mean row",
        ),
        (
            lambda s: s.update({"model.inner." + LAYER: torch.zeros(512, 32)}),
            f"{LAYER} must be there once; got it with several prefixes",
        ),
        (
            lambda s: s.update({PREFIXES[0] + LAYER: 3}),
            f"{PREFIXES[0] + LAYER} must be a tensor; got int",
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_changes_nothing(change, message):
    model, before = make(small(), seed=9), make(small(), seed=9)
    with pytest.raises(ValueError) as error:
        model.load_official(broken(change))
    assert str(error.value) == f"TinyRecursiveModel.load_official: {message}"
    assert same(model, before)


def test_another_number_of_puzzles_gets_the_mean_row_where_asked():
    state = official(small(num_puzzle_identifiers=8))
    model = make(small(), seed=9)
    model.load_official(state, mean_puzzle_row=True)
    mean = state[PREFIXES[0] + "puzzle_emb.weights"].mean(0)
    assert model.puzzles.table.shape == (5, 32)
    assert (model.puzzles.table - mean).abs().max() <= 8 * 2.3e-16
    assert torch.equal(model.lm_head, state[PREFIXES[0] + "lm_head.weight"])
    wrong = broken(lambda s: s.update({PREFIXES[0] + "puzzle_emb.weights": torch.zeros(8, 31)}))
    with pytest.raises(ValueError, match=r"puzzle_emb.weights must be \(5, 32\); got \(8, 31\)"):
        model.load_official(wrong, mean_puzzle_row=True)


def test_loading_keeps_the_parameters_that_an_optimizer_has():
    model = make(small(), seed=9)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    model.load_official(official(small()))
    assert before == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_average_of_torch_is_loaded(tmp_path):
    config = small()
    twin = torch.optim.swa_utils.AveragedModel(make_plain(make(config)))
    model = make(config, seed=9)
    model.load_official(twin.state_dict())
    assert same(model, make(config))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(4).to_sparse(), "must be a dense tensor of real numbers"),
        (torch.zeros(4, dtype=torch.complex64), "must be a dense tensor of real numbers"),
        (torch.zeros(4, device="meta"), "must be a dense tensor of real numbers"),
        (torch.zeros(4, dtype=torch.uint8).view(torch.bits8), "must be a dense tensor of real"),
        ([1.0], "must be a tensor; got list"),
    ],
)
def test_what_is_no_dense_tensor_is_refused_by_name(value, message):
    state = official(small(), "") | {LAYER: value}
    with pytest.raises(ValueError, match=f"load_official: {LAYER} {message}"):
        make(small()).load_official(state)


def test_names_alone_do_not_make_layers():
    state = official(small(), "") | {"L_level.layers.7.x": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj\.weight must be a matrix"):
        TinyRecursiveModel.from_official(state, small())
