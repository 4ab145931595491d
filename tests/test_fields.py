"""Settings of another type than a field declares are refused by class, field and value."""

import re
from dataclasses import fields, replace

import numpy as np
import pytest

from trm_fast._fields import check_fields
from trm_fast.nn import TRMConfig
from trm_fast.train import Stage, TrainerConfig

TRAINER, MODEL, STAGE = TrainerConfig(), TRMConfig(11, 81), Stage("a")


@pytest.mark.parametrize(
    ("config", "name", "value", "wanted"),
    [
        (TRAINER, "steps", "4", "an int"),
        (TRAINER, "steps", 2.5, "an int"),
        (TRAINER, "steps", 4.0, "an int"),
        (TRAINER, "steps", True, "an int"),
        (TRAINER, "steps", None, "an int"),
        (TRAINER, "steps", np.float64(4), "an int"),
        (TRAINER, "log_every", 0.5, "an int"),
        (TRAINER, "clip_norm", "1", "a number, or None"),
        (TRAINER, "clip_norm", True, "a number, or None"),
        (TRAINER, "ema", [0.9], "a number, or None"),
        (TRAINER, "precision", 16, "a str"),
        (MODEL, "hidden_size", "512", "an int"),
        (MODEL, "mlp_t", 1, "True or False"),
        (MODEL, "mlp_t", "no", "True or False"),
        (MODEL, "puzzle_emb_ndim", 0.5, "an int, or None"),
        (STAGE, "steps", "3", "an int, or None"),
        (STAGE, "name", 3, "a str"),
    ],
)
def test_another_type_is_refused_by_name(config, name, value, wanted):
    shown = repr(value.item() if isinstance(value, np.generic) else value)
    message = f"{type(config).__name__}: {name} must be {wanted}; got {shown}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        replace(config, **{name: value})


@pytest.mark.parametrize("config", [TRAINER, MODEL], ids=["trainer", "model"])
def test_every_field_is_checked(config):
    for field in fields(config):
        with pytest.raises(TypeError, match=f": {field.name} must be "):
            replace(config, **{field.name: object()})


def test_numbers_of_numpy_become_plain_ones():
    config = TrainerConfig(steps=np.int64(4), clip_norm=np.float32(0.5), ema=np.float64(0.5))
    assert (config.steps, config.clip_norm, config.ema) == (4, 0.5, 0.5)
    model = TRMConfig(np.int64(11), 81, mlp_t=np.bool_(True), rms_norm_eps=np.float64(1e-6))
    assert [type(v) for v in (config.steps, config.clip_norm, model.vocab_size)] == [
        int, float, int,
    ]  # fmt: skip
    assert model.mlp_t is True and type(model.rms_norm_eps) is float


def test_a_whole_number_is_a_number():
    assert TrainerConfig(clip_norm=1).clip_norm == 1
    check_fields(TrainerConfig(ema=0))
