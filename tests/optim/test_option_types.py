"""An option of another type is refused when an optimizer is made, by class, name and value."""

import re

import pytest
import torch
from torch.nn import Parameter

from trm_fast.optim import AdamATan2, GrokFastAdamW, GrokFastSGD, Muon, SparseSignSGD

FUSED = (GrokFastAdamW, GrokFastSGD, AdamATan2, Muon)
SWITCHES = ("maximize", "capturable", "differentiable", "foreach", "fused")
CASES = [
    *((kind, name) for kind in (*FUSED, SparseSignSGD) for name in ("lr", "weight_decay")),
    *((kind, name) for kind in FUSED for name in SWITCHES if (kind, name) != (Muon, SWITCHES[2])),
    *((kind, name) for kind in FUSED for name in ("alpha", "window", "weight_ema", "clip_norm")),
    (SparseSignSGD, "maximize"),
]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_an_option_of_another_type_is_refused_by_name(kind, name):
    message = rf"{kind.__name__}: {name} must be .*; got '0\.1'$"
    with pytest.raises(TypeError, match=message):
        kind([Parameter(torch.zeros(4, 4))], **{"lr": 0.1, name: "0.1"})


def test_a_group_with_an_option_of_another_type_is_not_added():
    optimizer = SparseSignSGD([Parameter(torch.zeros(4, 4))])
    group = {"params": [Parameter(torch.zeros(4, 4))], "lr": "0.1"}
    with pytest.raises(TypeError, match=re.escape("SparseSignSGD: lr must be a number")):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
