"""The model against the official one in plain torch, and against itself written out."""

import pytest
import torch
from torch import Tensor

import trm_fast
from trm_fast import use_backend
from trm_fast.nn import CONFIGS, TinyRecursiveModel, TRMConfig
from trm_fast.optim import SparseSignSGD

from ..conftest import skip_unless_usable
from .checks import DOUBLE, SINGLE, batch_of, distance, make, make_plain, plain, small

MIXERS = ("attention", "mlp_t")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("sudoku_mlp", 5_028_866),
        ("sudoku_attention", 6_828_034),
        ("maze", 6_822_914),
        ("arc", 6_829_058),
    ],
)
def test_the_published_models_have_their_number_of_parameters(name, count):
    with torch.device("meta"):
        model = trm_fast.TinyRecursiveModel(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def run(model, batch: dict[str, Tensor], steps: int = 2) -> dict[str, Tensor]:
    """Outputs of some steps, and gradients of the sum of their losses; no slot halts."""
    carry = model.initial_carry(batch)._replace(data=batch)
    y, z = model.y_init.expand_as(carry.y), model.z_init.expand_as(carry.z)
    found: dict[str, Tensor] = {}
    model.zero_grad()
    if model.puzzles is not None:
        model.puzzles.table.grad = None
    for step in range(steps):
        y, z, outputs = model.step(y, z, batch)
        loss = model.loss(carry, outputs).loss
        loss.backward()
        q = torch.stack((outputs.q_halt, outputs.q_continue), -1)
        found |= {f"y{step}": y, f"z{step}": z, f"logits{step}": outputs.logits, f"q{step}": q}
        found[f"loss{step}"] = loss
    state = model.official_state_dict("")
    parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    for name, value in state.items():
        if value.data_ptr() in parameters:
            found[name] = parameters[value.data_ptr()].grad
    if model.puzzles is not None:
        found["rows"] = model.puzzles.table.grad.to_dense()
    return {name: value.detach() for name, value in found.items()}


def run_plain(model, batch: dict[str, Tensor], steps: int = 2) -> dict[str, Tensor]:
    shape = (len(batch["inputs"]), model.config.length, model.config.hidden_size)
    y, z = model.H_init.expand(shape), model.L_init.expand(shape)
    found: dict[str, Tensor] = {}
    rows = 0
    model.zero_grad()
    for step in range(steps):
        y, z, logits, q = model.step(y, z, batch)
        loss = plain.plain_loss(logits, batch["labels"], q)
        loss.backward()
        found |= {f"y{step}": y, f"z{step}": z, f"logits{step}": logits, f"q{step}": q}
        found[f"loss{step}"] = loss
        if model.config.puzzle_width:
            table = torch.zeros_like(model.puzzle_emb.weights)
            ids, leaf = batch["puzzle_identifiers"], model.puzzle_emb.local_weights
            rows = rows + table.index_add_(0, ids, leaf.grad)
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    if model.config.puzzle_width:
        found["rows"] = rows
    return {name: value.detach() for name, value in found.items()}


def compare(settings: dict, dtype: str, backend: str, batch: int) -> None:
    """Our error is at most some times that of plain torch in the same dtype."""
    config = small(dtype=dtype, **settings)
    model = make(config)
    data = batch_of(config, batch)
    truth = run_plain(make_plain(model, small(dtype="float64", **settings)), data)
    with use_backend(backend):
        ours = distance(run(model, data), truth)
    if dtype == "float64":
        # Rounding errors add up linearly, so those in float64 are those in float32 made smaller;
        # eight times for their chance.
        single = make_plain(make(small(dtype="float32", **settings)))
        plain_errors = distance(run_plain(single, data), truth)
        factor, floor = 8 * DOUBLE / SINGLE, 100 * DOUBLE
    else:
        plain_errors = distance(run_plain(make_plain(model), data), truth)
        factor, floor = 3, torch.finfo(config.dtype).eps
    # Which of many equally large errors a tensor has is chance, so the largest of all counts.
    bound = factor * max(plain_errors.values()) + floor
    assert {name: error for name, error in ours.items() if not error <= bound} == {}


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", "float64"),
        ("reference", "float32"),
        ("reference", "bfloat16"),
        ("cpp", "float32"),
        ("cpp", "bfloat16"),
    ],
)
@pytest.mark.parametrize("mixer", MIXERS)
def test_steps_and_gradients_are_those_of_the_plain_model(mixer, backend, dtype):
    skip_unless_usable(backend)
    compare({"mixer": mixer}, dtype, backend, batch=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"seq_len": 1},
        {"seq_len": 7, "puzzle_emb_len": 0},
        {"seq_len": 81, "mixer": "mlp_t", "puzzle_emb_len": 16},
        {"puzzle_emb_ndim": 0, "puzzle_emb_len": 0},
        {"puzzle_emb_ndim": 40, "puzzle_emb_len": 3},
        {"pos_encodings": "learned"},
        {"pos_encodings": "none"},
        {"rope_theta": 100.0, "rms_norm_eps": 1e-2, "L_layers": 1, "expansion": 20},
        {"H_cycles": 1, "L_cycles": 1},
    ],
    ids=str,
)
def test_every_setting_does_what_it_does_in_the_plain_model(settings):
    compare(settings, "float64", "reference", batch=1)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_fifty_training_steps_stay_with_the_plain_model(mixer):
    """In float64, with the carry, halting by q and both optimizers."""
    # One cycle: deeper ones of a net this small are chaotic, so that any rounding decides.
    settings = {"halt_max_steps": 3, "halt_exploration_prob": 0.0, "H_cycles": 1}
    config = small(mixer, **settings)
    model = make(config)
    twin = make_plain(model)
    single = make_plain(make(small(mixer, "float32", **settings)))
    ours, truth = train(model, config), train_plain(twin, config)
    drift = (train_plain(single, config) - truth).abs().max().item()
    # The drift from rounding in float32, made smaller as the rounding is; eight times for chance.
    assert (ours - truth).abs().max().item() <= 8 * drift * DOUBLE / SINGLE
    assert truth[-5:].mean() < 0.9 * truth[:5].mean() and drift < 1e-4


def train(model: TinyRecursiveModel, config: TRMConfig) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    rows = SparseSignSGD([model.puzzles.table], lr=1e-3, weight_decay=0.1)
    carry, losses = None, []
    for number in range(50):
        batch = batch_of(config, 4, seed=number % 5)
        carry = model.initial_carry(batch) if carry is None else carry
        carry, outputs = model(carry, batch)
        found = model.loss(carry, outputs)
        found.loss.backward()
        for each in (optimizer, rows):
            each.step()
            each.zero_grad()
        losses.append(found.loss.detach().double())
    return torch.stack(losses)


def train_plain(model, config: TRMConfig) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    carry, losses = None, []
    for number in range(50):
        batch = batch_of(config, 4, seed=number % 5)
        carry = model.initial_carry(batch) if carry is None else carry
        carry, logits, q = model(carry, batch)
        loss = plain.plain_loss(logits, carry.data["labels"], q)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sign_step(model.puzzle_emb, carry.data["puzzle_identifiers"])
        losses.append(loss.detach().double())
    return torch.stack(losses)


def sign_step(table, ids: Tensor) -> None:
    for row in ids.unique():
        grad = table.local_weights.grad[ids == row].sum(0)
        table.weights[row] = table.weights[row] * (1 - 1e-3 * 0.1) - 1e-3 * grad.sign()


def test_autocast_decides_the_dtype():
    config = small(dtype="float32")
    model, data = make(config), batch_of(config)
    with torch.autocast("cpu", torch.bfloat16):
        carry, outputs = model(model.initial_carry(data), data)
        model.loss(carry, outputs).loss.backward()
    assert outputs.logits.dtype == carry.y.dtype == torch.bfloat16
    assert outputs.q_halt.dtype == torch.float32
    low = make(small(dtype="bfloat16"))
    _, same = low(low.initial_carry(data), data)
    # Both compute in bfloat16; positions, puzzle rows and heads have the same dtypes too.
    assert torch.equal(outputs.logits, same.logits) and torch.equal(outputs.q_halt, same.q_halt)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_steps_without_gradients_are_the_same(context):
    config = small()
    model, data = make(config).eval(), batch_of(config)
    _, expected = model(model.initial_carry(data), data)
    with context():
        carry, found = model(model.initial_carry(data), data)
        carry, _ = model(carry, data)
    assert torch.equal(found.logits, expected.logits) and not found.logits.requires_grad
    model.train()
    carry, outputs = model(model.initial_carry(data), data)
    model.loss(carry, outputs).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_float_type_of_a_converted_model_is_that_of_its_activations():
    config = small(dtype="bfloat16")
    model, data = make(config).float(), batch_of(config)
    assert model(model.initial_carry(data), data)[1].logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"L_cycles": 0}, "TRMConfig: L_cycles must be >= 1; got 0"),
        ({"pos_encodings": "sine"}, "TRMConfig: pos_encodings must be one of rope, learned, none; "
         "got 'sine'"),
        ({"forward_dtype": "int8"}, "TRMConfig: forward_dtype must be one of bfloat16, float16, "
         "float32, float64; got 'int8'"),
        ({"halt_exploration_prob": 2}, "TRMConfig: halt_exploration_prob must be in [0, 1]; got 2"),
        ({"puzzle_emb_ndim": 0}, "TRMConfig: puzzle_emb_len must be 0, as there is no puzzle "
         "embedding; got 16"),
        ({"puzzle_emb_ndim": 1025, "puzzle_emb_len": 2}, "TRMConfig: puzzle_emb_len must be 0 or "
         ">= 3; got 2"),
        ({"H_cycle": 2}, "TinyRecursiveModel: a setting must be one of vocab_size, seq_len, "
         "num_puzzle_identifiers, puzzle_emb_ndim, puzzle_emb_len, H_cycles, L_cycles, L_layers, "
         "hidden_size, expansion, num_heads, pos_encodings, rms_norm_eps, rope_theta, "
         "halt_max_steps, halt_exploration_prob, forward_dtype, mlp_t, no_ACT_continue; got "
         "'H_cycle'; did you mean 'H_cycles'?"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError) as error, torch.device("meta"):
        TinyRecursiveModel("maze", **settings)
    assert str(error.value) == message


def test_an_unknown_config_is_named():
    with pytest.raises(ValueError) as error:
        TinyRecursiveModel("sudoku-mlp")
    assert str(error.value) == (
        "TinyRecursiveModel: config must be one of sudoku_mlp, sudoku_attention, maze, arc; got "
        "'sudoku-mlp'; did you mean 'sudoku_mlp'?"
    )


def test_settings_survive_a_dictionary():
    assert TRMConfig(**CONFIGS["sudoku_mlp"].to_dict()) == CONFIGS["sudoku_mlp"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(3, 8, dtype=torch.int64)},
         "TinyRecursiveModel: inputs must be [batch, 9]; got (3, 8)"),
        ({"puzzle_identifiers": None}, "TinyRecursiveModel: puzzle_identifiers must be [3]; got "
         "none"),
        ({"puzzle_identifiers": torch.zeros(2, dtype=torch.int64)},
         "TinyRecursiveModel: puzzle_identifiers must be [3]; got (2,)"),
    ],
)  # fmt: skip
def test_a_wrong_batch_is_named(change, message):
    config = small()
    data = {key: value for key, value in (batch_of(config) | change).items() if value is not None}
    with pytest.raises(ValueError) as error:
        make(config).initial_carry(data)
    assert str(error.value) == message


def test_a_batch_that_does_not_fit_its_carry_is_named():
    config = small()
    model, data = make(config), batch_of(config)
    carry = model.initial_carry(data)
    with pytest.raises(ValueError) as error:
        model(carry, batch_of(config, 2))
    assert str(error.value) == (
        "TinyRecursiveModel: inputs must be (3, 9) as in its carry; got (2, 9)"
    )
    with pytest.raises(ValueError) as error:
        model(carry, {**data, "more": data["labels"]})
    assert str(error.value) == (
        "TinyRecursiveModel: a batch must have what its carry has, inputs, labels, "
        "puzzle_identifiers; got inputs, labels, more, puzzle_identifiers"
    )


def test_an_id_out_of_the_vocabulary_is_named():
    config = small()
    model, data = make(config), batch_of(config)
    data["inputs"][1, 4] = 7
    with pytest.raises(ValueError) as error:
        model(model.initial_carry(data), data)
    assert str(error.value) == "TokenEmbedding: ids must be in [0, 7); got 7 at [1, 4]"
